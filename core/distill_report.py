"""The report of a distillation, as part of `core.report.QuantizeReport`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.report import Report


@dataclass(frozen=True)
class DistillMark(Report):
    """Mean divergence from the float model, nats per token, and perplexity after a step: on held-out windows and other text."""

    step: int
    kld: float
    perplexity: float
    other_kld: float | None = None
    other_perplexity: float | None = None


@dataclass(frozen=True)
class DistillReport(Report):
    """Outcome of a distillation.

    Attributes:
        steps: taken; best: the one whose model was kept, 0 for the model as it was before.
        tokens: per step. texts: names of what was trained on, of which `held_out` tokens were not; other: of other text, if any.
        losses: of each step, nats per token. marks: before the first step, and after every few; of the best: `after`.
        float_perplexity, other_float_perplexity: of the float model on the same windows.
        stopped: whether fewer steps were taken than asked for.
    """

    steps: int
    best: int
    tokens: int
    texts: tuple[str, ...]
    held_out: int
    other: str | None
    losses: tuple[float, ...]
    marks: tuple[DistillMark, ...]
    float_perplexity: float
    other_float_perplexity: float | None
    seconds: float
    stopped: bool = False

    @property
    def before(self) -> DistillMark:
        """The mark before the first step."""
        return self.marks[0]

    @property
    def after(self) -> DistillMark:
        """The mark of the model that was kept."""
        return next(mark for mark in self.marks if mark.step == self.best)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DistillReport:
        """Read what `to_dict` wrote."""
        tuples = {name: tuple(data[name]) for name in ("texts", "losses")}
        return cls(**data | tuples | {"marks": tuple(DistillMark(**mark) for mark in data["marks"])})

"""A run: a model that a visitor can compare, with its measurements by the protocol of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.baselines.registry import split_key
from core.recipe import QuantRecipe


@dataclass
class TernaryReports:
    """Reports of a ternary model. `inputs`: reports of the four projection inputs by layer."""

    tokens: int = 0
    weights: Any = None
    sparsity: Any = None
    inputs: dict[int, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """The protocol of a measurement: `text` as `resolve_text` takes it, `tokens` of it in windows of `window`."""

    text: str
    tokens: int
    window: int


@dataclass
class Run:
    """A model that can be compared: an unquantised one, a quantised one, or an unquantised one's baseline.

    Attributes:
        key: the workbench's key: a model name, the hash of its recipe, or a baseline's key.
        label: the full name. name: the visitor's own name for it, empty for the page's short name.
        measured: measurements (EvalReport) by how they were made, the newest last.
        ternary: its reports for the BitNet tab. state: of a local model's files, see `core.folders.state_of`.
    """

    key: str
    label: str
    recipe: QuantRecipe | None = None
    quantize: Any = None
    measured: dict[Protocol, Any] = field(default_factory=dict)
    ternary: TernaryReports = field(default_factory=TernaryReports)
    state: str | None = None
    name: str = ""

    @property
    def model(self) -> str:
        """Name of the model that was loaded, or that was quantised."""
        return self.recipe.model if self.recipe else split_key(self.key)[0]

    @property
    def baseline(self) -> str | None:
        """Name of the baseline that it is, None for every other run."""
        return split_key(self.key)[1]

    @property
    def evaluation(self) -> Any:
        """The newest measurement, None before the first."""
        return next(reversed(self.measured.values()), None)

    def measure(self, protocol: Protocol, report: Any) -> None:
        """Add a measurement as the newest."""
        self.measured.pop(protocol, None)
        self.measured[protocol] = report

    @property
    def is_base(self) -> bool:
        """Whether this is an unquantised model."""
        return self.recipe is None and self.baseline is None

"""What the probe reads and tells: frozen dataclasses of plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.checks import require_int
from core.report import Report

MAX_PROBE_TOKENS = 4096

SATURATED = 0.5
"""Nats per token above which the quadratic form reads too low: a prediction beyond is only known to be large."""


@dataclass(frozen=True)
class ProbeText:
    """The text that a probe reads.

    Attributes:
        text: name or path of a text, or "text:" and a pasted one, as `core.evaluation.windows.evaluation_windows` takes it.
        tokens: how many of its first tokens, 8 to `MAX_PROBE_TOKENS`.
    Raises: InputError for another number.
    """

    text: str = "sotu"
    tokens: int = 512

    def __post_init__(self) -> None:
        tokens = require_int("probe tokens", self.tokens, 8, MAX_PROBE_TOKENS, f"use 8 to {MAX_PROBE_TOKENS}")
        object.__setattr__(self, "tokens", tokens)


PROBE_TEXT = ProbeText()
"""What a probe reads unless something else is asked for."""


@dataclass(frozen=True)
class ProbeInfo(Report):
    """What a probe consists of.

    Attributes:
        tokens, window: how much of the text it has read. draws: labels drawn at every position.
        noise_floor: KLD of the model run in bfloat16 against float32 on these tokens, nats per token.
        seconds: what it took. nbytes: what it keeps.
    """

    model: str
    text: str
    tokens: int
    window: int
    draws: int
    noise_floor: float
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Prediction(Report):
    """Predicted divergence of a recipe from the model it starts from, nats per token.

    Attributes:
        cells: by "layers.<i>.<cell>", a cell being a site, "softmax" or a linear layer (qkv, o, up, down).
        total: their sum.
        estimated: cells that were not computed in the time allowed but read off neighbours (other clusters or bits).
        unknown: cells about which nothing is known yet; they are missing from `cells` and `total`.
        noise_floor: see `ProbeInfo`.
        seconds: what the prediction took.
    """

    cells: dict[str, float]
    total: float
    estimated: tuple[str, ...]
    unknown: tuple[str, ...]
    noise_floor: float
    seconds: float

    @property
    def saturated(self) -> bool:
        """Whether the total lies beyond where the quadratic form holds."""
        return self.total > SATURATED

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, with `saturated`."""
        return super().to_dict() | {"saturated": self.saturated}


@dataclass(frozen=True)
class Measurement(Report):
    """Measured divergence of a fake-quantised pass over the probe's tokens, nats per token.

    Attributes:
        kld: mean over the tokens. stderr: its standard error over the windows, None for a single window.
        same_top: share of tokens whose likeliest next token stayed.
        noise_floor: see `ProbeInfo`.
        seconds: what the pass took.
    """

    kld: float
    stderr: float | None
    same_top: float
    noise_floor: float
    seconds: float

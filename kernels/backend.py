"""Which implementation of an op runs, and why. AUTO may choose; a backend asked for by name never falls back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Backend(StrEnum):
    """Implementations of the low-bit linear layer.

    AUTO       let `select_linear_backend` choose per layer, and say why
    REFERENCE  dequantise the packed weight to float32 once, float32 matrix product; readable, always runs
    INT8       integer codes on both sides, `torch._int_mm` per cluster, scales in the epilogue
    """

    AUTO = "auto"
    REFERENCE = "reference"
    INT8 = "int8"


@dataclass(frozen=True)
class Choice:
    """A backend and the sentence that justifies it, shown in the page, the CLI and reports."""

    backend: Backend
    reason: str

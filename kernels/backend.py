"""Which implementation of an op runs, and why. AUTO may choose; a backend asked for by name never falls back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Backend(StrEnum):
    """Implementations of an op.

    AUTO       let the op choose: for linear layers `select_linear_backend`, which says why; else Triton for CUDA tensors
    REFERENCE  plain torch: a linear layer dequantises its packed weight to float32 once; readable, always runs
    INT8       linear layers: integer codes on both sides, `torch._int_mm` per cluster, scales in the epilogue
    INT4       linear layers with a float input: few rows as 4-bit products in bfloat16, more rows as REFERENCE
    TRITON     the op's Triton kernel, on CUDA tensors (or on CPU tensors in Triton's interpreter, for tests)
    """

    AUTO = "auto"
    REFERENCE = "reference"
    INT8 = "int8"
    INT4 = "int4"
    TRITON = "triton"


@dataclass(frozen=True)
class Choice:
    """A backend and the sentence that justifies it, shown in the page, the CLI and reports."""

    backend: Backend
    reason: str


def triton_runs_on(device: str) -> bool:
    """Whether Triton kernels run on tensors of a device type; loads Triton only if it could."""
    if device != "cuda":
        return False
    from kernels import _triton

    return _triton.available()

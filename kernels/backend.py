"""Which implementation of an op runs, and why. AUTO may choose; a backend asked for by name never falls back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import StrEnum

import torch


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


LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs whose instructions the kernels need (bfloat16, int8 products): Ampere."""


def triton_unsupported_reason(device: torch.device) -> str | None:
    """Why Triton kernels do not run on tensors of a device, None if they do; loads Triton only if they could."""
    if device.type != "cuda":
        return f"kernels run on cuda, not on {device.type}"
    from kernels import _triton

    if not _triton.available():
        return "Triton is not installed"
    found = _capability(device)
    if found < LEAST_CAPABILITY:
        return "compute capability {}.{}, kernels need {}.{}".format(*found, *LEAST_CAPABILITY)
    return None


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of a device."""
    return device.type == "cuda" and triton_unsupported_reason(device) is None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)

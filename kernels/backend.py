"""Choose the implementation of an op: AUTO decides and says why, a backend by name never falls back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class Backend(StrEnum):
    """The implementations of an op.

    AUTO       let the op choose: for linear layers `select_linear_backend`, which says why; else Triton for CUDA tensors
    REFERENCE  plain torch: a linear layer dequantises its packed weight to float32 once; readable, always runs
    INT8       linear layers: integer codes of input and weight, `torch._int_mm` per cluster, then the scales
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
    """A backend and the sentence that gives the reason, shown in the page, the CLI and reports."""

    backend: Backend
    reason: str


LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs with the needed instructions (bfloat16, int8 products): Ampere."""


def triton_unsupported_reason(device: torch.device) -> str | None:
    """Say why Triton kernels do not run on tensors of a device, None if they do. Triton is loaded only for CUDA devices."""
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
    """Say whether Triton kernels run on tensors of a device."""
    return device.type == "cuda" and triton_unsupported_reason(device) is None


def use_triton(backend: Backend, x: Tensor, *, unsupported_reason: str | None = None) -> bool:
    """Decide whether an op runs its Triton kernel (True) or its reference (False).

    Args:
        backend: AUTO takes Triton for CUDA tensors without `unsupported_reason`; TRITON and REFERENCE are taken as asked.
        x: one tensor of the call; only its device counts.
        unsupported_reason: why the kernel cannot take this call, None if it can.
    Raises: ValueError if TRITON is asked for where it cannot run, saying why, or for a backend that the op does not have.
    """
    if backend is Backend.REFERENCE or backend is Backend.AUTO and not x.is_cuda:
        return False
    if backend not in (Backend.AUTO, Backend.TRITON):
        raise ValueError(f"this op has no {backend} path: use auto, triton or reference")
    if unsupported_reason is None and not (x.device.type == "cpu" and _interpreting()):
        unsupported_reason = triton_unsupported_reason(x.device)
    if backend is Backend.TRITON and unsupported_reason is not None:
        raise ValueError(f"triton cannot run this call ({unsupported_reason}): use reference")
    return unsupported_reason is None


def _interpreting() -> bool:
    from kernels import _triton

    return _triton.interpreting()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)

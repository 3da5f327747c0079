"""Import Triton where it is installed, for all kernels, and define the device functions that they share.

Modules that hold Triton kernels import `triton` and `tl` from here. Without the package (it exists for Linux only) the decorator
returns the functions unchanged and `available` returns False. TRITON_INTERPRET=1, set before Triton is imported, runs every
kernel in NumPy on CPU tensors: the tests check them so on machines without a GPU.

The interpreter treats the bits of bfloat16 as integers, so kernels convert such tensors to float32 first where `INTERPRET` is
true. On a GPU nothing is converted, and the compile-time branch costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.codes import Codes

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.language.extra.cuda import libdevice

    _INSTALLED = True
except ImportError:  # not Linux: only references run

    class _Absent:
        """A stand-in for Triton's names in decorators and annotations."""

        @staticmethod
        def jit(function: object = None, *, do_not_specialize: object = None) -> object:
            return function or (lambda decorated: decorated)

        @staticmethod
        def constexpr(value: object) -> object:
            return value

    triton = tl = libdevice = _Absent()
    TritonError = RuntimeError
    _INSTALLED = False

ERRORS: tuple[type[Exception], ...] = (RuntimeError, TritonError)
"""Errors of a kernel launch: those of CUDA and torch, and Triton's own, which are not RuntimeErrors."""


def available() -> bool:
    """Say whether Triton is installed."""
    return _INSTALLED


def interpreting() -> bool:
    """Say whether kernels run in Triton's interpreter, on CPU tensors."""
    return _INSTALLED and bool(triton.knobs.runtime.interpret)


INTERPRET = tl.constexpr(interpreting())


def on_its_device(launch: Callable) -> Callable:
    """Wrap a launcher so that its first argument's device is current while it runs: Triton launches on the current device."""

    @functools.wraps(launch)
    def launched(x: Tensor | Codes, /, *args: object, **options: object) -> object:
        if x.device.type != "cuda":
            return launch(x, *args, **options)
        with torch.cuda.device(x.device):
            return launch(x, *args, **options)

    return launched


def next_power(n: int) -> int:
    """Return the smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def rows_strided(x: Tensor) -> Tensor:
    """Return x [..., K] with unit stride along K, copied only if it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def tl_code_offset(BITS: tl.constexpr) -> tl.tensor:
    """Return 2**(BITS - 1), as `kernels.codes.code_offset` does on the host."""
    return 2.0 ** (BITS - 1)


@triton.jit
def round_even(x: tl.tensor) -> tl.tensor:
    """Round float32 half to even. |x| < 2**22 in the interpreter."""
    if INTERPRET:
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: the sum has no fraction bits
    return libdevice.rint(x)


@triton.jit
def matrix_operand(x: tl.tensor) -> tl.tensor:
    """Return x as a float operand of `tl.dot`: unchanged on a GPU, float32 in the interpreter."""
    if INTERPRET:
        return x.to(tl.float32)
    return x

"""The one door to Triton: the package if it is there, whether it is interpreted, and the device functions that kernels share.

Modules that hold Triton kernels import `triton` and `tl` from here. Without the package (it exists for Linux only) the decorator
returns the functions unchanged and `available` says no. TRITON_INTERPRET=1, set before Triton is imported, runs every kernel in
NumPy on CPU tensors: that is how the tests check them on machines without a GPU.

The interpreter computes on the bits of bfloat16 as if they were integers: kernels turn such tensors into float32 first
where `INTERPRET` is true, and leave them alone on a GPU, where the branch costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.language.extra.cuda import libdevice

    _INSTALLED = True
except ImportError:  # not Linux: the references are all there is

    class _Absent:
        """Stands where decorators and annotations name Triton."""

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
"""What a launch raises: errors of CUDA and torch, and Triton's own, which are no RuntimeErrors."""


def available() -> bool:
    """Tell whether Triton is installed."""
    return _INSTALLED


def interpreting() -> bool:
    """Tell whether kernels run in Triton's interpreter, on CPU tensors."""
    return _INSTALLED and bool(triton.knobs.runtime.interpret)


INTERPRET = tl.constexpr(interpreting())


def on_its_device(launch: Callable) -> Callable:
    """Make the device of a launcher's first argument the current one while it runs: Triton launches on the current device."""

    @functools.wraps(launch)
    def launched(x: Tensor, /, *args: object, **options: object) -> object:
        if not x.is_cuda:
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
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: the sum has no fraction bits left
    return libdevice.rint(x)


@triton.jit
def matrix_operand(x: tl.tensor) -> tl.tensor:
    """Return x as a float operand of `tl.dot`: unchanged on a GPU, float32 in the interpreter."""
    if INTERPRET:
        return x.to(tl.float32)
    return x

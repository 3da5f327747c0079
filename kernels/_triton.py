"""The one door to Triton: whether it is there, whether it is interpreted, and the few device functions that all kernels share.

Modules that hold Triton kernels import `triton` and `tl` from here; without the package (it exists for Linux only) the
decorator leaves the functions alone and `available` says no. `kernels/__init__.py` loads those modules on first use, so
that `import kernels` loads no Triton. TRITON_INTERPRET=1, set before Triton is imported, runs every kernel in NumPy on
CPU tensors: that is how the tests check them on machines without a GPU.

The interpreter computes on the bits of bfloat16 as if they were integers: kernels turn such tensors into float32 first
where `INTERPRET` is true, and leave them alone on a GPU, where the branch costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import Backend, triton_unsupported_reason

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
        def jit(function: object = None, **_: object) -> object:
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
    """Whether Triton is installed."""
    return _INSTALLED


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return _INSTALLED and bool(triton.knobs.runtime.interpret)


INTERPRET = tl.constexpr(interpreting())


def use_triton(backend: Backend, x: Tensor, *, unsupported_reason: str | None = None) -> bool:
    """Whether an op runs its Triton kernel (True) or its reference.

    Args:
        backend: AUTO takes Triton for CUDA tensors without unsupported_reason; TRITON and REFERENCE are taken at their word.
        x: one tensor of the call; its device counts.
        unsupported_reason: why the kernel cannot take this call, None if it can.
    Raises: ValueError if TRITON is asked for where it cannot run, saying why.
    """
    if unsupported_reason is None and not (x.device.type == "cpu" and interpreting()):
        unsupported_reason = triton_unsupported_reason(x.device)
    if backend is Backend.TRITON:
        if unsupported_reason is not None:
            raise ValueError(f"triton cannot run this call ({unsupported_reason}): use reference")
        return True
    if backend is Backend.AUTO:
        return unsupported_reason is None and x.is_cuda
    if backend is Backend.REFERENCE:
        return False
    raise ValueError(f"this op has no {backend} path: use auto, triton or reference")


def on_its_device(launch: Callable) -> Callable:
    """Decorator of functions that launch kernels. Triton launches on the current device: that of the first tensor becomes it."""

    @functools.wraps(launch)
    def launched(x: Tensor, /, *args: object, **options: object) -> object:
        if not x.is_cuda:
            return launch(x, *args, **options)
        with torch.cuda.device(x.device):
            return launch(x, *args, **options)

    return launched


def next_power(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


@triton.jit
def round_even(x: tl.tensor) -> tl.tensor:
    """Round float32 half to even. |x| < 2**22 in the interpreter."""
    if INTERPRET:
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: the sum has no fraction bits left
    return libdevice.rint(x)


@triton.jit
def matrix_operand(x: tl.tensor) -> tl.tensor:
    """x as a float operand of `tl.dot`: unchanged on a GPU, float32 in the interpreter."""
    if INTERPRET:
        return x.to(tl.float32)
    return x

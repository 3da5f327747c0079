"""Pack codes of 1 to 8 bits into bytes: the ops `pack` and `unpack`, in Triton or torch by device.

`layout.py` defines the layout and holds the reference; `kernel.py` holds the Triton kernels. Both write the same bytes.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backend import Backend, use_triton
from kernels.packing import layout
from kernels.packing.layout import packed_width

__all__ = ["pack", "packed_width", "unpack"]


def pack(codes: Tensor, bits: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: [..., K] uint8, each < 2**bits.
        bits: 1 to 8.
        backend: AUTO takes Triton for CUDA tensors.
    Returns: [..., packed_width(K, bits)] uint8, contiguous.
    Raises: ValueError if bits is outside 1..8 or codes are not uint8, or TRITON is asked for where it cannot run.
    """
    layout.check(codes, bits)
    if not use_triton(backend, codes):
        return layout.pack(codes, bits)
    from kernels.packing import kernel

    return kernel.pack(codes, bits)


def unpack(packed: Tensor, bits: int, width: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """Unpack codes along the last dimension: the inverse of `pack`.

    Args:
        packed: [..., packed_width(width, bits)] uint8.
        width: K, the number of codes in a row.
        backend: as `pack`.
    Returns: [..., K] uint8.
    Raises: ValueError if the packed row length does not fit `width` and `bits`, or TRITON is asked for where it cannot run.
    """
    layout.check_packed(packed, bits, width)
    if not use_triton(backend, packed):
        return layout.unpack(packed, bits, width)
    from kernels.packing import kernel

    return kernel.unpack(packed, bits, width)

"""The place of each bit in a packed row, and packing and unpacking in plain torch.

A code of b bits is split into planes of 4, 2 and 1 bits (3 = 2 + 1, 5 = 4 + 1, ...; 8 is one plane), so that every
width costs exactly b bits per code. In a plane of w bits, one byte holds elements j, j + n, j + 2n, ... of the row,
n being the number of bytes. As these are not neighbours in the row, unpacking is a shift and a mask of whole registers,
without interleaving.

    4 bits, 6 codes a b c d e f  ->  bytes  d<<4|a   e<<4|b   f<<4|c

Rows whose width is not a multiple of 8 / w are padded with zero codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planes(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes of a code of `bits` bits, low bits first. Raises: ValueError outside 1..8."""
    if bits not in _PLANES:
        raise ValueError(f"{bits}-bit codes cannot be packed: use 1 to 8 bits")
    return _PLANES[bits]


def packed_width(width: int, bits: int) -> int:
    """Count the bytes of one packed row of `width` codes of `bits` bits (1 to 8)."""
    return sum(-(-width * plane // 8) for plane in planes(bits))


def check(codes: Tensor, bits: int) -> None:
    """Raise ValueError unless `codes` are uint8 and `bits` is 1 to 8."""
    planes(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}; pack takes torch.uint8")


def check_packed(packed: Tensor, bits: int, width: int) -> None:
    """Raise ValueError unless rows of `packed` hold `width` codes of `bits` bits."""
    if packed.shape[-1] != packed_width(width, bits):
        raise ValueError(f"a row of {width} {bits}-bit codes takes {packed_width(width, bits)} bytes, not {packed.shape[-1]}")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack [..., K] uint8 -> [..., packed_width(K, bits)] uint8 in plain torch."""
    packed, shift = [], 0
    for plane in planes(bits):
        part = (codes >> shift) & (2**plane - 1)
        packed.append(_pack_plane(part, plane))
        shift += plane
    return torch.cat(packed, dim=-1).contiguous()


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unpack [..., packed_width(width, bits)] uint8 -> [..., width] uint8 in plain torch."""
    codes, shift, start = None, 0, 0
    for plane in planes(bits):
        size = -(-width * plane // 8)
        part = _unpack_plane(packed[..., start : start + size], plane, width)
        codes = part if codes is None else codes | (part << shift)
        shift, start = shift + plane, start + size
    return codes


def _pack_plane(part: Tensor, plane: int) -> Tensor:
    per_byte = 8 // plane
    if per_byte == 1:
        return part
    width = part.shape[-1]
    size = -(-width // per_byte)
    part = torch.nn.functional.pad(part, (0, size * per_byte - width))
    part = part.unflatten(-1, (per_byte, size))  # [..., per_byte, size]
    packed = part[..., 0, :].clone()
    for i in range(1, per_byte):
        packed |= part[..., i, :] << (plane * i)
    return packed


def _unpack_plane(packed: Tensor, plane: int, width: int) -> Tensor:
    per_byte = 8 // plane
    if per_byte == 1:
        return packed
    mask = 2**plane - 1
    parts = [(packed >> (plane * i)) & mask if i else packed & mask for i in range(per_byte)]
    return torch.cat(parts, dim=-1)[..., :width]

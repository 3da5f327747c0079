"""Rotary positions, reorder and scaling in one pass, stored in float, on a grid, or as packed codes.

    r[e] = x[e] cos[e] + rot(x)[e] sin[e]        rot(x)[e] = -x[e + E/2] in the first half, x[e - E/2] in the second
    y[j] = r[order[j]] · scaling                 order per key head (R2 of RPTQ, arXiv:2304.01089): the pairs are rotated before

Stored as y; as ŷ = s (clamp(round(y / s) + z, 0, 2**bits - 1) - z), for queries; or as those codes, packed as `kernels.packing`
does, for keys, straight into their slots. s and z are given per head and channel. The reorder is a gather from the row in cache.
Cost: x, cos and sin read once, y or its bytes written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._triton import next_power, round_even, tl, triton, use_triton
from kernels.backend import Backend
from kernels.pack_kernels import WIDTHS
from kernels.packing import pack, packed_width
from kernels.quantize import fake_quantize, quantize


@dataclass(frozen=True)
class HeadGrid:
    """Static grid of heads: `scale`, `zero_point` [H, E] float32 for codes 0 … 2**bits - 1."""

    bits: int
    scale: Tensor
    zero_point: Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, order: Tensor | None, scaling: float) -> Tensor:
    """Reference of y: [B, H, T, E] float32."""
    x = x.to(torch.float32)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    y = x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
    if order is not None:
        wide = order.to(torch.int64).repeat_interleave(x.shape[1] // len(order), dim=0)
        y = torch.gather(y, 3, wide[None, :, None, :].expand_as(y))
    return y * scaling


@triton.jit
def _rotated(x, cos, sin, order, k, mask, scaling, HALF: tl.constexpr, ORDERED: tl.constexpr):
    """Entries k of rotated rows that begin at x; k is [1, columns], the pointers are [rows, 1]."""
    e = tl.load(order + k, mask=mask, other=0) if ORDERED else k
    upper = e >= HALF
    partner = tl.where(upper, e - HALF, e + HALF)
    mine = tl.load(x + e, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=mask, other=0.0).to(tl.float32)
    turned = tl.where(upper, other, -other)
    c, s = tl.load(cos + e, mask=mask, other=0.0).to(tl.float32), tl.load(sin + e, mask=mask, other=0.0).to(tl.float32)
    return (mine * c + turned * s) * scaling


@triton.jit
def _level(y, scale, zero, k, mask, BITS: tl.constexpr):
    """(code - zero point, scale, zero point) of entries k."""
    s = tl.load(scale + k, mask=mask, other=1.0)
    z = tl.load(zero + k, mask=mask, other=0.0)
    return round_even(tl.minimum(tl.maximum(tl.div_rn(y, s), -z), (2.0**BITS - 1.0) - z)), s, z


@triton.jit
def _plane(
    x, cos, sin, order, scale, zero, out, inside, scaling,
    E: tl.constexpr, ORDERED: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, START: tl.constexpr,
    SIZE: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, BJ)[None, :]
    byte = (inside & (j < 0)).to(tl.int32)  # zeros [rows, BJ]
    for i in tl.static_range(8 // WIDTH):
        k = j + i * SIZE
        mask = inside & (k < E) & (j < SIZE)
        level, s, z = _level(_rotated(x, cos, sin, order, k, mask, scaling, E // 2, ORDERED), scale, zero, k, mask, BITS)
        code = tl.where(mask, (level + z).to(tl.int32), 0)
        byte |= ((code >> SHIFT) & (2**WIDTH - 1)) << (WIDTH * i)
    tl.store(out + START + j, byte.to(tl.uint8), mask=inside & (j < SIZE))


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, order_ptr, scale_ptr, zero_ptr, out_ptr,
    ROWS, H, T, GROUP, xb, xh, xt, cb, ct, ob, oh, ot, scaling,
    E: tl.constexpr, ORDERED: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None]
    inside = row < ROWS
    t, h, b = row % T, (row // T) % H, (row // T // H).to(tl.int64)
    x = x_ptr + b * xb + h * xh + t * xt
    cos, sin = cos_ptr + b * cb + t * ct, sin_ptr + b * cb + t * ct
    order, scale, zero = order_ptr, scale_ptr, zero_ptr
    if ORDERED:
        order = order_ptr + (h // GROUP) * E
    if BITS > 0:
        scale, zero = scale_ptr + h * E, zero_ptr + h * E
    out = out_ptr + b * ob + h * oh + t * ot
    if PACKED:
        if BITS == 3:
            _plane(x, cos, sin, order, scale, zero, out, inside, scaling, E, ORDERED, BITS, 2, 0, 0, (E * 2 + 7) // 8, BE)
            _plane(
                x, cos, sin, order, scale, zero, out, inside, scaling, E, ORDERED, BITS, 1, 2, (E * 2 + 7) // 8, (E + 7) // 8, BE
            )
        else:
            _plane(x, cos, sin, order, scale, zero, out, inside, scaling, E, ORDERED, BITS, BITS, 0, 0, (E * BITS + 7) // 8, BE)
    else:
        k = tl.arange(0, BE)[None, :]
        mask = inside & (k < E)
        y = _rotated(x, cos, sin, order, k, mask, scaling, E // 2, ORDERED)
        if BITS > 0:
            level, s, z = _level(y, scale, zero, k, mask, BITS)
            y = level * s
        tl.store(out + k, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, order: Tensor | None, grid: HeadGrid | None, packed: bool, scaling: float
) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, dim = x.shape
    order = None if order is None else order.to(torch.int32).contiguous()
    columns = next_power(-(-dim * (2 if grid.bits == 3 else grid.bits) // 8) if packed else dim)
    rows = max(1, 1024 // columns)
    _rope_kernel[(triton.cdiv(batch * heads * tokens, rows),)](
        x, cos, sin, order, *((None, None) if grid is None else (grid.scale.contiguous(), grid.zero_point.contiguous())), out,
        batch * heads * tokens, heads, tokens, 1 if order is None else heads // len(order), *x.stride()[:3],
        0 if len(cos) == 1 else cos.stride(0), cos.stride(1), *out.stride()[:3], scaling,
        E=dim, ORDERED=order is not None, BITS=0 if grid is None else grid.bits, PACKED=packed, BR=rows, BE=columns,
        enable_fp_fusion=False,
    )  # fmt: skip


def rope_store(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    order: Tensor | None = None,
    scaling: float = 1.0,
    grid: HeadGrid | None = None,
    packed: bool = False,
    out: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Rotate and store heads.

    Args:
        x: [B, H, T, E] floating, E even, any strides.
        cos, sin: [B or 1, T, E].
        order: [Hkv, E] or [H, E] integer, or None.
        grid: static grid of the heads, or None for float.
        packed: store codes, packed; needs a grid of 2, 3, 4 or 8 bits in the kernel, 1 to 8 in the reference.
        out: [B, H, T, packed_width(E, bits)] uint8 to fill, a slice of a cache for example; only where packed.
        backend: AUTO takes Triton for CUDA tensors.
    Returns: [B, H, T, E] in x's type, or the packed rows. Both paths give the same bits up to the rounding of x's type.
    Raises: ValueError if options exclude each other, or TRITON is asked for where it cannot run.
    """
    if packed and grid is None or out is not None and not packed:
        raise ValueError("packed rows need a grid, and only they can be written into slots")
    if x.shape[-1] % 2:
        raise ValueError(f"heads of {x.shape[-1]} channels cannot be rotated: an even number is needed")
    obstacle = f"codes of {grid.bits} bits have no kernel" if packed and grid.bits not in WIDTHS else None
    if use_triton(backend, x, obstacle=obstacle) and x.numel():
        if out is None:
            width, dtype = (packed_width(x.shape[-1], grid.bits), torch.uint8) if packed else (x.shape[-1], x.dtype)
            out = torch.empty(*x.shape[:3], width, dtype=dtype, device=x.device)
        _launch(x, cos, sin, out, order, grid, packed, scaling)
        return out
    y = rotated(x, cos, sin, order, scaling)
    if grid is None:
        return y.to(x.dtype)
    scale, zero, top = grid.scale[:, None], grid.zero_point[:, None], 2**grid.bits - 1
    if not packed:
        return fake_quantize(y, scale, -zero, top - zero).to(x.dtype)
    rows = pack(quantize(y, scale, zero, 0, top).to(torch.uint8), grid.bits)
    return rows if out is None else out.copy_(rows)

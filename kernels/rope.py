"""Rotate heads by position, reorder and scale them in one pass, and store them in float or quantised.

    r[e] = x[e] cos[e] + rot(x)[e] sin[e]        rot(x)[e] = -x[e + E/2] in the first half, x[e - E/2] in the second
    y[j] = r[order[j]] · scaling                 order per key head (R2 of RPTQ, arXiv:2304.01089), applied after the rotation

Stored as y, or as ŷ = s (clamp(round(y / s) + z, 0, 2**bits - 1) - z), for queries; s and z are given per head and channel. The
reorder is a gather from the row in cache. Cost: x, cos and sin read once, y written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._triton import next_power, on_its_device, round_even, rows_strided, tl, triton
from kernels.backend import Backend, use_triton
from kernels.codes import fake_quantize


@dataclass(frozen=True)
class HeadGrid:
    """Static grid of heads.

    Attributes:
        bits: 2 to 8; codes are unsigned, 0 … 2**bits - 1.
        scale, zero_point: [H, E] float32.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, order: Tensor | None, scaling: float) -> Tensor:
    """Compute y by torch: [B, H, T, E] float32."""
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
    """Compute entries k of rotated rows that begin at x; k is [1, columns], the pointers are [rows, 1]."""
    e = tl.load(order + k, mask=mask, other=0) if ORDERED else k
    upper = e >= HALF
    partner = tl.where(upper, e - HALF, e + HALF)
    mine = tl.load(x + e, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=mask, other=0.0).to(tl.float32)
    turned = tl.where(upper, other, -other)
    c, s = tl.load(cos + e, mask=mask, other=0.0).to(tl.float32), tl.load(sin + e, mask=mask, other=0.0).to(tl.float32)
    return (mine * c + turned * s) * scaling


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, order_ptr, scale_ptr, zero_ptr, out_ptr,
    ROWS, H, T, GROUP, xb, xh, xt, cb, ct, scaling,
    E: tl.constexpr, ORDERED: tl.constexpr, BITS: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None]
    inside = row < ROWS
    t, h, b = (row % T).to(tl.int64), (row // T) % H, (row // T // H).to(tl.int64)
    x = x_ptr + b * xb + h.to(tl.int64) * xh + t * xt
    cos, sin = cos_ptr + b * cb + t * ct, sin_ptr + b * cb + t * ct
    order = order_ptr
    if ORDERED:
        order = order_ptr + (h // GROUP) * E
    k = tl.arange(0, BE)[None, :]
    mask = inside & (k < E)
    y = _rotated(x, cos, sin, order, k, mask, scaling, E // 2, ORDERED)
    if BITS > 0:
        s = tl.load(scale_ptr + h * E + k, mask=mask, other=1.0)
        z = tl.load(zero_ptr + h * E + k, mask=mask, other=0.0)
        y = round_even(tl.minimum(tl.maximum(tl.div_rn(y, s), -z), (2.0**BITS - 1.0) - z)) * s
    tl.store(out_ptr + row.to(tl.int64) * E + k, y.to(out_ptr.dtype.element_ty), mask=mask)


@on_its_device
def _launch(x: Tensor, cos: Tensor, sin: Tensor, order: Tensor | None, grid: HeadGrid | None, scaling: float) -> Tensor:
    x = rows_strided(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, dim = x.shape
    columns = next_power(dim)
    rows = max(1, 1024 // columns)
    _rope_kernel[(triton.cdiv(batch * heads * tokens, rows),)](
        x, cos, sin, None if order is None else order.contiguous(),
        *((None, None) if grid is None else (grid.scale.contiguous(), grid.zero_point.contiguous())), out,
        batch * heads * tokens, heads, tokens, 1 if order is None else heads // len(order), *x.stride()[:3],
        0 if len(cos) == 1 else cos.stride(0), cos.stride(1), scaling,
        E=dim, ORDERED=order is not None, BITS=0 if grid is None else grid.bits, BR=rows, BE=columns, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def rope_store(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    order: Tensor | None = None,
    scaling: float = 1.0,
    grid: HeadGrid | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Rotate, reorder and scale heads.

    Args:
        x: [B, H, T, E] floating, E even, any strides.
        cos, sin: [B or 1, T, E].
        order: [Hkv, E] or [H, E] int32, or None.
        scaling: multiplies every entry.
        grid: static grid of the heads, or None for float.
        backend: AUTO takes Triton for CUDA tensors.
    Returns: [B, H, T, E] in x's type, contiguous. Both paths give the same bits up to the rounding of x's type.
    Raises: ValueError for an odd E, or if TRITON is asked for where it cannot run.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"heads of {x.shape[-1]} channels cannot be rotated: an even number is needed")
    if use_triton(backend, x) and x.numel():
        return _launch(x, cos, sin, order, grid, scaling)
    y = rotated(x, cos, sin, order, scaling)
    if grid is None:
        return y.to(x.dtype)
    scale, zero = grid.scale[:, None], grid.zero_point[:, None]
    return fake_quantize(y, scale, -zero, 2**grid.bits - 1 - zero).to(x.dtype)

"""The Triton kernels of `kernels.packing`: pack, quantise and pack at once, and unpack, at 1 to 8 bits.

    STATIC   u = clamp(round(x / s) + z, 0, 2**bits - 1)                  s, z given per head and channel
    DYNAMIC  u = clamp(round(x / s), -Q, Q) + Q + 1, s = max |x| / Q      Q = 2**(bits-1) - 1, s per row, kept in float16

Byte j of a plane of w bits holds elements j, j + n, j + 2n, ...: a program takes whole rows, so that further planes (3 = 2 + 1
bits) and the maximum of DYNAMIC read x from the cache. Rows are [A, B, T, K] with any strides but the last, for x and out, so
that new keys and values are written directly to their slots. Cost: x read once, bits / 8 bytes written per element.
Sources: RPTQ (arXiv:2304.01089) for STATIC; BitNet a4.8 (arXiv:2411.04965), section 2.3, for DYNAMIC.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import next_power, on_its_device, round_even, rows_strided, tl, tl_code_offset, triton
from kernels.codes import LARGEST_SCALE, SMALLEST_SCALE
from kernels.packing.layout import packed_width, planes

CODES, STATIC, DYNAMIC = 0, 1, 2
CODES_, STATIC_, DYNAMIC_ = tl.constexpr(CODES), tl.constexpr(STATIC), tl.constexpr(DYNAMIC)  # as kernels read them
SMALLEST_, LARGEST_ = tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE)


@triton.jit
def _plane(
    x, scale_ptr, zero_ptr, dynamic, out, K, inside,
    MODE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, first, BJ: tl.constexpr,
):  # fmt: skip
    """Store bytes `first` … `first` + BJ of the plane of WIDTH bits from SHIFT on, which begins at `out`."""
    size = (K * WIDTH + 7) // 8
    j = first + tl.arange(0, BJ)
    byte = tl.zeros((inside.shape[0], BJ), tl.int32)
    for i in tl.static_range(8 // WIDTH):
        k = j + i * size
        mask = inside[:, None] & ((k < K) & (j < size))[None, :]
        v = tl.load(x[:, None] + k[None, :], mask=mask, other=0)
        if MODE != CODES_:
            v = v.to(tl.float32)
            if MODE == STATIC_:
                s = tl.load(scale_ptr[:, None] + k[None, :], mask=mask, other=1.0)
                z = tl.load(zero_ptr[:, None] + k[None, :], mask=mask, other=0.0)
                low, high = -z, (2**BITS - 1) - z
            else:
                s = dynamic[:, None]
                z = tl_code_offset(BITS)
                low, high = 1.0 - z, z - 1.0
            v = round_even(tl.minimum(tl.maximum(tl.div_rn(v, s), low), high)) + z
        code = tl.where(mask, v.to(tl.int32), 0)
        byte |= ((code >> SHIFT) & (2**WIDTH - 1)) << (WIDTH * i)
    tl.store(out[:, None] + j[None, :], byte.to(tl.uint8), mask=inside[:, None] & (j < size)[None, :])


@triton.jit
def _pack_kernel(
    x_ptr, scale_ptr, zero_ptr, out_ptr, row_scale_ptr, slot_ptr,
    ROWS, B, T, K, xa, xb, xt, oa, ob, ot, sa, sb, st, scale_b,
    MODE: tl.constexpr, BITS: tl.constexpr, AT_SLOT: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    first = tl.program_id(1) * BJ
    inside = row < ROWS
    t = (row % T).to(tl.int64)
    b = ((row // T) % B).to(tl.int64)
    a = (row // T // B).to(tl.int64)
    slot = t
    if AT_SLOT:
        slot += tl.load(slot_ptr)
    x = x_ptr + a * xa + b * xb + t * xt
    out = out_ptr + a * oa + b * ob + slot * ot
    scale, zero, dynamic = scale_ptr, zero_ptr, 1.0
    if MODE == STATIC_:
        scale, zero = scale_ptr + b * scale_b, zero_ptr + b * scale_b
    if MODE == DYNAMIC_:
        k = tl.arange(0, BK)
        v = tl.load(x[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        dynamic = tl.div_rn(tl.max(tl.abs(v), axis=1), tl_code_offset(BITS) - 1.0)
        half = tl.minimum(tl.maximum(dynamic, SMALLEST_), LARGEST_).to(tl.float16)
        tl.store(row_scale_ptr + a * sa + b * sb + slot * st, half, mask=inside)
        dynamic = half.to(tl.float32)
    if BITS == 8:
        _plane(x, scale, zero, dynamic, out, K, inside, MODE, BITS, 8, 0, first, BJ)
    if BITS < 8 and BITS >= 4:
        _plane(x, scale, zero, dynamic, out, K, inside, MODE, BITS, 4, 0, first, BJ)
        out += (K * 4 + 7) // 8
    if BITS % 4 >= 2:
        _plane(x, scale, zero, dynamic, out, K, inside, MODE, BITS, 2, BITS // 4 * 4, first, BJ)
        out += (K * 2 + 7) // 8
    if BITS % 2 == 1:
        _plane(x, scale, zero, dynamic, out, K, inside, MODE, BITS, 1, BITS // 2 * 2, first, BJ)


@triton.jit
def _bits_of(row, k, mask, size: tl.constexpr, WIDTH: tl.constexpr):
    """Read element k of one plane: byte k mod size, bits from w (k div size) on."""
    byte = tl.load(row + k % size, mask=mask, other=0).to(tl.int32)
    return (byte >> (WIDTH * (k // size))) & (2**WIDTH - 1)


@triton.jit
def _low_planes(row, k, mask, K: tl.constexpr, BITS: tl.constexpr):
    """Read codes of 1 to 3 bits."""
    if BITS == 1:
        return _bits_of(row, k, mask, (K + 7) // 8, 1)
    code = _bits_of(row, k, mask, (K * 2 + 7) // 8, 2)
    if BITS == 3:
        code |= _bits_of(row + (K * 2 + 7) // 8, k, mask, (K + 7) // 8, 1) << 2
    return code


@triton.jit
def unpacked(row: tl.tensor, k: tl.tensor, mask: tl.tensor, K: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Read codes k (int32) of packed rows that begin at `row`; shapes broadcast, and K is the row's number of codes."""
    if BITS == 8:
        return _bits_of(row, k, mask, K, 8)
    if BITS < 4:
        return _low_planes(row, k, mask, K, BITS)
    code = _bits_of(row, k, mask, (K * 4 + 7) // 8, 4)
    if BITS > 4:
        code |= _low_planes(row + (K * 4 + 7) // 8, k, mask, K, BITS - 4) << 4
    return code


@triton.jit
def _unpack_kernel(packed_ptr, out_ptr, ROWS, ROW_BYTES, K: tl.constexpr, BITS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (row < ROWS)[:, None] & (k < K)[None, :]
    code = unpacked(packed_ptr + row.to(tl.int64)[:, None] * ROW_BYTES, k[None, :], mask, K, BITS)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * K + k[None, :], code.to(tl.uint8), mask=mask)


@on_its_device
def launch_pack(
    x: Tensor,
    out: Tensor,
    *,
    bits: int,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    row_scale: Tensor | None = None,
    slot: Tensor | None = None,
) -> None:
    """Pack rows of x into `out`: codes as they are, STATIC or DYNAMIC by which of the scales is given.

    Args:
        x: [A, B, T, K], uint8 codes or floating, unit stride along K.
        out: [A, B, S, packed_width(K, bits)] uint8, unit stride along the last dimension; S >= T.
        scale, zero_point: STATIC: [1 or B, K] float32, contiguous.
        row_scale: DYNAMIC: [A, B, S, 1] float16, written.
        slot: [1] int32, index in S of the first row; 0 if None. A tensor, so that a replayed graph can write to the next one.
    """
    (a, b, t, k), mode = x.shape, CODES if scale is row_scale is None else STATIC if scale is not None else DYNAMIC
    if x.numel() == 0:
        return
    size = -(-k * planes(bits)[0] // 8)  # bytes of the widest plane
    block = min(next_power(size), 1024)
    rows = max(1, 2048 // next_power(k))
    like = out if row_scale is None else row_scale
    _pack_kernel[(triton.cdiv(a * b * t, rows), triton.cdiv(size, block))](
        x, scale, zero_point, out, row_scale, slot, a * b * t, b, t, k, *x.stride()[:3], *out.stride()[:3], *like.stride()[:3],
        0 if scale is None or len(scale) == 1 else k,
        MODE=mode, BITS=bits, AT_SLOT=slot is not None, BR=rows, BJ=block, BK=next_power(k), enable_fp_fusion=False,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """View [..., K] as [1, 1, R, K], copied only where strides do not allow a view."""
    return (x if x.shape[-1] == 1 else rows_strided(x)).reshape(1, 1, -1, x.shape[-1])


@on_its_device
def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack [..., K] uint8 -> [..., packed_width(K, bits)] uint8."""
    out = torch.empty(*codes.shape[:-1], packed_width(codes.shape[-1], bits), dtype=torch.uint8, device=codes.device)
    launch_pack(_rows(codes), _rows(out), bits=bits)
    return out


@on_its_device
def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unpack [..., packed_width(width, bits)] uint8 -> [..., width] uint8."""
    out = torch.empty(*packed.shape[:-1], width, dtype=torch.uint8, device=packed.device)
    rows = out.numel() // max(width, 1)
    if rows:
        block = min(next_power(width), 1024)
        per = max(1, 2048 // block)
        _unpack_kernel[(triton.cdiv(rows, per), triton.cdiv(width, block))](
            packed.contiguous(), out, rows, packed.shape[-1], K=width, BITS=bits, BR=per, BK=block
        )
    return out

"""Quantise and pack in one pass, and unpack, at 2, 3, 4 and 8 bits: the Triton side of `kernels.packing`, the same bytes.

    STATIC   u = clamp(round(x / s) + z, 0, 2**bits - 1)                  s, z given per head and channel
    DYNAMIC  u = clamp(round(x / s), -Q, Q) + Q + 1, s = max |x| / Q      Q = 2**(bits-1) - 1, s per row, kept in float16

Byte j of a plane of w bits holds elements j, j + n, j + 2n, ...: a program takes whole rows, so that a second plane (3 bits) and
the maximum of DYNAMIC read x from the cache. Rows are [A, B, T, K] with any strides but the last, on both sides, so that new keys
and values go straight into their slots. Cost: x read once, bits / 8 bytes written per element.
Sources: RPTQ (arXiv:2304.01089) for STATIC; BitNet a4.8 (arXiv:2411.04965), section 2.3, for DYNAMIC.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import packing
from kernels._triton import next_power, round_even, tl, triton, use_triton
from kernels.backend import Backend
from kernels.quantize import quantize

WIDTHS = (2, 3, 4, 8)
CODES, STATIC, DYNAMIC = 0, 1, 2
SMALLEST, LARGEST = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
CODES_, STATIC_, DYNAMIC_ = tl.constexpr(CODES), tl.constexpr(STATIC), tl.constexpr(DYNAMIC)  # as kernels read them
SMALLEST_, LARGEST_ = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)


def row_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Reference of DYNAMIC: codes of x [..., K] uint8 and their scale [..., 1] float16."""
    largest = 2 ** (bits - 1) - 1
    scale = (x.to(torch.float32).abs().amax(-1, keepdim=True) / largest).clamp(SMALLEST, LARGEST).to(torch.float16)
    codes = (x / scale.to(torch.float32)).round_().clamp_(-largest, largest).add_(largest + 1)
    return codes.to(torch.uint8), scale


@triton.jit
def _plane(
    x, scale_ptr, zero_ptr, dynamic, out, K, inside,
    MODE: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, START, first, BJ: tl.constexpr,
):  # fmt: skip
    """Store BJ bytes of one plane of WIDTH bits, which begins START bytes into the packed row."""
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
                z = 2.0 ** (BITS - 1)
                low, high = 1.0 - z, z - 1.0
            v = round_even(tl.minimum(tl.maximum(tl.div_rn(v, s), low), high)) + z
        code = tl.where(mask, v.to(tl.int32), 0)
        byte |= ((code >> SHIFT) & (2**WIDTH - 1)) << (WIDTH * i)
    tl.store(out[:, None] + START + j[None, :], byte.to(tl.uint8), mask=inside[:, None] & (j < size)[None, :])


@triton.jit
def _pack_kernel(
    x_ptr, scale_ptr, zero_ptr, out_ptr, row_scale_ptr, slot_ptr,
    ROWS, B, T, K, xa, xb, xt, oa, ob, ot, sa, sb, st, scale_b,
    MODE: tl.constexpr, BITS: tl.constexpr, AT_SLOT: tl.constexpr, BR: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    first = tl.program_id(1) * BJ
    inside = row < ROWS
    t = row % T
    b = (row // T) % B
    a = (row // T // B).to(tl.int64)
    slot = t
    if AT_SLOT:
        slot += tl.load(slot_ptr)
    x = x_ptr + a * xa + b * xb + t * xt
    out = out_ptr + a * oa + b * ob + slot.to(tl.int64) * ot
    scale, zero, dynamic = scale_ptr, zero_ptr, 1.0
    if MODE == STATIC_:
        scale, zero = scale_ptr + b * scale_b, zero_ptr + b * scale_b
    if MODE == DYNAMIC_:
        k = tl.arange(0, BK)
        v = tl.load(x[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        dynamic = tl.div_rn(tl.max(tl.abs(v), axis=1), 2.0 ** (BITS - 1) - 1.0)
        half = tl.minimum(tl.maximum(dynamic, SMALLEST_), LARGEST_).to(tl.float16)
        tl.store(row_scale_ptr + a * sa + b * sb + slot * st, half, mask=inside)
        dynamic = half.to(tl.float32)
    if BITS == 3:
        _plane(x, scale, zero, dynamic, out, K, inside, MODE, BITS, 2, 0, 0, first, BJ)
        _plane(x, scale, zero, dynamic, out, K, inside, MODE, BITS, 1, 2, (K * 2 + 7) // 8, first, BJ)
    else:
        _plane(x, scale, zero, dynamic, out, K, inside, MODE, BITS, BITS, 0, 0, first, BJ)


@triton.jit
def _bits_of(row, k, mask, size: tl.constexpr, WIDTH: tl.constexpr):
    """Element k of one plane: byte k mod size, bits from w (k div size)."""
    byte = tl.load(row + k % size, mask=mask, other=0).to(tl.int32)
    return (byte >> (WIDTH * (k // size))) & (2**WIDTH - 1)


@triton.jit
def unpacked(row: tl.tensor, k: tl.tensor, mask: tl.tensor, K: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Codes k (int32) of packed rows that begin at `row`; shapes broadcast, and K is the row's number of codes."""
    if BITS == 3:
        return _bits_of(row, k, mask, (K * 2 + 7) // 8, 2) | (_bits_of(row + (K * 2 + 7) // 8, k, mask, (K + 7) // 8, 1) << 2)
    return _bits_of(row, k, mask, (K * BITS + 7) // 8, BITS)


@triton.jit
def _unpack_kernel(packed_ptr, out_ptr, ROWS, ROW_BYTES, K: tl.constexpr, BITS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (row < ROWS)[:, None] & (k < K)[None, :]
    code = unpacked(packed_ptr + row.to(tl.int64)[:, None] * ROW_BYTES, k[None, :], mask, K, BITS)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * K + k[None, :], code.to(tl.uint8), mask=mask)


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
    """Pack rows of x into `out`; codes, STATIC or DYNAMIC by which of the scales is given.

    Args:
        x: [A, B, T, K], uint8 codes or floating, unit stride along K.
        out: [A, B, S, packed_width(K, bits)] uint8, unit stride along the last dimension; S >= T.
        scale, zero_point: STATIC: [1 or B, K] float32, contiguous.
        row_scale: DYNAMIC: [A, B, S, 1] float16, written.
        slot: [1] int32, where in S the first row goes; 0 if None. A tensor, so that a captured graph can move on.
    """
    (a, b, t, k), mode = x.shape, CODES if scale is row_scale is None else STATIC if scale is not None else DYNAMIC
    if x.numel() == 0:
        return
    widest = 2 if bits == 3 else bits
    size = -(-k * widest // 8)
    block = min(next_power(size), 1024)
    rows = max(1, 1024 // block)
    like = out if row_scale is None else row_scale
    _pack_kernel[(triton.cdiv(a * b * t, rows), triton.cdiv(size, block))](
        x, scale, zero_point, out, row_scale, slot, a * b * t, b, t, k, *x.stride()[:3], *out.stride()[:3], *like.stride()[:3],
        0 if scale is None or len(scale) == 1 else k,
        MODE=mode, BITS=bits, AT_SLOT=slot is not None, BR=rows, BJ=block, BK=next_power(k), enable_fp_fusion=False,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [1, 1, R, K]; a view where strides allow it."""
    return (
        x.reshape(1, 1, -1, x.shape[-1]) if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous().view(1, 1, -1, x.shape[-1])
    )


def obstacle(bits: int) -> str | None:
    """Why the kernels cannot take codes of `bits` bits, None if they can."""
    return None if bits in WIDTHS else f"codes of {bits} bits have no kernel"


def pack(codes: Tensor, bits: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """`kernels.packing.pack`: [..., K] uint8 -> [..., packed_width(K, bits)] uint8."""
    if codes.dtype is not torch.uint8 or not use_triton(backend, codes, obstacle=obstacle(bits)):
        return packing.pack_reference(codes, bits)
    out = torch.empty(*codes.shape[:-1], packing.packed_width(codes.shape[-1], bits), dtype=torch.uint8, device=codes.device)
    launch_pack(_rows(codes), _rows(out), bits=bits)
    return out


def unpack(packed: Tensor, bits: int, width: int, *, backend: Backend = Backend.AUTO) -> Tensor:
    """`kernels.packing.unpack`: [..., packed_width(width, bits)] uint8 -> [..., width] uint8."""
    fits = packed.shape[-1] == packing.packed_width(width, bits)
    if not fits or not use_triton(backend, packed, obstacle=obstacle(bits)):
        return packing.unpack_reference(packed, bits, width)
    out = torch.empty(*packed.shape[:-1], width, dtype=torch.uint8, device=packed.device)
    rows = out.numel() // max(width, 1)
    if rows:
        block = min(next_power(width), 1024)
        per = max(1, 2048 // block)
        _unpack_kernel[(triton.cdiv(rows, per), triton.cdiv(width, block))](
            packed.contiguous(), out, rows, packed.shape[-1], K=width, BITS=bits, BR=per, BK=block
        )
    return out


def quantize_pack(x: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, backend: Backend = Backend.AUTO) -> Tensor:
    """Quantise with given scales and pack.

    Args:
        x: [..., K] floating.
        scale, zero_point: [K] or one value; scale > 0, zero_point in codes 0 … 2**bits - 1 or beyond, integral.
        bits: 2 to 8; the kernel takes 2, 3, 4 and 8.
    Returns: [..., packed_width(K, bits)] uint8.
    Raises: ValueError if TRITON is asked for where it cannot run.
    """
    scale, zero_point = scale.to(torch.float32).reshape(-1), zero_point.to(torch.float32).reshape(-1)
    if not use_triton(backend, x, obstacle=obstacle(bits)):
        codes = quantize(x.to(torch.float32), scale, zero_point, 0, 2**bits - 1)
        return packing.pack_reference(codes.to(torch.uint8), bits)
    width = x.shape[-1]
    out = torch.empty(*x.shape[:-1], packing.packed_width(width, bits), dtype=torch.uint8, device=x.device)
    wide = [t.expand(width).contiguous().view(1, width) for t in (scale, zero_point)]
    launch_pack(_rows(x), _rows(out), bits=bits, scale=wide[0], zero_point=wide[1])
    return out

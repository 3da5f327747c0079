"""Attend to packed keys and values without unpacking them, for one new token: `decode_attention`.

    STATIC   x = s[h, e] (u - z[h, e])            scales per head and channel, known in advance (RPTQ, arXiv:2304.01089)
    DYNAMIC  x = s[t] (u - code_offset(bits))     one scale per token and head (BitNet a4.8, arXiv:2411.04965, section 2.3)

Static scales are applied outside the inner loop: the keys' scale multiplies q once; their zero point adds the same number to
every score of a query, which softmax ignores; the values' scale and zero point are applied to the sum. Dynamic scales multiply
the score and the probability of their token. With bfloat16 queries OR 0x4300 turns a code of up to 7 bits into 128 + u, and the
zero points grow by 128; l and Σ p are sums of the rounded p of the product, or the constants would not cancel.

The first F tokens (attention sinks; BitNet's first token, which has bits of its own) are given in floating point and added at
the end. Queries that share a key head are tiles of 16 rows. The tokens are split over programs, whose (max, sum, weighted values)
a second kernel merges in a fixed order. Cost: the packed keys and values read once per tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import INTERPRET, matrix_operand, next_power, on_its_device, tl, tl_code_offset, triton
from kernels.backend import Backend, use_triton
from kernels.kv.folded import folded_attention
from kernels.kv.heads import PackedHeads
from kernels.packing import packed_width
from kernels.packing.kernel import unpacked
from kernels.tiles import multiprocessors

QUERIES = 16
"""Rows of a tile of queries: the least number that a matrix instruction takes."""
MAX_DIM = 256
"""Largest number of channels of a head that fits into a program's shared memory."""
SPLIT_TOKENS, MAX_SPLITS = 128, 64
"""Least number of tokens for one program, and largest number of programs for one head."""


def reference(q: Tensor, keys: PackedHeads, values: PackedHeads, slots: int, scaling: float) -> Tensor:
    """Compute the attention by torch: dequantise everything, then softmax(q kᵀ scaling) v in float32."""
    k, v = keys.states(slots), values.states(slots)
    q = q.to(torch.float32).unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, E]
    p = torch.softmax(q @ k.transpose(2, 3) * scaling, dim=-1)
    return (p @ v).flatten(1, 2)


@triton.jit
def _operand(code, BITS: tl.constexpr, dtype: tl.constexpr):
    """Make operands of codes (int32): u, or 128 + u in bfloat16 below 8 bits."""
    if dtype == tl.bfloat16 and BITS < 8:
        return matrix_operand((code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True))
    return _rounded(code.to(tl.float32), dtype)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Convert x to the type of a product's operands: bfloat16 on a GPU, else float32."""
    if INTERPRET:
        return x
    else:
        return x.to(tl.bfloat16) if dtype == tl.bfloat16 else x


@triton.jit(do_not_specialize=["SLOTS", "SPLITS"])  # both change while decoding, and must not compile a kernel for each value
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, k_zero_ptr, v_scale_ptr, v_zero_ptr, k_first_ptr, v_first_ptr, slots_ptr,
    max_ptr, sum_ptr, out_ptr, SLOTS, SPLITS, KV_HEADS, GROUP, scaling,
    kb, kh, kt, vb, vh, vt, ksb, ksh, kst, vsb, vsh, vst,
    E: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, DYNAMIC: tl.constexpr, FIRST: tl.constexpr,
    ON_DEVICE: tl.constexpr, BG: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // KV_HEADS).to(tl.int64), (tl.program_id(0) % KV_HEADS).to(tl.int64)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    key_offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 and KEY_BITS < 8 else 0.0
    value_offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 and VALUE_BITS < 8 else 0.0
    g, e = tl.program_id(2) * BG + tl.arange(0, BG), tl.arange(0, BE)
    query = (batch * KV_HEADS + head) * GROUP + g
    live, channel = g < GROUP, e < E
    q = tl.load(q_ptr + query[:, None] * E + e[None, :], mask=live[:, None] & channel[None, :], other=0.0).to(tl.float32)
    q = q * (scaling * 1.4426950408889634)  # times log2 e: exp(x) becomes exp2, which is one instruction
    # Static key scales multiply q. The keys' zero point adds the same number to all scores of a query, which softmax ignores.
    folded, key_zero, value_zero, value_scale = q, tl_code_offset(KEY_BITS), tl_code_offset(VALUE_BITS), 1.0
    if not DYNAMIC:
        folded = q * tl.load(k_scale_ptr + head * E + e, mask=channel, other=0.0)[None, :]
        value_zero = tl.load(v_zero_ptr + head * E + e, mask=channel, other=0.0)[None, :]
        value_scale = tl.load(v_scale_ptr + head * E + e, mask=channel, other=0.0)[None, :]
    factor = _rounded(folded, dtype)
    factor_sum = tl.sum(factor.to(tl.float32), axis=1)

    # This program's share of the tokens, whole steps of BL; with few tokens the last shares are empty.
    slots = SLOTS
    if ON_DEVICE:
        slots = tl.load(slots_ptr)
    skipped = 0 if DYNAMIC else FIRST
    share = tl.cdiv(tl.cdiv(slots, BL), SPLITS) * BL
    start = tl.program_id(1) * share
    top = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    weighted_sum = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BE), tl.float32)
    for block in range(start, tl.minimum(start + share, slots), BL):
        t = block + tl.arange(0, BL)
        used = (t < slots) & (t >= skipped)
        mask = used[:, None] & channel[None, :]
        k_row = k_ptr + batch * kb + head * kh + t.to(tl.int64)[:, None] * kt
        v_row = v_ptr + batch * vb + head * vh + t.to(tl.int64)[:, None] * vt
        key = _operand(unpacked(k_row, e[None, :], mask, E, KEY_BITS), KEY_BITS, dtype)
        value = _operand(unpacked(v_row, e[None, :], mask, E, VALUE_BITS), VALUE_BITS, dtype)
        score = tl.dot(factor, tl.trans(key), input_precision="tf32x3")
        if DYNAMIC:
            s = tl.load(k_scale_ptr + batch * ksb + head * ksh + t * kst, mask=used, other=0.0).to(tl.float32)
            score = (score - (key_offset + key_zero) * factor_sum[:, None]) * s[None, :]
        # Online softmax: when the maximum rises, the sums so far are multiplied by exp2(old - new). While all scores are -inf,
        # `base` is 0 instead of the maximum: -inf minus -inf would be NaN.
        score = tl.where(used[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(top - base)
        p = tl.exp2(score - base[:, None])
        if DYNAMIC:
            total = total * shrink + tl.sum(p, axis=1)
            s = tl.load(v_scale_ptr + batch * vsb + head * vsh + t * vst, mask=used, other=0.0).to(tl.float32)
            p = p * s[None, :]
        p = _rounded(p, dtype)
        weighted_sum = weighted_sum * shrink + tl.sum(p.to(tl.float32), axis=1)
        acc = tl.dot(p, value, acc * shrink[:, None], input_precision="tf32x3")
        top = higher
    # Σ p v = s (Σ p u - z Σ p): the product is of codes, and scale and zero point are applied to the sums.
    total = total if DYNAMIC else weighted_sum
    acc = value_scale * (acc - (value_offset + value_zero) * weighted_sum[:, None])
    if FIRST > 0:  # noqa: SIM102 (known when compiled)
        if tl.program_id(1) == 0:  # relative to the other scores, which have no zero point and keep the 128
            shift = tl.zeros((BG,), tl.float32)
            if not DYNAMIC:
                zero = tl.load(k_zero_ptr + head * E + e, mask=channel, other=0.0)
                shift = tl.sum(folded * zero[None, :], axis=1) + key_offset * factor_sum
            for block in tl.range(0, FIRST, 16, num_stages=1):
                f = block + tl.arange(0, 16)
                line = ((batch * KV_HEADS + head) * FIRST + f)[:, None] * E + e[None, :]
                mask = (f < FIRST)[:, None] & channel[None, :]
                key = tl.load(k_first_ptr + line, mask=mask, other=0.0).to(tl.float32)
                score = tl.dot(q, tl.trans(key), input_precision="tf32x3") + shift[:, None]
                score = tl.where((f < FIRST)[None, :], score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, axis=1))
                shrink = tl.exp2(top - higher)
                p = tl.exp2(score - higher[:, None])
                total = total * shrink + tl.sum(p, axis=1)
                value = tl.load(v_first_ptr + line, mask=mask, other=0.0).to(tl.float32)
                acc = tl.dot(p, value, acc * shrink[:, None], input_precision="tf32x3")
                top = higher
    # Each program's sums are relative to its own maximum; `_merge_kernel` makes them relative to a common one.
    place = query * SPLITS + tl.program_id(1)
    tl.store(max_ptr + place, top, mask=live)
    tl.store(sum_ptr + place, total, mask=live)
    tl.store(out_ptr + place[:, None] * E + e[None, :], acc, mask=live[:, None] & channel[None, :])


@triton.jit(do_not_specialize=["SPLITS"])
def _merge_kernel(max_ptr, sum_ptr, part_ptr, out_ptr, E, SPLITS, BS: tl.constexpr, BE: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    i, e = tl.arange(0, BS), tl.arange(0, BE)
    top = tl.load(max_ptr + query * SPLITS + i, mask=i < SPLITS, other=float("-inf"))
    weight = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(sum_ptr + query * SPLITS + i, mask=i < SPLITS, other=0.0), axis=0)
    mask = (i < SPLITS)[:, None] & (e < E)[None, :]
    part = tl.load(part_ptr + (query * SPLITS + i)[:, None] * E + e[None, :], mask=mask, other=0.0)
    y = tl.sum(weight[:, None] * part, axis=0) / total
    tl.store(out_ptr + query * E + e, y.to(out_ptr.dtype.element_ty), mask=e < E)


@on_its_device
def launch(q: Tensor, keys: PackedHeads, values: PackedHeads, slots: int | Tensor, scaling: float) -> Tensor:
    """Run both kernels; arguments as `decode_attention`."""
    batch, heads, dim = q.shape
    kv_heads, on_device = keys.packed.shape[1], isinstance(slots, Tensor)
    group, tiles = heads // kv_heads, -(-heads // (kv_heads * QUERIES))
    known = keys.packed.shape[2] if on_device else slots
    filled = -(-2 * multiprocessors(q.device) // (batch * kv_heads * tiles))
    splits = max(1, min(filled, -(-known // SPLIT_TOKENS), MAX_SPLITS))
    new = {"dtype": torch.float32, "device": q.device}
    top, total = torch.empty(batch * heads, splits, **new), torch.empty(batch * heads, splits, **new)
    part = torch.empty(batch * heads, splits, dim, **new)
    dynamic = keys.row_scale is not None
    scales = [h.row_scale if dynamic else h.scale.contiguous() for h in (keys, values)]
    zeros = [None if dynamic else h.zero_point.contiguous() for h in (keys, values)]
    first = [None if h.first is None else h.first.contiguous() for h in (keys, values)]
    strides = [s for h in (keys, values) for s in h.packed.stride()[:3]]
    strides += [s for h in (keys, values) for s in (h.row_scale.stride()[:3] if dynamic else (0, 0, 0))]
    block = max(16, next_power(dim))
    tokens, warps, stages = _tile(dim, q.dtype, (keys.bits, values.bits))
    _attend_kernel[(batch * kv_heads, splits, tiles)](
        q.contiguous(), keys.packed, values.packed, scales[0], zeros[0], scales[1], zeros[1], *first,
        slots if on_device else None, top, total, part, 0 if on_device else slots, splits, kv_heads, group, scaling, *strides,
        E=dim, KEY_BITS=keys.bits, VALUE_BITS=values.bits, DYNAMIC=dynamic, FIRST=keys.first_tokens, ON_DEVICE=on_device,
        BG=QUERIES, BE=block, BL=tokens, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _merge_kernel[(batch * heads,)](top, total, part, out, dim, splits, BS=MAX_SPLITS, BE=block)
    return out


def _tile(dim: int, dtype: torch.dtype, bits: tuple[int, int]) -> tuple[int, int, int]:
    """Choose (tokens per step, warps, stages) within the 99 KiB of shared memory that a program has on consumer GPUs.

    Float32 and float16 queries are multiplied in float32, whose operands take twice the space; codes of several planes are
    loaded plane by plane.
    """
    if dtype is not torch.bfloat16:
        return (32, 4, 2) if dim <= 128 else (16, 8, 1)
    if dim > 128:
        return 32, 8, 2
    return (64, 4, 3) if set(bits) <= {2, 4} else (32, 4, 3)


def unsupported_reason(keys: PackedHeads, values: PackedHeads) -> str | None:
    """Say why the kernel cannot take a cache, None if it can."""
    if keys.dim > MAX_DIM:
        return f"heads of {keys.dim} channels: attention over packed keys takes up to {MAX_DIM}"
    if keys.packed.stride(-1) != 1 or values.packed.stride(-1) != 1:
        return "packed rows are not contiguous"
    return None


def decode_attention(
    q: Tensor, keys: PackedHeads, values: PackedHeads, slots: int | Tensor, *, scaling: float, backend: Backend = Backend.AUTO
) -> Tensor:
    """Compute softmax(q kᵀ scaling) v for one new token that sees all stored ones.

    Args:
        q: [B, H, E] floating, H a multiple of Hkv; head h reads key head h // (H / Hkv).
        keys, values: stored states of the same kind and the same first tokens.
        slots: filled slots of `packed`, or a [1] int32 tensor with them (for captured graphs; Triton only).
        backend: AUTO takes Triton for CUDA tensors, else `folded_attention`; REFERENCE dequantises everything.
    Returns: [B, H, E] in q's type.
    Raises: ValueError if the arguments do not fit each other, or TRITON is asked for where it cannot run.
    """
    width = packed_width(keys.dim, keys.bits)
    if q.shape[-1] != keys.dim or q.shape[1] % keys.packed.shape[1] or keys.packed.shape[-1] != width:
        raise ValueError(f"queries of {tuple(q.shape)} do not fit keys of {keys.packed.shape[1]} heads of {keys.dim} channels")
    if (keys.row_scale is None) != (values.row_scale is None) or keys.first_tokens != values.first_tokens:
        raise ValueError("keys and values are stored in different ways")
    if use_triton(backend, q, unsupported_reason=unsupported_reason(keys, values)):
        return launch(q, keys, values, slots, scaling)
    attend = reference if backend is Backend.REFERENCE else folded_attention
    return attend(q, keys, values, int(slots), scaling).to(q.dtype)

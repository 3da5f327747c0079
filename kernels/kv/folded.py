"""Attend to packed keys and values on CPUs, for one new token, with scales outside the products.

The products use unpacked codes; the dequantised cache is never formed, which takes half the time or less:

    STATIC    scores = (q s_k) u_kᵀ - (q s_k) z_k            y = s_v (p u_v - z_v Σp)
    DYNAMIC   scores = s_k[t] (q u_kᵀ - o Σq)                y = (p s_v) u_v - o Σ(p s_v)         o = code_offset(bits)

The sums run over the tokens that are stored as codes; first tokens in floating point are added to softmax and result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.codes import code_offset
from kernels.kv.heads import PackedHeads
from kernels.packing import unpack


def folded_attention(q: Tensor, keys: PackedHeads, values: PackedHeads, slots: int, scaling: float) -> Tensor:
    """Compute softmax(q kᵀ scaling) v; arguments as `kernels.decode_attention`. Returns: [B, H, E] float32."""
    kv_heads, first = keys.packed.shape[1], keys.first_tokens
    q = (q.to(torch.float32) * scaling).unflatten(1, (kv_heads, -1))  # [B, Hkv, G, E]
    scores = _scores(q, keys, slots)
    if first:
        scores = torch.cat([q @ keys.first.to(torch.float32).transpose(2, 3), scores], dim=-1)
    p = torch.softmax(scores, dim=-1)
    y = _weighted(p[..., first:], values, slots)
    if first:
        y += p[..., :first] @ values.first.to(torch.float32)
    return y.flatten(1, 2)


def _scores(q: Tensor, keys: PackedHeads, slots: int) -> Tensor:
    """Multiply q [B, Hkv, G, E] with the keys that are stored as codes: [B, Hkv, G, S]."""
    codes = _codes(keys, slots).transpose(2, 3)
    if keys.row_scale is not None:
        offset = q.sum(-1, keepdim=True).mul_(code_offset(keys.bits))
        return (q @ codes).sub_(offset).mul_(_row_scale(keys, slots).transpose(2, 3))
    q = q * keys.scale[:, None]
    return (q @ codes).sub_(q @ keys.zero_point[:, :, None])


def _weighted(p: Tensor, values: PackedHeads, slots: int) -> Tensor:
    """Multiply p [B, Hkv, G, S] with the values that are stored as codes: [B, Hkv, G, E]."""
    codes = _codes(values, slots)
    if values.row_scale is not None:
        p = p * _row_scale(values, slots).transpose(2, 3)
        return (p @ codes).sub_(p.sum(-1, keepdim=True).mul_(code_offset(values.bits)))
    return (p @ codes).sub_(p.sum(-1, keepdim=True) * values.zero_point[:, None]).mul_(values.scale[:, None])


def _codes(heads: PackedHeads, slots: int) -> Tensor:
    return unpack(heads.packed[:, :, heads.skipped : slots], heads.bits, heads.dim).to(torch.float32)


def _row_scale(heads: PackedHeads, slots: int) -> Tensor:
    return heads.row_scale[:, :, :slots].to(torch.float32)

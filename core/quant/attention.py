"""Attention with the softmax output on a grid: p̂ = round((2**bits - 1) p) / (2**bits - 1) on [0, 1].

Source: RPTQ's published code quantises the softmax output on the fixed range [0, 1] at 8 bits. Query rows are taken in
blocks, so that a causal mask skips the keys after each block and the score matrix stays in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

QUERY_BLOCK = 128


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, softmax_bits: int = 16) -> Tensor:
    """softmax(q kᵀ scaling + mask) v, the softmax output quantised when `softmax_bits` < 16.

    Args:
        q: [B, H, T, E]; k, v: [B, Hkv, S, E] float, H a multiple of Hkv, S >= T.
        mask: None for causal, or broadcastable to [B, H, T, S]: bool (True = visible) or float (added).
        scaling: multiplies the scores.
    Returns: [B, T, H * E].
    """
    batch, heads, tokens, dim = q.shape
    if softmax_bits >= 16:
        causal = mask is None and tokens > 1
        if causal and k.shape[2] != tokens:
            mask, causal = _causal(tokens, k.shape[2], q.device), False
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=k.shape[1] != heads
        )
    else:
        out = _quantized_softmax(q, k, v, mask, scaling, 2**softmax_bits - 1)
    return out.transpose(1, 2).reshape(batch, tokens, heads * dim)


def _quantized_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, steps: int) -> Tensor:
    batch, heads, tokens, dim = q.shape
    kv_heads, past = k.shape[1], k.shape[2] - tokens
    q = (q * scaling).view(batch, kv_heads, heads // kv_heads, tokens, dim)
    v = v / steps  # carries the 1 / steps of p̂
    out = torch.empty_like(q)
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        seen = past + stop if mask is None else k.shape[2]
        rows = q[:, :, :, start:stop].flatten(2, 3)  # [B, Hkv, G*t, E]
        scores = torch.matmul(rows, k[:, :, :seen].transpose(2, 3)).unflatten(2, (-1, stop - start))
        scores += _block_mask(mask, past, start, stop, seen, scores)
        p = torch.softmax(scores, dim=-1).mul_(steps).round_()
        out[:, :, :, start:stop] = torch.matmul(p.flatten(2, 3), v[:, :, :seen]).unflatten(2, (-1, stop - start))
    return out.view(batch, heads, tokens, dim)


def _block_mask(mask: Tensor | None, past: int, start: int, stop: int, seen: int, like: Tensor) -> Tensor:
    """Additive mask of query rows start..stop over `seen` keys, broadcastable to [B, Hkv, G, t, S]."""
    if mask is None:
        allowed = _causal(stop - start, seen, like.device)
        return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, float("-inf"))
    part = mask[..., start:stop, :seen]
    if part.dtype == torch.bool:
        part = torch.zeros(part.shape, dtype=like.dtype, device=like.device).masked_fill_(~part, torch.finfo(like.dtype).min)
    return part.unsqueeze(2)  # [B, 1, 1, t, S]


def _causal(tokens: int, keys: int, device: torch.device) -> Tensor:
    """[T, S] bool: query t sees keys up to S - T + t."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril_(keys - tokens)

"""Attention with a quantised softmax output: p̂ = round((2**bits - 1) p) / (2**bits - 1) on [0, 1].

Source: RPTQ's published code quantises the softmax output on the fixed range [0, 1] at 8 bits. Query rows are taken in
blocks, so that a causal mask skips the keys after each block and the score matrix stays in cache.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels import straight_through

QUERY_BLOCK = 64


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, softmax_bits: int = 16, softcap: float | None = None
) -> Tensor:
    """Compute softmax(s + mask) v of scores s = q kᵀ scaling, the softmax output quantised when `softmax_bits` < 16.

    Args:
        q: [B, H, T, E]; k, v: [B, Hkv, S, E] float, H a multiple of Hkv, S >= T.
        mask: None for causal, or [B or 1, 1, T, S]: bool (True = visible) or float (added).
        scaling: multiplies the scores. softcap: c, where softcap · tanh(s / softcap) takes the place of s (Gemma 2).
    Returns: [B, T, H * E].
    """
    batch, heads, tokens, dim = q.shape
    if softmax_bits >= 16 and softcap is None:
        causal = mask is None and tokens > 1
        if causal and k.shape[2] != tokens:
            mask, causal = _causal(tokens, k.shape[2], q.device), False
        if q.is_cuda:
            k, v = _per_query_head(k, heads), _per_query_head(v, heads)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=k.shape[1] != heads
        )
        return out.transpose(1, 2).reshape(batch, tokens, heads * dim)
    steps = None if softmax_bits >= 16 else 2**softmax_bits - 1
    return _explicit(q if scaling == 1.0 else q * scaling, k, v, mask, steps, softcap)


@lru_cache(maxsize=8)
def window_mask(tokens: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Make the mask [1, 1, T, S] bool of the last `tokens` of `keys` positions: True for the `window` keys up to its own.

    Returns: None where that is plain causal attention.
    """
    if window is None or keys <= window:
        return None
    with torch.inference_mode(False):  # it outlives the caller's mode
        visible = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril_(keys - tokens)
        return visible.triu_(keys - tokens - window + 1)[None, None]


def _per_query_head(states: Tensor, heads: int) -> Tensor:
    """Repeat [B, Hkv, S, E] to [B, heads, S, E]. On CUDA no fused attention takes float32 and grouped heads at once; without
    this, all scores would be written to memory."""
    groups = heads // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, steps: int | None, softcap: float | None) -> Tensor:
    """Compute `attend` by its scores: with a softmax output of `steps` steps above 0, None for float, and capped scores."""
    batch, heads, tokens, dim = q.shape
    kv_heads, past = k.shape[1], k.shape[2] - tokens
    lead = (batch, kv_heads, heads // kv_heads)
    q = q.unflatten(1, lead[1:]).flatten(0, 1)  # [B Hkv, G, T, E]
    v = v if steps is None else v / steps
    k, v = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)  # 1 / steps of p̂ is applied to v
    out = q.new_empty(batch, tokens, *lead[1:], dim)
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        seen = past + stop if mask is None else k.shape[2]
        scores = torch.bmm(q[:, :, start:stop].flatten(1, 2), k[:, :, :seen])  # [B Hkv, G t, S]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            later = _future(stop - start, scores.dtype, scores.device)
            scores.view(-1, stop - start, seen)[:, :, past + start :].add_(later)
        else:
            additive = _additive(mask[..., start:stop, :seen], scores.dtype).unsqueeze(2)  # [B or 1, 1, 1, t, S]
            scores.view(*lead, stop - start, seen).add_(additive)
        p = _rounded(torch.softmax(scores, dim=-1), steps)
        part = torch.bmm(p, v[:, :seen]).view(*lead, stop - start, dim)
        out[:, start:stop] = part.permute(0, 3, 1, 2, 4)
    return out.view(batch, tokens, heads * dim)


def _rounded(p: Tensor, steps: int | None) -> Tensor:
    """Compute round(p steps), in place or, where a gradient is wanted, straight-through; p itself without steps."""
    if steps is None:
        return p
    if not p.requires_grad:
        return p.mul_(steps).round_()
    scaled = p * steps
    return straight_through(scaled, scaled.round())


@lru_cache(maxsize=8)
def _future(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make [t, t]: -inf where the key comes after the query, else 0. Adding it is faster than masked filling."""
    return torch.full((tokens, tokens), float("-inf"), dtype=dtype, device=device).triu_(1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask that is True for visible keys into numbers to add; return an additive mask unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _causal(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Make [T, S] bool: query t sees keys up to S - T + t."""
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril_(keys - tokens)

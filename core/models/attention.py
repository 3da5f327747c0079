"""The attention half of a decoder block: o(softmax(q kᵀ) v), heads grouped, rotated and packed.

    q, k, v = qkv(x)        q, k = rope(norm(q), norm(k))[R2], q scaled by E**-0.5        v comes in order R3

R2 is stored by the rotation (OPT: by the rows of Wq and Wk), R3 by the rows of Wv. Shapes: B batch, T tokens, S tokens so far,
D hidden, H query heads, Hkv key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from core.checks import FLOAT_BITS
from core.models.adapter import BlockSpec
from core.models.bitnet import AttentionBits
from core.models.norm import ReorderNorm
from core.models.slots import Slots
from core.quant.attention import attend, window_mask
from core.quant.kv_cache import FloatKVLayer, QuantizedKVLayer, new_layer
from core.quant.kv_grid import KVGrid, RowGrid, StaticGrid, fake_per_row
from core.quant.linear.base import LinearLayer
from core.quant.rotated import TokenQuantizer
from core.quant.static import ActivationQuantizer, InputUse
from kernels import Backend, Codes, hadamard
from kernels.backend import triton_runs_on

Rotary = tuple[Tensor, ...] | None
"""Cosines and sines of the tokens' positions, [1, T, E] each, of every rotation of the model, then, where queries grow with their
position, the factors on them, [1, T, 1]; None with learned positions."""


class Attention(nn.Module):
    """Compute the attention of tokens [B, T, D]; each sees `window` positions, itself included, or all before it (None).

    Args:
        qkv: attn_in to [q; k; v], N = (H + 2 Hkv) E. o: o_in to D.
        q_norm, k_norm: gains [E] of norms per head, or [H E] and [Hkv E] of norms over all heads; None where there are none.
        attn_sub_norm: BitNet's norm before o, None elsewhere.
    Attributes:
        slots: what stands at the sites attn_in, q, k, v and o_in.
    Set by quantisation: `q_quantizer`, `k_quantizer`, `v_quantizer`, None where a site stays in float; `bits`, those of
    BitNet's rules; `softmax_bits`; `sink_tokens`, the first positions whose activations stay in float; `rope_order` [Hkv, E] (R2,
    None keeps the order); `rotates_heads`, whether a Hadamard matrix rotates q and k after their rotation by position; `key_mean`
    [Hkv, E], subtracted from the keys last: it changes all scores of a query by the same number, which softmax ignores; `store`,
    which makes another library's store of keys and values (`core.baselines.cache`), None for ours.
    """

    def __init__(
        self,
        spec: BlockSpec,
        qkv: LinearLayer,
        o: LinearLayer,
        *,
        window: int | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rope_order: Tensor | None,
        attn_sub_norm: ReorderNorm | None,
    ) -> None:
        super().__init__()
        self.spec, self.window, self.slots = spec, window, Slots()
        self.register_buffer("q_norm", q_norm)
        self.register_buffer("k_norm", k_norm)
        self.register_buffer("rope_order", rope_order)
        self.attn_sub_norm, self.qkv, self.o = attn_sub_norm, qkv, o
        self.register_buffer("key_mean", None)
        self.q_quantizer: ActivationQuantizer | TokenQuantizer | None = None
        self.k_quantizer: ActivationQuantizer | TokenQuantizer | None = None
        self.v_quantizer: ActivationQuantizer | TokenQuantizer | None = None
        self.rotates_heads = False
        self.bits: AttentionBits | None = None
        self.store: Callable[[], FloatKVLayer] | None = None
        self.softmax_bits, self.sink_tokens = 16, 0

    def grids(self) -> tuple[KVGrid | None, KVGrid | None]:
        """Make the grids of keys and of values, None where they stay in float."""
        if self.bits is not None:
            return self.bits.kv_grid, self.bits.kv_grid
        keys, values = (None if q is None else _kv_grid(q, self.sink_tokens) for q in (self.k_quantizer, self.v_quantizer))
        return keys, values

    def new_cache(self) -> FloatKVLayer | QuantizedKVLayer:
        """Make an empty store for keys and values: packed where both are quantised."""
        return new_layer(*self.grids()) if self.store is None else self.store()

    def forward(
        self, x: Tensor | Codes, use: InputUse, rotary: Rotary, cache: FloatKVLayer | QuantizedKVLayer | None
    ) -> Tensor:
        """Compute [B, T, D] of normalised tokens x [B, T, D] that follow those of `cache`, where they are stored."""
        q, k, v = self._project(x if use.owned else self.slots("attn_in", x), use, rotary)
        mixed = self._attend(q, k, v, cache)
        if self.attn_sub_norm is not None:
            _, mixed = self.attn_sub_norm.before(self.o, mixed, use)
        return self.o(mixed if use.owned else self.slots("o_in", mixed), use)

    def _runs_kernels(self, device: torch.device) -> bool:
        """Decide whether rotation and attention are kernels: on CUDA, unless another backend was asked for by name."""
        return self.qkv.requested in (Backend.AUTO, Backend.TRITON) and triton_runs_on(device)

    def _project(self, x: Tensor | Codes, use: InputUse, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q [B, H, T, E], scaled and quantised, k and v [B, Hkv, T, E] of x [B, T, D]; q, k rotated and in order R2."""
        s = self.spec
        heads = self.qkv(x, use).unflatten(-1, (s.heads + 2 * s.kv_heads, s.head_dim))  # [B, T, H + 2 Hkv, E]
        qk, v = heads.split((s.heads + s.kv_heads, s.kv_heads), dim=2)
        if s.qk_norm:
            q, k = qk.split((s.heads, s.kv_heads), dim=2)
            if s.wide_qk_norm:
                q, k = q.flatten(2), k.flatten(2)
            qk = torch.cat([_rms(q, self.q_norm, s.eps), _rms(k, self.k_norm, s.eps)], dim=2).view(qk.shape)
        plain = not self.rotates_heads and self.key_mean is None
        if s.rope and use.owned and plain and self._runs_kernels(qk.device):
            return *self._rotate_and_store(qk, use, rotary), v.transpose(1, 2)
        if s.rope:
            cos, sin = (t.unsqueeze(2) for t in self._rotation(rotary))
            qk = (qk * cos).add_(_rotate_half(qk).mul_(sin))
        if self.rope_order is not None:
            qk = self._store_r2(qk)
        if self.rotates_heads:
            qk = hadamard(qk)
        q, k = qk.split((s.heads, s.kv_heads), dim=2)
        q = q * s.head_dim**-0.5
        if s.query_growth is not None:
            q = q * rotary[-1].unsqueeze(2)
        k = k if self.key_mean is None else k - self.key_mean
        if not use.owned:
            q, k, v = (self._site(*site) for site in (("q", q), ("k", k), ("v", v)))
        return self._fake_query(q.transpose(1, 2), use), k.transpose(1, 2), v.transpose(1, 2)

    def _rotation(self, rotary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the cosines and sines of this layer's rotation."""
        return rotary[2 * self.spec.rotary : 2 * self.spec.rotary + 2]

    def _site(self, site: str, heads: Tensor) -> Tensor:
        """Pass heads [B, T, H, E] through their slot."""
        return self.slots(site, heads.flatten(2)).unflatten(2, heads.shape[2:]) if site in self.slots else heads

    def _rotate_and_store(self, qk: Tensor, use: InputUse, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotate, reorder (R2), scale and quantise [B, T, H + Hkv, E] into q and k of `_project`, one pass each, on CUDA."""
        from kernels.rope import HeadGrid, rope_store

        s, grid = self.spec, None
        q, k = (t.transpose(1, 2) for t in qk.split((s.heads, s.kv_heads), dim=2))
        if self.q_quantizer is not None and not use.float_tokens:
            grid = HeadGrid(self.q_quantizer.bits, *self.q_quantizer.head_grid(s.heads))
        turn = self._rotation(rotary)
        own = turn if s.query_growth is None else (t * rotary[-1] for t in turn)  # the rotation is linear in them
        q = rope_store(q, *own, order=self.rope_order, scaling=s.head_dim**-0.5, grid=grid)
        return q if grid is not None else self._fake_query(q, use), rope_store(k, *turn, order=self.rope_order)

    def _store_r2(self, qk: Tensor) -> Tensor:
        """Reorder [B, T, H + Hkv, E], every head in the order of its key/value head, as one gather over all heads."""
        heads, dim = qk.shape[2:]
        order = torch.cat([self.rope_order.repeat_interleave(self.spec.groups, dim=0), self.rope_order])
        order = order + torch.arange(0, heads * dim, dim, dtype=order.dtype, device=order.device)[:, None]
        return qk.flatten(2).flatten(0, 1).index_select(1, order.flatten()).view(qk.shape)

    def _fake_query(self, q: Tensor, use: InputUse) -> Tensor:
        """Quantise and dequantise q [B, H, T, E], which nobody else reads unless `use` says so."""
        if self.q_quantizer is not None:
            return self.q_quantizer.fake_heads(q, use)
        return q if self.bits is None or self.bits.q >= FLOAT_BITS else fake_per_row(q, self.bits.q)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: FloatKVLayer | QuantizedKVLayer | None) -> Tensor:
        """Compute o_in [B, T, H E] before its norm; keys and values are quantised here, or by the cache that stores them."""
        if cache is None and self.store is not None:
            cache = self.store()  # keys that it has not quantised yet are exact: each piece sees what one token at a time would
            pieces = (x.split(cache.pieces(q.shape[2]), dim=2) for x in (q, k, v))
            return torch.cat([self._attend(*piece, cache) for piece in zip(*pieces, strict=True)], dim=1)
        past = 0 if cache is None else cache.length
        mask = None if self.window is None else window_mask(q.shape[2], past + q.shape[2], self.window, q.device)
        if cache is None:
            k, v = (x if grid is None else grid.fake(x, 0) for x, grid in zip((k, v), self.grids(), strict=True))
        elif cache.pinned or mask is None and self._attends_packed(cache, q):
            return cache.attend(q, k, v, self.softmax_bits)
        else:
            k, v = cache.update(k, v)
        return attend(q, k, v, mask, scaling=1.0, softmax_bits=self.softmax_bits, softcap=self.spec.softcap)

    def _attends_packed(self, cache: FloatKVLayer | QuantizedKVLayer, q: Tensor) -> bool:
        """Decide whether the cache stays packed: where it can, with plain scores, unless the reference was asked for by name."""
        return self.spec.softcap is None and self.qkv.requested is not Backend.REFERENCE and cache.attends(q, self.softmax_bits)


def _kv_grid(quantizer: ActivationQuantizer | TokenQuantizer, sink_tokens: int) -> KVGrid:
    """Make the grid of keys or values that a quantiser stands for; token by token the first one stays in float."""
    if isinstance(quantizer, TokenQuantizer):
        return RowGrid(quantizer.bits, FLOAT_BITS)
    return StaticGrid(quantizer, sink_tokens)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

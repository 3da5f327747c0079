"""The one decoder block for all architectures: float for observing, quantised for running, one forward.

    n1 = norm1(x)[R1]                     q, k, v = qkv(n1)            q, k = rope(q, k)[R2]      v is in order R3
    h  = x + o(attention(q, k, v))        n2 = norm2(h)[R4]            y = h + down(mlp(n2))      mlp output in order R5

BitNet's layers normalise the inputs of o and down too (`attn_sub_norm`, `ffn_sub_norm`): o_in and down_in are the outputs of
these norms.

R1 and R4 are applied when the norm stores its output, R2 when the rotation does (OPT: in the rows of Wq and Wk), R3 and R5 in
the rows of the weights before: none needs a step of its own. `observe(site, tensor)` gets the seven sites before quantisation.
Shapes: B batch, T tokens, D hidden, H query heads, Hkv key/value heads, E head dimension, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from core.models.architectures import BlockSpec, ModelAdapter
from core.models.bitnet import BitNetRules
from core.models.norm import ReorderNorm
from core.quant.attention import attend, window_mask
from core.quant.kv_cache import FloatKVLayer, QuantizedKVLayer
from core.quant.kv_cache_dynamic import DynamicKVLayer
from core.quant.linear.base import FloatLinear, LinearLayer
from core.quant.linear.ternary import TernaryLinear
from core.quant.static import ActivationQuantizer, Codes, KeepFloat
from kernels import Backend
from kernels.backend import triton_runs_on
from kernels.ternary import ROW_DENSITY

Observer = Callable[[str, Tensor], None]
Rotary = tuple[Tensor, Tensor] | None
"""Cosines and sines of the tokens' positions, [1, T, E] each; None with learned positions."""
ZERO_GATES = ("relu", "relu2")
"""Activations that are exactly zero for negative gates: there the up projection need not be computed."""
GATE_FIRST_WEIGHTS = 2**22
"""Least number of weights of an up projection for which "auto" computes the gate first; for fewer the test does not pay."""


class DecoderBlock(nn.Module):
    """A pre-norm decoder layer; each token sees `window` positions, itself included, or all before it (None).

    Attributes set by quantisation: `qkv`, `o`, `up`, `down` become QuantLinear; `q_quantizer`, `k_quantizer`,
    `v_quantizer` ActivationQuantizer or None; `softmax_bits`; `rope_order` [Hkv, E] (R2, None keeps the order);
    `sink_tokens`, the first positions whose activations stay in float.
    With ternary weights the four are TernaryLinear and `rules` says how they run. `gate_first` ("auto", "always", "never")
    decides whether up is computed only where the gate is not zero; the result is the same.
    """

    def __init__(self, spec: BlockSpec, layer_index: int, window: int | None = None) -> None:
        super().__init__()
        self.spec, self.layer_index, self.window = spec, layer_index, window
        self.activation = ACT2FN[spec.activation]
        self.norm1: ReorderNorm
        self.norm2: ReorderNorm
        self.attn_sub_norm: ReorderNorm | None = None
        self.ffn_sub_norm: ReorderNorm | None = None
        self.register_buffer("q_norm", None)
        self.register_buffer("k_norm", None)
        self.register_buffer("rope_order", None)
        self.q_quantizer: ActivationQuantizer | None = None
        self.k_quantizer: ActivationQuantizer | None = None
        self.v_quantizer: ActivationQuantizer | None = None
        self.softmax_bits = 16
        self.sink_tokens = 0
        self.rules: BitNetRules | None = None
        self.gate_first = "auto"

    @classmethod
    def from_layer(cls, model: nn.Module, adapter: ModelAdapter, index: int) -> DecoderBlock:
        """Make a float block that computes the same as layer `index` of a transformers model. Weights are copied."""
        layer, spec = adapter.decoder_layers(model)[index], adapter.spec(model.config)
        block = cls(spec, index, adapter.windows(model.config)[index])

        def linear(*paths: str) -> FloatLinear:
            parts = [layer.get_submodule(p) for p in paths]
            weight = torch.cat([p.weight.detach() for p in parts])
            return FloatLinear(weight, None if parts[0].bias is None else torch.cat([p.bias.detach() for p in parts]))

        def norm(path: str) -> ReorderNorm:
            source = layer.get_submodule(path)
            bias = getattr(source, "bias", None)
            weight = source.weight
            return ReorderNorm(
                spec.norm,
                None if weight is None else weight.detach().clone(),
                None if bias is None else bias.detach().clone(),
                spec.eps,
            )

        block.norm1, block.norm2 = norm(adapter.norm1), norm(adapter.norm2)
        if spec.sub_norms:
            block.attn_sub_norm, block.ffn_sub_norm = norm(adapter.attn_sub_norm), norm(adapter.ffn_sub_norm)
        block.qkv, block.o = linear(adapter.q, adapter.k, adapter.v), linear(adapter.o)
        block.up, block.down = linear(*adapter.mlp_in), linear(adapter.down)
        if spec.qk_norm:
            block.q_norm = layer.get_submodule(adapter.q_norm).weight.detach().clone()
            block.k_norm = layer.get_submodule(adapter.k_norm).weight.detach().clone()
        return block.eval()

    def with_linears(self, linears: dict[str, LinearLayer]) -> DecoderBlock:
        """Make a block with these norms and orders and other linear layers, by the names of `linears`; without quantisers."""
        made = DecoderBlock(self.spec, self.layer_index, self.window)
        for name in ("norm1", "norm2", "attn_sub_norm", "ffn_sub_norm", "q_norm", "k_norm", "rope_order"):
            setattr(made, name, getattr(self, name))
        for name, linear in linears.items():
            setattr(made, name, linear)
        return made.eval()

    def dequantized(self) -> DecoderBlock:
        """Make the float block with this block's weights (α t if they are ternary), for another method to quantise."""
        return self.with_linears({n: FloatLinear(x.dequantized_weight(), x.bias) for n, x in self.linears().items()})

    def linears(self) -> dict[str, LinearLayer]:
        """Return the four linear layers by name; qkv reads attn_in, o reads o_in, up reads mlp_in, down reads down_in."""
        return {"qkv": self.qkv, "o": self.o, "up": self.up, "down": self.down}

    @property
    def is_float(self) -> bool:
        """Whether the weights are plain floating-point matrices, neither packed nor ternary."""
        return isinstance(self.qkv, FloatLinear)

    def new_cache(self) -> FloatKVLayer | QuantizedKVLayer:
        """Make an empty store for this block's keys and values: packed where both are quantised."""
        if self.rules is not None and self.rules.attention.packs:
            return DynamicKVLayer(self.rules.attention)
        if self.k_quantizer is None or self.v_quantizer is None:
            return FloatKVLayer()
        return QuantizedKVLayer(self.k_quantizer, self.v_quantizer, self.sink_tokens)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        cache: FloatKVLayer | QuantizedKVLayer | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Compute the layer for tokens that follow those of `cache`, or that start a sequence without one.

        Args:
            x: [B, T, D].
            rotary: of these tokens.
            cache: of `new_cache`; it stores the keys and values of these tokens too.
            observe: called with each of the seven sites and its tensor [B, T, C], before quantisation.
        Returns: [B, T, D].
        """
        keep_float, alone = self._keep_float(x.shape[1], cache), observe is None
        see = _ignore if alone else observe  # an observer needs floats that nothing overwrites
        fused = alone and keep_float is None and triton_runs_on(x.device)
        _, n1 = self._norm(self.norm1, x, self.qkv, fused)
        see("attn_in", n1)
        q, k, v = self._project(n1, keep_float, rotary, see, alone)
        mixed = self._attend(q, k, v, cache, keep_float)
        if self.attn_sub_norm is not None:
            _, mixed = self._norm(self.attn_sub_norm, mixed, self.o, fused)
        see("o_in", mixed)
        h, n2 = self._norm(self.norm2, x, self.up, fused, self.o(mixed, keep_float, inplace=alone))
        see("mlp_in", n2)
        mlp = self._mlp(n2, keep_float, inplace=alone)
        if self.ffn_sub_norm is not None:
            _, mlp = self._norm(self.ffn_sub_norm, mlp, self.down, fused)
        see("down_in", mlp)
        skips = self._looks_at_gate(n2, keep_float) and self.down.bias is None and self.down.sparse != "never"
        if alone and skips and self.down.choice.backend is Backend.TRITON:
            return self.down.sparse_product(mlp).add_(h)
        return self.down(mlp, keep_float, inplace=alone).add_(h)

    def _runs_kernels(self, device: torch.device) -> bool:
        """Decide whether rotation and attention are kernels: on CUDA, unless another backend was asked for by name."""
        return self.qkv.requested in (Backend.AUTO, Backend.TRITON) and triton_runs_on(device)

    def _norm(
        self, norm: ReorderNorm, x: Tensor, reader: nn.Module, fused: bool, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | Codes]:
        """Compute x + residual and its norm as input of `reader`: floats, or codes where one kernel makes them."""
        found = norm.codes(x, reader, residual) if fused else None
        if found is not None:
            return found
        h = x if residual is None else x + residual
        return h, norm(h)

    def _keep_float(self, tokens: int, cache: FloatKVLayer | QuantizedKVLayer | None) -> int | None:
        """Count the next `tokens` that are among the sequence's first `sink_tokens`; None when there are none."""
        past = 0 if cache is None else cache.length
        return min(max(0, self.sink_tokens - past), tokens) or None

    def _project(
        self, n1: Tensor | Codes, keep_float: KeepFloat | None, rotary: Rotary, see: Observer, alone: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q [B, H, T, E] scaled by E**-0.5, k and v [B, Hkv, T, E] of n1 [B, T, D]; q and k rotated and in order R2."""
        s = self.spec
        heads = self.qkv(n1, keep_float, inplace=alone).unflatten(
            -1, (s.heads + 2 * s.kv_heads, s.head_dim)
        )  # [B, T, H + 2 Hkv, E]
        qk, v = heads.split((s.heads + s.kv_heads, s.kv_heads), dim=2)
        if s.qk_norm:
            q, k = qk.split((s.heads, s.kv_heads), dim=2)
            qk = torch.cat([_rms(q, self.q_norm, s.eps), _rms(k, self.k_norm, s.eps)], dim=2)
        if s.rope and alone and self._runs_kernels(qk.device):
            return *self._rotate_and_store(qk, keep_float, rotary), v.transpose(1, 2)
        if s.rope:
            cos, sin = (t.unsqueeze(2) for t in rotary)
            qk = (qk * cos).add_(_rotate_half(qk).mul_(sin))
        if self.rope_order is not None:
            qk = self._store_r2(qk)
        q, k = qk.split((s.heads, s.kv_heads), dim=2)
        q, k, v = (q * s.head_dim**-0.5).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if not alone:
            for site, tensor in (("q", q), ("k", k), ("v", v)):
                see(site, tensor.transpose(1, 2).flatten(2))
        if self.q_quantizer is not None:
            q = self.q_quantizer.fake_heads(q, keep_float, inplace=alone)
        return q, k, v

    def _rotate_and_store(self, qk: Tensor, keep_float: KeepFloat | None, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotate, reorder (R2), scale and quantise [B, T, H + Hkv, E] into q and k of `_project`, one pass each, on CUDA."""
        from kernels.rope import HeadGrid, rope_store

        s, grid = self.spec, None
        q, k = (t.transpose(1, 2) for t in qk.split((s.heads, s.kv_heads), dim=2))
        if self.q_quantizer is not None and keep_float is None:
            grid = HeadGrid(self.q_quantizer.bits, *self.q_quantizer.head_grid(s.heads))
        q = rope_store(q, *rotary, order=self.rope_order, scaling=s.head_dim**-0.5, grid=grid)
        if self.q_quantizer is not None and keep_float is not None:
            q = self.q_quantizer.fake_heads(q, keep_float)
        return q, rope_store(k, *rotary, order=self.rope_order)

    def _store_r2(self, qk: Tensor) -> Tensor:
        """Reorder [B, T, H + Hkv, E], every head in the order of its key/value head, as one gather over all heads."""
        heads, dim = qk.shape[2:]
        order = torch.cat([self.rope_order.repeat_interleave(self.spec.groups, dim=0), self.rope_order])
        order = order + torch.arange(0, heads * dim, dim, dtype=order.dtype, device=order.device)[:, None]
        return qk.flatten(2).flatten(0, 1).index_select(1, order.flatten()).view(qk.shape)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: FloatKVLayer | QuantizedKVLayer | None,
        keep_float: KeepFloat | None,
    ) -> Tensor:
        past = 0 if cache is None else cache.length
        mask = window_mask(q.shape[2], past + q.shape[2], self.window, q.device)
        if self.rules is not None:
            q = self.rules.attention.fake_query(q)
        if cache is not None and cache.packed:
            if cache.pinned or mask is None and self._attends_packed(cache, q):
                return cache.attend(q, k, v, self.softmax_bits)
        else:
            k = k if self.k_quantizer is None else self.k_quantizer.fake_heads(k, keep_float)
            v = v if self.v_quantizer is None else self.v_quantizer.fake_heads(v, keep_float)
            if self.rules is not None:
                k, v = (self.rules.attention.fake_states(x, past) for x in (k, v))
        if cache is not None:
            k, v = cache.update(k, v)
        return attend(q, k, v, mask, scaling=1.0, softmax_bits=self.softmax_bits)

    def _attends_packed(self, packed: QuantizedKVLayer, q: Tensor) -> bool:
        """Decide whether the cache stays packed: where it can, unless the reference was asked for by name."""
        return self.qkv.requested is not Backend.REFERENCE and packed.attends(q, self.softmax_bits)

    def _mlp(self, n2: Tensor | Codes, keep_float: KeepFloat | None, *, inplace: bool = False) -> Tensor:
        """Compute activation(gate) * up [B, T, F] of n2 [B, T, D]; without a gate activation(up)."""
        if not self._looks_at_gate(n2, keep_float):
            return self._activate(n2, keep_float, inplace=inplace)
        codes, ffn = n2 if isinstance(n2, Codes) else self.up.quantize(n2), self.spec.ffn
        gate = self.activation(self.up.product(codes, slice(0, ffn)))
        if self.up.bias is None and self.up.choice.backend is Backend.TRITON:  # no test on the host
            return self.up.gated_product(codes, gate, slice(ffn, 2 * ffn)).view(*n2.shape[:-1], ffn)
        live = gate.any(dim=0).nonzero().flatten()
        if self.gate_first == "auto" and len(live) > ROW_DENSITY * ffn:
            out = gate.mul_(self.up.product(codes, slice(ffn, 2 * ffn)))
        else:
            out = torch.zeros_like(gate)
            out[:, live] = gate[:, live] * self.up.product(codes, ffn + live)
        return out.view(*n2.shape[:-1], ffn)

    def _looks_at_gate(self, n2: Tensor | Codes, keep_float: KeepFloat | None) -> bool:
        possible = self.spec.gated and self.spec.activation in ZERO_GATES and keep_float is None
        if self.gate_first == "never" or not possible or not isinstance(self.up, TernaryLinear) or self.up.kind == "fp":
            return False
        one_large = n2.shape[:-1].numel() == 1 and self.spec.ffn * self.spec.hidden >= GATE_FIRST_WEIGHTS
        return self.gate_first == "always" or one_large

    def _activate(self, n2: Tensor | Codes, keep_float: KeepFloat | None, *, inplace: bool) -> Tensor:
        if not self.spec.gated:
            return self.activation(self.up(n2, keep_float, inplace=inplace))
        parts = self.up.parts(n2, (self.spec.ffn, self.spec.ffn), keep_float, inplace=inplace)
        return self.activation(next(parts)).mul_(next(parts))  # the gate before up is computed


def _ignore(site: str, tensor: Tensor) -> None:
    """Ignore a site: the observer when there is none."""


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

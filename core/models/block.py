"""The one decoder block every adapter maps to: float for observing, quantised for running, same forward.

    h = x + attention(norm1(x)[R1])        y = h + mlp(norm2(h)[R4])

Where a layer normalises what attention and MLP put out, or the sums h and y, `post_norm1` and `post_norm2` do that: behind o and
down, whose rows no method permutes. A parallel layer's MLP reads norm2(x). BitNet's layers normalise once more before o and
before down (`attn_sub_norm`, `ffn_sub_norm`): o_in and down_in are what these norms put out.

R1 and R4 are stored by the norms, R2 by the rotation, R3 and R5 by the rows of the producing weights: no permutation is left to
run. `slots` holds what looks at the seven sites. Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from core.bits import expert_site, kind_of
from core.models.adapter import BlockSpec, ModelAdapter
from core.models.attention import Attention, Rotary
from core.models.bitnet import BitNetRules
from core.models.convert import block_parts
from core.models.mlp import MLP
from core.models.moe import MoE
from core.models.norm import ReorderNorm
from core.models.slots import Slots
from core.quant.kv_cache import FloatKVLayer, QuantizedKVLayer
from core.quant.linear.base import FloatLinear, LinearLayer
from core.quant.static import InputUse


class DecoderBlock(nn.Module):
    """Compute a decoder layer.

    Args:
        window: positions that a token sees, itself included; None for all before it.
        norm1, norm2: before attention and MLP; of kind "none" where those read the residual stream itself.
        post_norm1, post_norm2: after them, at the place that `spec.post_norms` says; None without.
        router: weight [N, D] of a mixture of experts, whose up and down are lists; None for one MLP.
        rules: how a block with ternary weights runs, None for others. Other parts: see `Attention`, `MLP` and `MoE`.
    Attributes:
        slots: what stands at the seven sites, empty outside of a `with`.
    """

    def __init__(
        self,
        spec: BlockSpec,
        layer_index: int,
        window: int | None,
        *,
        norm1: ReorderNorm,
        norm2: ReorderNorm,
        qkv: LinearLayer,
        o: LinearLayer,
        up: LinearLayer | Sequence[LinearLayer],
        down: LinearLayer | Sequence[LinearLayer],
        router: Tensor | None = None,
        post_norm1: ReorderNorm | None = None,
        post_norm2: ReorderNorm | None = None,
        attn_sub_norm: ReorderNorm | None = None,
        ffn_sub_norm: ReorderNorm | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        rope_order: Tensor | None = None,
        rules: BitNetRules | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.layer_index = spec, layer_index
        self.norm1, self.norm2, self.post_norm1, self.post_norm2 = norm1, norm2, post_norm1, post_norm2
        self.attention = Attention(
            spec, qkv, o, window=window, q_norm=q_norm, k_norm=k_norm, rope_order=rope_order, attn_sub_norm=attn_sub_norm
        )
        self.attention.bits = None if rules is None else rules.attention
        self.mlp = MLP(spec, up, down, ffn_sub_norm) if router is None else MoE(spec, router, up, down)
        self.slots = self.attention.slots = self.mlp.slots = Slots(spec.sites)
        for expert in self.experts:
            expert.slots = self.slots
        self.rules = rules
        self.eval()

    @classmethod
    def from_layer(cls, model: nn.Module, adapter: ModelAdapter, index: int) -> DecoderBlock:
        """Make the float block that computes what layer `index` of a transformers model computes. Weights are copied."""
        config = model.config
        layer, spec = adapter.decoder_layers(model)[index], adapter.spec(config, index)
        return cls(spec, index, adapter.windows(config)[index], **block_parts(layer, adapter, config, spec))

    def with_parts(self, **parts: nn.Module | Tensor | BitNetRules | None) -> DecoderBlock:
        """Make a block of the given parts, by their names in `parts`, and of this one's for the rest, but its rules; its
        sites have no quantisers."""
        made = gathered({**self.parts(), **parts}, self.spec.experts)
        return DecoderBlock(self.spec, self.layer_index, self.attention.window, **made)

    def in_order(self, order: Tensor) -> DecoderBlock:
        """Make the float block for a residual stream whose channels lie in `order` [D] int64, at its input and its output.

        The norms' gains and biases, columns of Wq, Wk, Wv, W_gate and W_up, rows and biases of Wo and W_down follow the order.
        """
        norms = {name: getattr(self, name) for name in ("norm1", "norm2", "post_norm1", "post_norm2")}
        norms = {name: norm.permuted(order) for name, norm in norms.items() if norm is not None}
        found = self.linears().items()
        linears = {n: x.permuted(columns=order) if kind_of(n) in ("qkv", "up") else x.permuted(rows=order) for n, x in found}
        router = {} if self.router is None else {"router": self.router[:, order]}
        return self.with_parts(**norms, **linears, **router)

    def dequantized(self) -> DecoderBlock:
        """Make the float block with this one's weights (α t where they are ternary): what another method starts from."""
        return self.with_parts(**{n: FloatLinear(x.dequantized_weight(), x.bias) for n, x in self.linears().items()})

    def parts(self) -> dict[str, nn.Module | Tensor | None]:
        """Return the parts by their names in `__init__`, with the linear layers of experts as up.0, down.0, …; saved folders have
        the same names and order."""
        a, m = self.attention, self.mlp
        own = {"q_norm": a.q_norm, "k_norm": a.k_norm, "rope_order": a.rope_order, "norm1": self.norm1, "norm2": self.norm2}
        own |= {"post_norm1": self.post_norm1, "post_norm2": self.post_norm2}
        own |= {"attn_sub_norm": a.attn_sub_norm, "ffn_sub_norm": None if self.experts else m.ffn_sub_norm}
        return {**own, **({} if self.router is None else {"router": self.router}), **self.linears()}

    def linears(self) -> dict[str, LinearLayer]:
        """Return the linear layers by name (`BlockSpec.linears`); qkv reads attn_in, o reads o_in, up reads mlp_in, down reads
        down_in."""
        own = self.experts or (self.mlp,)
        layers = (self.attention.qkv, self.attention.o, *(x.up for x in own), *(x.down for x in own))
        return dict(zip(self.spec.linears, layers, strict=True))

    @property
    def experts(self) -> Sequence[MLP]:
        """The experts of a mixture; none where there is one MLP."""
        return self.mlp.experts if isinstance(self.mlp, MoE) else ()

    @property
    def router(self) -> Tensor | None:
        """The weight [N, D] that chooses experts; None where there is one MLP."""
        return self.mlp.router if isinstance(self.mlp, MoE) else None

    @property
    def is_float(self) -> bool:
        """True if the weights are plain floating-point matrices, neither packed nor ternary."""
        return isinstance(self.attention.qkv, FloatLinear)

    def forward(self, x: Tensor, rotary: Rotary, cache: FloatKVLayer | QuantizedKVLayer | None = None) -> Tensor:
        """Compute the layer for tokens that follow those of `cache`, or begin a sequence without one.

        Args:
            x: [B, T, D].
            rotary: of these tokens.
            cache: of `Attention.new_cache`; it stores the keys and values of these tokens too.
        Returns: [B, T, D].
        """
        attention, mlp = self.attention, self.mlp  # looked up once: torch finds submodules slowly
        past = 0 if cache is None else cache.length
        sinks = min(max(0, attention.sink_tokens - past), x.shape[1])
        use = InputUse(sinks, owned=not (self.slots or x.requires_grad))  # owned: no slot is filled, so none is asked
        placed = self.spec.post_norms
        _, normed = self.norm1.before(attention.qkv, x, use)
        mixed = attention(normed, use, rotary, cache)
        if placed == "output":
            mixed = self.post_norm1(mixed)
        if self.spec.parallel:
            (_, normed), h = self.norm2.before(mlp.up, x, use), x + mixed
        elif placed == "sum":
            h, normed = self.norm2.before(mlp.up, self.post_norm1(x + mixed), use)
        else:
            h, normed = self.norm2.before(mlp.up, x, use, mixed)
        out = mlp(normed, use)
        if placed == "output":
            out = self.post_norm2(out)
        out = out + h if out.requires_grad else out.add_(h)
        return self.post_norm2(out) if placed == "sum" else out


def gathered(parts: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """Return the parts of a block as `DecoderBlock` takes them: up.0, up.1, … of a mixture of so many experts as the list up."""
    lists = {name: [parts[expert_site(name, i)] for i in range(experts)] for name in ("up", "down") if experts}
    return {name: part for name, part in parts.items() if kind_of(name) not in lists} | lists

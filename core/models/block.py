"""The one decoder block every adapter maps to: float for observing, quantised for running, same forward.

    h = x + attention(norm1(x)[R1])        y = h + mlp(norm2(h)[R4])

BitNet's layers normalise once more before o and before down (`attn_sub_norm`, `ffn_sub_norm`): o_in and down_in are what these
norms put out. R1 and R4 are stored by the norms, R2 by the rotation, R3 and R5 by the rows of the producing weights: no
permutation is left to run. `slots` holds what looks at the seven sites. Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.models.architectures import BlockSpec, ModelAdapter
from core.models.attention import Attention, Rotary
from core.models.bitnet import BitNetRules
from core.models.mlp import MLP
from core.models.norm import ReorderNorm
from core.models.slots import Slots
from core.quant.kv_cache import FloatKVLayer, QuantizedKVLayer
from core.quant.linear.base import FloatLinear, LinearLayer
from core.quant.static import InputUse


class DecoderBlock(nn.Module):
    """Compute a pre-norm decoder layer.

    Args:
        window: positions that a token sees, itself included; None for all before it.
        norm1, norm2: before attention and MLP.
        rules: how a block with ternary weights runs, None for others. Other parts: see `Attention` and `MLP`.
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
        up: LinearLayer,
        down: LinearLayer,
        attn_sub_norm: ReorderNorm | None = None,
        ffn_sub_norm: ReorderNorm | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        rope_order: Tensor | None = None,
        rules: BitNetRules | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.layer_index = spec, layer_index
        self.norm1, self.norm2 = norm1, norm2
        self.attention = Attention(
            spec, qkv, o, window=window, q_norm=q_norm, k_norm=k_norm, rope_order=rope_order, attn_sub_norm=attn_sub_norm
        )
        self.attention.bits = None if rules is None else rules.attention
        self.mlp = MLP(spec, up, down, ffn_sub_norm)
        self.slots = self.attention.slots = self.mlp.slots = Slots()
        self.rules = rules
        self.eval()

    @classmethod
    def from_layer(cls, model: nn.Module, adapter: ModelAdapter, index: int) -> DecoderBlock:
        """Make the float block that computes what layer `index` of a transformers model computes. Weights are copied."""
        layer, spec = adapter.decoder_layers(model)[index], adapter.spec(model.config)

        def copied(path: str, name: str = "weight") -> Tensor | None:
            tensor = getattr(layer.get_submodule(path), name, None)
            return None if tensor is None else tensor.detach().clone()

        def linear(*paths: str) -> FloatLinear:
            weight, bias = ([getattr(layer.get_submodule(p), name) for p in paths] for name in ("weight", "bias"))
            return FloatLinear(torch.cat(weight).detach(), None if bias[0] is None else torch.cat(bias).detach())

        norms = {name: getattr(adapter, name) for name in ("norm1", "norm2", "attn_sub_norm", "ffn_sub_norm")}
        return cls(
            spec,
            index,
            adapter.windows(model.config)[index],
            **{n: ReorderNorm(spec.norm, copied(p), copied(p, "bias"), spec.eps) for n, p in norms.items() if p},
            **{name: copied(getattr(adapter, name)) for name in ("q_norm", "k_norm") if spec.qk_norm},
            qkv=linear(adapter.q, adapter.k, adapter.v),
            o=linear(adapter.o),
            up=linear(*adapter.mlp_in),
            down=linear(adapter.down),
        )

    def with_parts(self, **parts: nn.Module | Tensor | BitNetRules | None) -> DecoderBlock:
        """Make a block of the given parts, by their names in `__init__`, and of this one's for the rest, but its rules; its
        sites have no quantisers."""
        return DecoderBlock(self.spec, self.layer_index, self.attention.window, **{**self.parts(), **parts})

    def dequantized(self) -> DecoderBlock:
        """Make the float block with this one's weights (α t where they are ternary): what another method starts from."""
        return self.with_parts(**{n: FloatLinear(x.dequantized_weight(), x.bias) for n, x in self.linears().items()})

    def parts(self) -> dict[str, nn.Module | Tensor | None]:
        """Return the parts by their names in `__init__`; saved folders have the same names and order."""
        a, m = self.attention, self.mlp
        own = {"q_norm": a.q_norm, "k_norm": a.k_norm, "rope_order": a.rope_order, "norm1": self.norm1, "norm2": self.norm2}
        return {**own, "attn_sub_norm": a.attn_sub_norm, "ffn_sub_norm": m.ffn_sub_norm, **self.linears()}

    def linears(self) -> dict[str, LinearLayer]:
        """Return the four linear layers by name; qkv reads attn_in, o reads o_in, up reads mlp_in, down reads down_in."""
        return {"qkv": self.attention.qkv, "o": self.attention.o, "up": self.mlp.up, "down": self.mlp.down}

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
        _, normed = self.norm1.before(attention.qkv, x, use)
        h, normed = self.norm2.before(mlp.up, x, use, attention(normed, use, rotary, cache))
        out = mlp(normed, use)
        return out + h if out.requires_grad else out.add_(h)

"""What Quantscope must know of an architecture: where the seven sites of a decoder layer are. One data file each.

Every supported layer is the same pre-norm residual block, so an adapter only names its parts:

    h = x + o(attention(q(n1), k(n1), v(n1)))        n1 = norm1(x)        sites attn_in, q, k, v, o_in
    y = h + down(activation(gate(n2)) * up(n2))      n2 = norm2(h)        sites mlp_in, down_in

OPT has no gate and no rotary position; Qwen3 normalises q and k per head; BitNet normalises what o and down read once more.
These differences are fields, not subclasses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from core.errors import ModelError
from core.registry import Registry


@dataclass(frozen=True)
class BlockSpec:
    """Shape and kind of one decoder layer.

    Attributes:
        hidden, heads, kv_heads, head_dim, ffn: D, H, Hkv, E, F.
        norm: "rms" or "layer"; eps: its constant.
        activation: name of the element-wise function, as in transformers' table.
        gated: whether down_in = activation(gate) * up.
        rope: whether q and k are rotated by position; qk_norm: whether they are RMS-normalised per head before that.
        sub_norms: whether the inputs of o and down are normalised, so that o_in and down_in are those norms' outputs.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm: str
    eps: float
    activation: str
    gated: bool
    rope: bool
    qk_norm: bool
    sub_norms: bool = False

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def width(self, site: str) -> int:
        """Channels of a site."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn_in": self.hidden,
            "mlp_in": self.hidden,
            "q": query,
            "o_in": query,
            "k": key,
            "v": key,
            "down_in": self.ffn,
        }[site]


@dataclass(frozen=True)
class ModelAdapter:
    """Module paths of one architecture, relative to a decoder layer (`layers`: relative to the causal model).

    Attributes:
        name: shown to people.
        model_types: `config.model_type` values it serves.
        mlp_in: the linears that read mlp_in: (gate, up), or (fc1,) without a gate.
        rejects: returns a sentence for a configuration it cannot serve, else None.
    """

    name: str
    model_types: tuple[str, ...]
    norm: str
    layers: str = "model.layers"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    attn_sub_norm: str | None = None
    ffn_sub_norm: str | None = None
    rope: bool = True
    ffn_field: str = "intermediate_size"
    activation_field: str = "hidden_act"
    eps_field: str | None = "rms_norm_eps"
    rejects: Callable[[PretrainedConfig], str | None] | None = None

    def spec(self, config: PretrainedConfig) -> BlockSpec:
        """The layer shape that `config` describes."""
        heads = config.num_attention_heads
        return BlockSpec(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=getattr(config, self.ffn_field),
            norm=self.norm,
            eps=getattr(config, self.eps_field) if self.eps_field else 1e-5,
            activation=getattr(config, self.activation_field),
            gated=len(self.mlp_in) == 2,
            rope=self.rope,
            qk_norm=self.q_norm is not None,
            sub_norms=self.attn_sub_norm is not None,
        )

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The list of decoder layers of a causal model."""
        return model.get_submodule(self.layers)


ADAPTERS: Registry[ModelAdapter] = Registry("architecture")


def adapter_for(config: PretrainedConfig) -> ModelAdapter:
    """The adapter that serves `config`.

    Raises: ModelError (E-MODEL-ARCH) naming the architecture, or what in its configuration is not covered.
    """
    _import_all()
    kind = getattr(config, "model_type", None)
    for adapter in ADAPTERS:
        if kind in adapter.model_types:
            problem = adapter.rejects(config) if adapter.rejects else None
            if problem:
                raise ModelError(problem, code="E-MODEL-ARCH")
            return adapter
    raise ModelError(
        f"Architecture {str(kind)[:40]!r} has no adapter: use one of {', '.join(supported_model_types())}.", code="E-MODEL-ARCH"
    )


def supported_model_types() -> list[str]:
    """Every `model_type` that has an adapter."""
    _import_all()
    return [kind for adapter in ADAPTERS for kind in adapter.model_types]


def _import_all() -> None:
    from core.models import bitnet, llama, mistral, opt, qwen2, qwen3  # noqa: F401  (each registers its adapter once)

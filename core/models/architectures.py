"""The table of supported architectures: which checkpoint tensors are which part of the model.

Every supported layer is the same pre-norm residual block, so an entry only names its parts:

    h = x + o(attention(q(n1), k(n1), v(n1)))        n1 = norm1(x)        sites attn_in, q, k, v, o_in
    y = h + down(activation(gate(n2)) * up(n2))      n2 = norm2(h)        sites mlp_in, down_in

OPT has no gate and no rotary position; Qwen3 normalises q and k per head; BitNet also normalises the inputs of o and down;
Mistral and Qwen may limit attention to a window. These differences are fields, not subclasses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from core.errors import ModelError

HEAD = "lm_head.weight"
"""Name of the output embedding in every supported checkpoint."""
POSITION_OFFSET = 2
"""Unused rows at the start of OPT's table of positions."""


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
        """Return the number of channels of a site."""
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
    """Module paths of one architecture in transformers, relative to a decoder layer.

    Attributes:
        name: the architecture's name for people.
        model_types: `config.model_type` values it serves.
        layers: path of the list of decoder layers in the causal model; embeddings and last norm stand beside that list.
        final_norm: name of the last norm beside the layers.
        positions: name of the learned position embedding beside the layers, None with rotary positions.
        window: which layers `config.sliding_window` limits: "none", "all", or "layer_types", those that this field names.
        mlp_in: the linears that read mlp_in: (gate, up), or (fc1,) without a gate.
        rejects: function that returns a sentence for a configuration that is not covered, else None.
    """

    name: str
    model_types: tuple[str, ...]
    norm: str
    layers: str = "model.layers"
    final_norm: str = "norm"
    positions: str | None = None
    window: str = "none"
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
    ffn_field: str = "intermediate_size"
    activation_field: str = "hidden_act"
    eps_field: str | None = "rms_norm_eps"
    rejects: Callable[[PretrainedConfig], str | None] | None = None

    def spec(self, config: PretrainedConfig) -> BlockSpec:
        """Read the layer shape that `config` describes."""
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
            rope=self.positions is None,
            qk_norm=self.q_norm is not None,
            sub_norms=self.attn_sub_norm is not None,
        )

    def windows(self, config: PretrainedConfig) -> list[int | None]:
        """Return how many positions a token of each layer attends to, itself included; None for all before it."""
        width = None if self.window == "none" else config.sliding_window
        if self.window != "layer_types":
            return [width] * config.num_hidden_layers
        return [width if kind == "sliding_attention" else None for kind in config.layer_types]

    def outside(self, config: PretrainedConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
        """List the tensors outside the decoder layers: place in `core.models.decoder.Decoder` → (name in a checkpoint, shape).

        A tied head is listed too; a checkpoint may leave it out.
        """
        stem, hidden = self.layers.rpartition(".")[0], config.hidden_size
        width = getattr(config, "word_embed_proj_dim", hidden)  # OPT's embedding may be narrower than its layers
        found = {"embed.weight": (f"{stem}.embed_tokens.weight", (config.vocab_size, width))}
        if self.positions is not None:
            rows = config.max_position_embeddings + POSITION_OFFSET
            found["positions.weight"] = (f"{stem}.{self.positions}.weight", (rows, hidden))
        if width != hidden:
            found["project_in.weight"] = (f"{stem}.project_in.weight", (hidden, width))
            found["project_out.weight"] = (f"{stem}.project_out.weight", (width, hidden))
        if not getattr(config, "_remove_final_layer_norm", False) and getattr(config, "layer_norm_elementwise_affine", True):
            for leaf in ("weight", "bias") if self.norm == "layer" else ("weight",):
                found[f"norm.{leaf}"] = (f"{stem}.{self.final_norm}.{leaf}", (hidden,))
        return found | {"head.weight": (HEAD, (config.vocab_size, width))}

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """Find the list of decoder layers of a transformers model."""
        return model.get_submodule(self.layers)


def _rejects_post_norm(config: PretrainedConfig) -> str | None:
    if not config.do_layer_norm_before:
        return (
            "This OPT normalises after the residual sum (as opt-350m does), which RPTQ cannot reorder: "
            "use a pre-norm size such as opt-125m."
        )
    return None


ADAPTERS = (
    # SmolLM and SmolLM2 are this architecture
    ModelAdapter(name="Llama", model_types=("llama",), norm="rms"),
    ModelAdapter(name="Mistral", model_types=("mistral",), norm="rms", window="all"),
    # biases on q, k and v: R2 and R3 permute them with their rows
    ModelAdapter(name="Qwen2", model_types=("qwen2",), norm="rms", window="layer_types"),
    # an RMSNorm per head on q and k, before the rotation
    ModelAdapter(
        name="Qwen3",
        model_types=("qwen3",),
        norm="rms",
        window="layer_types",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    ),
    # arXiv:2504.12285: a squared ReLU gate, and norms before o and before down. Weights are trained to be ternary;
    # `core/models/io/bitnet.py` says how such checkpoints are stored
    ModelAdapter(
        name="BitNet",
        model_types=("bitnet",),
        norm="rms",
        attn_sub_norm="self_attn.attn_sub_norm",
        ffn_sub_norm="mlp.ffn_sub_norm",
    ),
    # the paper's architecture, in its pre-norm sizes
    ModelAdapter(
        name="OPT",
        model_types=("opt",),
        norm="layer",
        layers="model.decoder.layers",
        final_norm="final_layer_norm",
        positions="embed_positions",
        norm1="self_attn_layer_norm",
        norm2="final_layer_norm",
        o="self_attn.out_proj",
        mlp_in=("fc1",),
        down="fc2",
        ffn_field="ffn_dim",
        activation_field="activation_function",
        eps_field=None,
        rejects=_rejects_post_norm,
    ),
)


def adapter_for(config: PretrainedConfig) -> ModelAdapter:
    """Find the adapter that serves `config`.

    Raises: ModelError (E-MODEL-ARCH) naming the architecture, or what in its configuration is not covered.
    """
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
    """List every `model_type` that has an adapter."""
    return [kind for adapter in ADAPTERS for kind in adapter.model_types]


"""One architecture in our words: shape of a layer, paths of its tensors, factors of its configuration.

Every supported layer is the same residual block, so an architecture only names its parts:

    h = x + o(attention(q(n1), k(n1), v(n1)))        n1 = norm1(x)        sites attn_in, q, k, v, o_in
    y = h + down(activation(gate(n2)) * up(n2))      n2 = norm2(h)        sites mlp_in, down_in

Some have no gate, no rotary position, norms of q and k, norms before o and down, norms after attention and MLP in addition to or
in place of those before, n2 = norm2(x), or windows. These differences are fields, not subclasses. Factors that weights can
absorb are folded into them by `core.models.convert`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from core.bits import INPUT_SITE, SITES, expert_site, kind_of

MAX_EXPERTS = 1024
"""Most experts of a layer: more than any published model has."""
HEAD = "lm_head.weight"
"""Name of the output embedding in every supported checkpoint."""
LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of attention that `config.layer_types` may name."""


@dataclass(frozen=True)
class BlockSpec:
    """Shape and kind of one decoder layer.

    Attributes:
        hidden, heads, kv_heads, head_dim, ffn: D, H, Hkv, E, F.
        norm: "rms" or "layer"; eps: its constant.
        activation: name of the element-wise function, as in transformers' table.
        gated: whether down_in = activation(gate) * up.
        rope: whether q and k are rotated by position; qk_norm: whether they are RMS-normalised before that, per head or, with
            wide_qk_norm, over all heads together.
        sub_norms: whether the inputs of o and down are normalised, so that o_in and down_in are those norms' outputs.
        pre_norms: whether attention and MLP read a norm of the residual stream; if not, they read the stream itself.
        post_norms: "output" where the outputs of attention and MLP are normalised, "sum" where the residual sums are, or None.
        parallel: whether the MLP reads the layer's input, as attention does, and not the sum of both.
        rotary: which of the model's rotations this layer uses.
        query_growth: (β, L) where the query at position p is multiplied by 1 + β ln(1 + ⌊p / L⌋), None without.
        softcap: c of c tanh(score / c), None without.
        experts: number of MLPs of width F in place of one, 0 for one MLP; top_k: how many of them a token is sent to;
            norm_top_k: whether the shares of these are divided by their sum.
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
    wide_qk_norm: bool = False
    pre_norms: bool = True
    post_norms: str | None = None
    parallel: bool = False
    rotary: int = 0
    query_growth: tuple[float, int] | None = None
    softcap: float | None = None
    experts: int = 0
    top_k: int = 0
    norm_top_k: bool = False

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the block's sites, in the order in which they appear; each expert has a down_in of its own."""
        return tuple(_by_expert(SITES, ("down_in",), self.experts))

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the block's linear layers; each expert has an up and a down of its own."""
        return tuple(_by_expert(INPUT_SITE, ("up", "down"), self.experts))

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
        }[kind_of(site)]


def _by_expert(names: Iterable[str], own: tuple[str, ...], experts: int) -> Iterator[str]:
    """Yield names, those that each expert has of its own once for each."""
    for name in names:
        yield from (expert_site(name, i) for i in range(experts)) if experts and name in own else (name,)


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of one layer: N of width F, k of which a token is sent to, with shares that add up to 1 or not."""

    count: int
    top_k: int
    ffn: int
    norm_top_k: bool


@dataclass(frozen=True)
class Factors:
    """Numbers that a configuration puts between the parts of a model.

    Attributes:
        embed: multiplies the token embedding. residual: multiplies the outputs of attention and MLP. logits: divides the logits.
        scores: multiplies q kᵀ; None for E**-0.5.
        softcap, logit_softcap: c of c tanh(x / c) on scores and logits, None without.
    """

    embed: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    scores: float | None = None
    softcap: float | None = None
    logit_softcap: float | None = None


@dataclass(frozen=True)
class ModelAdapter:
    """Module paths of one architecture in transformers, relative to a decoder layer.

    Attributes:
        name: the architecture's name for people.
        model_types: `config.model_type` values it serves; serves: of these, the configurations it serves, None for all.
        layers: path of the list of decoder layers in the causal model; embeddings and last norm stand beside that list.
        embed: name of the token embedding beside the layers; final_norm: of the last norm, None without.
        positions: name of the learned position embedding beside the layers, None with rotary positions; its first
            position_offset rows are not used.
        window: which layers `config.sliding_window` limits: "none", "all", or "layer_types", those that this field names.
        partial_rope: whether `partial_rotary_factor` is read: the part of each head, from its start, that is rotated.
        ropes: whether `rope_parameters` has an entry for each layer type; no_rope: field with a 0 for each layer without rope.
        query_growth: whether `rope_parameters` says how queries grow with their position.
        norm1, norm2: norms before attention and MLP; post_norm1, post_norm2: after them; None without. post_norms: as in
            BlockSpec. unit_offset: whether every gain is stored minus one.
        qkv: the linears that are [q; k; v] together; interleaved: whether one stores, key/value head after key/value head, its
            queries, its key and its value.
        kv_heads: function that counts the key/value heads, None where `num_key_value_heads` does; fixed_head: whether the
            size of a head is hidden / heads whatever `head_dim` says.
        mlp_in: the linears that read mlp_in, [gate; up] together, or up without a gate.
        parallel: field that says whether the MLP reads the layer's input.
        experts: function that reads the mixture of experts of a layer, None for a layer without and in architectures without.
        factors: function that reads the factors of a configuration, None where all are neutral.
        rejects: function that returns a sentence for a configuration that is not covered, else None.
    """

    name: str
    model_types: tuple[str, ...]
    norm: str
    serves: Callable[[PretrainedConfig], bool] | None = None
    layers: str = "model.layers"
    embed: str = "embed_tokens"
    final_norm: str | None = "norm"
    positions: str | None = None
    position_offset: int = 0
    window: str = "none"
    partial_rope: bool = False
    ropes: bool = False
    no_rope: str | None = None
    query_growth: bool = False
    norm1: str | None = "input_layernorm"
    norm2: str | None = "post_attention_layernorm"
    post_norm1: str | None = None
    post_norm2: str | None = None
    post_norms: str | None = None
    unit_offset: bool = False
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False
    kv_heads: Callable[[PretrainedConfig], int] | None = None
    fixed_head: bool = False
    o: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    down: str = "mlp.down_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    wide_qk_norm: bool = False
    attn_sub_norm: str | None = None
    ffn_sub_norm: str | None = None
    parallel: str | None = None
    ffn_field: str = "intermediate_size"
    activation_field: str = "hidden_act"
    eps_field: str | None = "rms_norm_eps"
    experts: Callable[[PretrainedConfig, int], Experts | None] | None = None
    factors: Callable[[PretrainedConfig], Factors] | None = None
    rejects: Callable[[PretrainedConfig], str | None] | None = None

    def spec(self, config: PretrainedConfig, layer: int = 0) -> BlockSpec:
        """Read the shape of a decoder layer that `config` describes."""
        heads, kinds = config.num_attention_heads, _rope_kinds(config) if self.ropes else []
        mixture = None if self.experts is None else self.experts(config, layer)
        own = Experts(0, 0, getattr(config, self.ffn_field) or 4 * config.hidden_size, False) if mixture is None else mixture
        return BlockSpec(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=self.kv_heads(config) if self.kv_heads else getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=own.ffn,
            norm=self.norm,
            eps=getattr(config, self.eps_field) if self.eps_field else 1e-5,
            activation=getattr(config, self.activation_field),
            gated=self.gated,
            rope=self.positions is None and bool(self.no_rope is None or getattr(config, self.no_rope)[layer]),
            qk_norm=self.q_norm is not None,
            sub_norms=self.attn_sub_norm is not None,
            wide_qk_norm=self.wide_qk_norm,
            pre_norms=self.norm1 is not None,
            post_norms=self.post_norms,
            parallel=self.parallel is not None and bool(getattr(config, self.parallel)),
            rotary=kinds.index(config.layer_types[layer]) if kinds else 0,
            query_growth=_growth(_rope(config)) if self.query_growth else None,
            softcap=self.factors_of(config).softcap,
            experts=own.count,
            top_k=own.top_k,
            norm_top_k=own.norm_top_k,
        )

    def widest(self, config: PretrainedConfig) -> BlockSpec:
        """Read the shape of the layer with the most experts; where no layer has any, of the first."""
        return max((self.spec(config, i) for i in range(config.num_hidden_layers)), key=lambda spec: spec.experts)

    def factors_of(self, config: PretrainedConfig) -> Factors:
        """Read the factors that `config` states."""
        return Factors() if self.factors is None else self.factors(config)

    def rotations(self, config: PretrainedConfig) -> list[PretrainedConfig]:
        """Return a configuration for each of the model's rotations, with the `rope_parameters` of that one; none with learned
        positions."""
        if self.positions is not None:
            return []
        if not self.ropes:
            return [config]
        made = [copy.copy(config) for _ in _rope_kinds(config)]
        for one, kind in zip(made, _rope_kinds(config), strict=True):
            one.rope_parameters = config.rope_parameters[kind]
        return made

    def rotated(self, config: PretrainedConfig) -> int:
        """Count the channels of each head that are rotated by position."""
        dim = self.spec(config).head_dim
        return int(dim * (_rope(config).get("partial_rotary_factor") or 1.0)) if self.partial_rope else dim

    def keeps_tensors(self, config: PretrainedConfig) -> bool:
        """Say whether blocks hold a checkpoint's tensors as they are stored, so that they can be written under their names."""
        plain = len(self.qkv) == 3 and not self.unit_offset and self.post_norms is None and self.parallel is None
        return plain and self.factors_of(config) == Factors() and self.rotated(config) == self.spec(config).head_dim

    def windows(self, config: PretrainedConfig) -> list[int | None]:
        """Return how many positions a token of each layer attends to, itself included; None for all before it."""
        width = None if self.window == "none" else config.sliding_window
        if self.window != "layer_types":
            return [width] * config.num_hidden_layers
        return [width if kind == "sliding_attention" else None for kind in config.layer_types]

    def has_final_norm(self, config: PretrainedConfig) -> bool:
        """Say whether a norm stands between the last layer and the head."""
        return self.final_norm is not None and not getattr(config, "_remove_final_layer_norm", False)

    def outside(self, config: PretrainedConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
        """List the tensors outside the decoder layers: place in `core.models.decoder.Decoder` → (name in a checkpoint, shape).

        A tied head is listed too; a checkpoint may leave it out.
        """
        stem, hidden = self.layers.rpartition(".")[0], config.hidden_size
        width = getattr(config, "word_embed_proj_dim", hidden)  # OPT's embedding may be narrower than its layers
        found = {"embed.weight": (f"{stem}.{self.embed}.weight", (config.vocab_size, width))}
        if self.positions is not None:
            rows = config.max_position_embeddings + self.position_offset
            found["positions.weight"] = (f"{stem}.{self.positions}.weight", (rows, hidden))
        if width != hidden:
            found["project_in.weight"] = (f"{stem}.project_in.weight", (hidden, width))
            found["project_out.weight"] = (f"{stem}.project_out.weight", (width, hidden))
        if self.has_final_norm(config) and getattr(config, "layer_norm_elementwise_affine", True):
            for leaf in ("weight", "bias") if self.norm == "layer" else ("weight",):
                found[f"norm.{leaf}"] = (f"{stem}.{self.final_norm}.{leaf}", (hidden,))
        return found | {"head.weight": (HEAD, (config.vocab_size, width))}

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """Find the list of decoder layers of a transformers model."""
        return model.get_submodule(self.layers)

    def problem(self, config: PretrainedConfig) -> str | None:
        """Say what in a configuration is not covered, in a sentence; None if all is."""
        if self.window == "layer_types" and (other := set(config.layer_types) - set(LAYER_TYPES)):
            return f"config.json names the layer type {min(other)[:40]!r}: only {' and '.join(LAYER_TYPES)} are supported."
        spec = self.spec(config)
        if self.fixed_head and spec.head_dim != spec.hidden // spec.heads:
            return f"config.json says head_dim = {spec.head_dim}, which this architecture does not support."
        parts = [_rope(one).get("partial_rotary_factor") or 1.0 for one in self.rotations(config)]
        part, rotated = next((part for part in parts if part != 1), 1), self.rotated(config)
        if part != 1 and not self.partial_rope or parts and (not rotated or rotated % 2 or spec.head_dim % 2):
            return f"config.json says partial_rotary_factor = {str(part)[:20]}, which this architecture does not support."
        for name, value in vars(self.factors_of(config)).items():
            if value is not None and not 0 < value < math.inf:
                return f"config.json gives the factor {name} the value {str(value)[:20]}: it must be above 0."
        beta, length = spec.query_growth or (0.0, 1)
        if type(beta) not in (int, float) or type(length) is not int or not 0 <= beta < math.inf or length < 1:
            return (f"config.json says llama_4_scaling_beta = {str(beta)[:20]} with original_max_position_embeddings = "
                    f"{str(length)[:20]}: numbers above 0 are needed.")
        if self.no_rope is not None and len(getattr(config, self.no_rope)) != config.num_hidden_layers:
            return f"config.json lists {len(getattr(config, self.no_rope))} {self.no_rope} for {config.num_hidden_layers} layers."
        for layer in range(config.num_hidden_layers if self.experts else 0):
            spec = self.spec(config, layer)
            if spec.experts and not 1 <= spec.top_k <= spec.experts <= MAX_EXPERTS:
                said = f"{str(spec.top_k)[:20]} of {str(spec.experts)[:20]} experts"
                return f"config.json sends a token to {said}: use 1 up to all, of at most {MAX_EXPERTS}."
        return None if self.rejects is None else self.rejects(config)


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return `rope_parameters`, empty where there are none."""
    return getattr(config, "rope_parameters", None) or {}


def _growth(rope: dict[str, Any]) -> tuple[float, int] | None:
    """Read β and L of `BlockSpec.query_growth`; None where β is 0 or not stated."""
    beta = rope.get("llama_4_scaling_beta")
    return (beta, rope.get("original_max_position_embeddings")) if beta else None


def _rope_kinds(config: PretrainedConfig) -> list[str]:
    """List the layer types of a model whose rotation depends on them, each once."""
    return sorted(set(config.layer_types))

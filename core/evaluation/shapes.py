"""Find the sizes of a model by name, by numbers, or from a `config.json`, without its weights.

Raw configurations of dense decoders are read by the names that their families use for the same size; families without a gate
have two feed-forward matrices, all others three. Parameters count matrices, embeddings, biases and norms:

    P = L (2 D H E + 2 D Hkv E + n D F) + small + V D (twice if the head is its own) + positions

Source: the configuration classes of transformers; OPT: arXiv:2205.01068, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import InputError, ModelError

if TYPE_CHECKING:  # commands and pages that only project do not load torch
    from core.models.adapter import BlockSpec
    from core.report import ModelInfo

MAX_SIZE = 2**24
OPT_POSITION_OFFSET = 2
"""Rows that OPT's position embedding has beyond the number of positions."""


@dataclass(frozen=True)
class Shape:
    """Sizes that memory depends on. `ffn_matrices` is 2 for up/down, 3 with a gate; `tied` shares embedding and head.

    `experts`: MLPs of each layer, 0 for one that is no mixture; `top_k`: those that a token is sent to.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    ffn_matrices: int = 2
    positions: int = 0
    tied: bool = True
    experts: int = 0
    top_k: int = 0

    @property
    def decoder_weights(self) -> int:
        """Number of entries in all layers' weight matrices, to which the bits of the weights apply."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return self.layers * (attention + max(1, self.experts) * self.ffn_matrices * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """Number of parameters: with biases and LayerNorms for two feed-forward matrices (OPT), RMSNorms for three (Llama)."""
        biased = self.ffn_matrices == 2
        small = 9 * self.hidden + self.ffn if biased else (2 + self.experts) * self.hidden  # OPT: F = 4 D, so 13 D
        embeddings = self.vocab * (1 if self.tied else 2) + self.positions
        return self.decoder_weights + self.layers * small + embeddings * self.hidden + (2 if biased else 1) * self.hidden


def _opt(layers: int, hidden: int, heads: int) -> Shape:
    return Shape(layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50272, positions=2050)


SHAPES: dict[str, Shape] = {
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "llama-3-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, ffn_matrices=3, tied=False),
    **dict.fromkeys(("smollm2-135m", "smollm2-135m-q4_1"), Shape(30, 576, 9, 3, 64, 1536, 49152, ffn_matrices=3)),
}
"""Published shapes (OPT: arXiv:2205.01068, table 1)."""

_FIELDS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size",),
}
"""Names of a size in the configurations of dense decoders; all four must be there."""
_FFN = ("ffn_hidden_size", "intermediate_size", "ffn_dim", "n_inner")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_UNGATED = {"opt", "gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "bloom", "falcon", "mpt", "phi", "codegen", "starcoder2"}
"""Families with two feed-forward matrices."""
_UNTIED = {"llama", "mistral", "qwen2", "qwen3", "bitnet", "gpt_neox", "gptj", "phi", "phi3", "codegen", "stablelm", "olmo2",
           "granite", "ministral", "ministral3", "olmo3", "mixtral", "qwen3_moe", "olmoe"}
"""Families whose head is a matrix of its own where the configuration does not say."""
_POSITIONS = {"opt": "max_position_embeddings", "gpt_neo": "max_position_embeddings"} | dict.fromkeys(
    ("gpt2", "gpt_bigcode"), "n_positions"
)
"""Families with a learned position embedding, and the field of its length."""
_MIXTURES = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size", "olmoe": "intermediate_size"}
"""Families of mixtures that are counted, and the name of the width of one expert."""
_EXPERTS = ("num_experts", "num_local_experts")
_UNCOUNTED = (*_EXPERTS, "n_routed_experts", "kv_lora_rank", "state_size", "is_encoder_decoder")
"""Fields of models that the formula does not describe: other experts, latent attention, state spaces, encoders."""


def config_shape(config: Mapping[str, Any]) -> Shape:
    """Read the shape that a raw `config.json` of a dense decoder, or of a mixture of experts in every layer, describes.

    Raises: ModelError E-MODEL-BAD for a size that is missing or no size; -SIZE above a cap; -ARCH for a model with other experts,
        latent attention, an encoder, or no attention.
    """
    from core.models.io.preflight.config import check_sizes

    inner = config.get("text_config")  # of a model that reads images too
    outer = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    config = {**inner, **outer} if isinstance(inner, Mapping) else config
    check_sizes(config)
    kind = str(config.get("model_type"))
    mixture = kind in _MIXTURES
    for name in _UNCOUNTED[len(_EXPERTS) if mixture else 0 :]:
        if config.get(name) and (config[name] is True or config[name] != 1):
            families = ", ".join(_MIXTURES)
            rule = f"only dense decoders and mixtures of {families} are counted. Choose another model."
            raise ModelError(f"config.json says {name} = {str(config[name])[:30]}: {rule}", code="E-MODEL-ARCH")
    if mixture and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise ModelError(
            "config.json gives experts to some layers only: only mixtures in every layer are counted. Choose another model.",
            code="E-MODEL-ARCH",
        )
    names = {**_FIELDS, "experts": _EXPERTS, "top_k": ("num_experts_per_tok",), "ffn": (_MIXTURES[kind],)} if mixture else _FIELDS
    found = {size: _size(config, stated) for size, stated in names.items()}
    if missing := [names[size][0] for size, value in found.items() if not value]:
        raise ModelError(
            f"config.json has no {missing[0]}: it describes no decoder that is counted. Choose another model.", code="E-MODEL-BAD"
        )
    hidden, heads = found["hidden"], found["heads"]
    shared = config.get("multi_query", kind == "falcon") and not config.get("new_decoder_architecture")
    rows = _size(config, (_POSITIONS.get(kind, ""),))
    return Shape(
        **{"ffn": _size(config, _FFN) or 4 * hidden, **found},
        kv_heads=1 if shared else _size(config, _KV_HEADS) or heads,
        head_dim=_size(config, ("head_dim",)) or max(1, hidden // heads),
        ffn_matrices=2 if kind in _UNGATED else 3,
        positions=rows + OPT_POSITION_OFFSET * (kind == "opt"),
        tied=bool(config.get("tie_word_embeddings", kind not in _UNTIED)),
    )


def _size(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the first of some fields that is stated, 0 where none is. Raises: ModelError E-MODEL-BAD if it is no size."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        return 0
    value = config[name]
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise ModelError(
            f"config.json says {name} = {str(value)[:30]}: it must be a whole number from 1 to {MAX_SIZE:,}.", code="E-MODEL-BAD"
        )
    return value


def shape_of(spec: BlockSpec, layers: int, vocab: int, *, tied: bool, positions: int = 0) -> Shape:
    """Make the shape of a model of `layers` equal decoder layers; `positions`: rows of a learned position embedding."""
    size = (spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn)
    matrices, mixture = 3 if spec.gated else 2, (spec.experts, spec.top_k)
    return Shape(layers, *size, vocab, matrices, positions, tied, *mixture)


def shape_of_loaded(info: ModelInfo) -> Shape:
    """Make the shape of a loaded model from its report."""
    size = (info.hidden, info.heads, info.kv_heads, info.head_dim, info.ffn)
    matrices, mixture = 3 if info.gated else 2, (info.experts, info.top_k)
    return Shape(info.layers, *size, info.vocab, matrices, info.positions, info.tied, *mixture)


def model_shape(name: str, *, allow_local: bool = True) -> Shape:
    """Find the shape of a named size, of numbers, or of a model by its `config.json` alone: embedded, local, or on the Hub.

    Args: allow_local: whether folders and files of this machine may be named.
    Raises: InputError for a name that is none of these; ModelError for a model that is refused, or not found.
    """
    try:
        return find_shape(name)
    except InputError:
        from core.models.io.catalog import read_config

        config = read_config(name, allow_local=allow_local)
        if config is None:
            raise
        return config_shape(config)


def find_shape(name: str) -> Shape:
    """Find a named shape, or read one written as layers=..,hidden=..,heads=..[,kv_heads=..,ffn=..,vocab=..].

    Raises: InputError naming the known shapes, or the numbers that do not divide.
    """
    key = name.strip().lower().removeprefix("facebook/") if isinstance(name, str) else ""
    if key in SHAPES:
        return SHAPES[key]
    values = {}
    for part in key.split(","):
        field, _, number = part.partition("=")
        if not (number.isascii() and number.isdigit() and 0 < len(number) < 10 and int(number) > 0):
            break
        values[field.strip()] = int(number)
    else:
        if {"layers", "hidden", "heads"} <= set(values) <= set(Shape.__dataclass_fields__):
            return _own_shape(**values)
    raise InputError(
        f"Shape {str(name)[:40]!r} is not known: use one of {', '.join(SHAPES)}, layers=32,hidden=4096,heads=32, a folder "
        "or owner/name.",
        code="E-PARAM-MODEL",
    )


def _own_shape(*, hidden: int, heads: int, **others: int) -> Shape:
    """Make a shape from numbers; numbers left out follow OPT's rules."""
    kv_heads = others.setdefault("kv_heads", heads)
    for name, whole, by, parts in (("hidden", hidden, "heads", heads), ("heads", heads, "kv_heads", kv_heads)):
        if whole % parts and not (name == "hidden" and "head_dim" in others):
            raise InputError(
                f"{name}={whole} is not a multiple of {by}={parts}: choose numbers that divide.", code="E-PARAM-MODEL"
            )
    defaults = {"head_dim": hidden // heads, "ffn": 4 * hidden, "vocab": 50272}
    return Shape(hidden=hidden, heads=heads, **(defaults | others))



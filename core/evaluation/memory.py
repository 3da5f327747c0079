"""Count the bytes of a model: measured from its tensors, or projected by formula to any shape.

Measured: every distinct tensor once (tied embeddings count once), by part. Formula, for L layers of width D with
feed-forward width F at batch B and sequence T, in the published accounting (every parameter at the weights' bits; one
layer's widest live tensors):

    weights      P bits_w / 8        P = all parameters; OPT: L (12 D² + 13 D) + (V + 2050) D + 2 D
    kv cache     L B T Hkv E (bits_k + bits_v) / 8
    activations  B T (F bits_down_in + H E bits_o_in) / 8

Source: RPTQ (arXiv:2304.01089), memory comparison; docs/rptq.md lists the cells this reproduces.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from core.checks import FLOAT_BITS
from core.errors import InputError
from core.recipe import INPUT_SITE, SCHEMES, SITES, Bits

if TYPE_CHECKING:  # the formula needs neither module: the page and commands that only project do not load torch
    from torch import Tensor, nn

    from core.models.architectures import BlockSpec
    from core.models.decoder import CausalModel
    from core.recipe import QuantRecipe
    from core.report import ModelInfo


OPT_POSITION_OFFSET = 2
"""Rows that OPT's position embedding has beyond the number of positions."""


@dataclass(frozen=True)
class Shape:
    """Sizes that memory depends on. `ffn_matrices` is 2 for up/down, 3 with a gate; `tied` shares embedding and head."""

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

    @property
    def decoder_weights(self) -> int:
        """Number of entries in all layers' weight matrices, to which the bits of the weights apply."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return self.layers * (attention + self.ffn_matrices * self.hidden * self.ffn)

    @property
    def parameters(self) -> int:
        """Number of parameters: with biases and LayerNorms for two feed-forward matrices (OPT), RMSNorms for three (Llama)."""
        biased = self.ffn_matrices == 2
        small = 9 * self.hidden + self.ffn if biased else 2 * self.hidden  # OPT: F = 4 D, so 13 D
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
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, ffn_matrices=3),
}
"""Published shapes (OPT: arXiv:2205.01068, table 1)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by formula; `assumptions` says what they leave out."""

    weights: int
    kv_cache: int
    activations: int
    total: int
    label: str
    assumptions: str

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON types."""
        return asdict(self)


def shape_of(spec: BlockSpec, layers: int, vocab: int, *, tied: bool, positions: int = 0) -> Shape:
    """Make the shape of a model of `layers` equal decoder layers; `positions`: rows of a learned position embedding."""
    size = (spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn)
    return Shape(layers, *size, vocab, ffn_matrices=3 if spec.gated else 2, positions=positions, tied=tied)


def shape_of_loaded(info: ModelInfo) -> Shape:
    """Make the shape of a loaded model from its report."""
    size = (info.hidden, info.heads, info.kv_heads, info.head_dim, info.ffn)
    return Shape(
        info.layers, *size, info.vocab, ffn_matrices=3 if info.gated else 2, positions=info.positions, tied=info.tied
    )


def position_rows(spec: BlockSpec, context: int) -> int:
    """Count the rows of a learned position embedding; 0 where positions are rotary."""
    return 0 if spec.rope else context + OPT_POSITION_OFFSET


def model_shape(name: str) -> Shape:
    """Find the shape of a named size, or of an embedded or local model (float or quantised) from its configuration alone.

    Raises: InputError for a name that is neither; ModelError for a model that is refused.
    """
    try:
        return find_shape(name)
    except InputError:
        from core.models.io.catalog import is_here

        if not is_here(name):
            raise
        from core.models.io.load import read_config

        config, adapter = read_config(name)
        spec = adapter.spec(config)
        tied = bool(getattr(config, "tie_word_embeddings", False))
        positions = position_rows(spec, config.max_position_embeddings)
        return shape_of(spec, config.num_hidden_layers, config.vocab_size, tied=tied, positions=positions)


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
        f"Shape {str(name)[:40]!r} is not known: use one of {', '.join(SHAPES)}, layers=32,hidden=4096,heads=32, or a folder.",
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


def estimate(shape: Shape, bits: Bits, *, batch: int, sequence: int, label: str = "") -> MemoryEstimate:
    """Project memory by formula. Scales, zero points and the runtime's own buffers are not included.

    Raises: InputError if batch or sequence is outside 1 … 10**7.
    """
    for name, value in (("batch", batch), ("sequence", sequence)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**7:
            raise InputError(
                f"{name} is {str(value)[:40]!r}: use a whole number from 1 to 10000000.", code=f"E-PARAM-{name.upper()}"
            )
    weights = shape.parameters * bits.weights // 8
    tokens = batch * sequence
    cache = shape.layers * tokens * shape.kv_heads * shape.head_dim * (bits.k + bits.v) // 8
    activations = tokens * (shape.ffn * bits.down_in + shape.heads * shape.head_dim * bits.o_in) // 8
    return MemoryEstimate(
        weights,
        cache,
        activations,
        weights + cache + activations,
        label,
        "Formula, published accounting: every parameter at the weight bits, keys and values at theirs, one layer's "
        "activations; scales, zero points and runtime buffers left out.",
    )


def recipe_bytes(shape: Shape, recipe: QuantRecipe) -> tuple[float, float]:
    """Project what a quantised model stores: (bytes of the model, bytes of keys and values per token).

    Every weight row has one scale and one zero point per cluster of its input; embeddings, head and norms stay in float32. These
    are the bytes of the tensors, or the most that they can be: KMeans may give fewer clusters than asked for, and zero points of
    8-bit weights and of the official rules, counted as int16, may fit in int8.
    """
    layers = [recipe.for_layer(index) for index in range(shape.layers)]
    float_parts = 4.0 * (shape.parameters - shape.decoder_weights)
    weights = sum(linear_bytes(shape, name, own) for own in layers for name in INPUT_SITE)
    grids = sum(_grid_bytes(shape, own) for own in layers)
    return float_parts + weights + grids, float(sum(cache_bytes(shape, own.tensor_bits) for own in layers))


def total_bytes(shape: Shape, recipe: QuantRecipe, context: int) -> int:
    """Count the bytes of a recipe's model and of the keys and values of `context` tokens, as stored."""
    stored, per_token = recipe_bytes(shape, recipe)
    return math.ceil(stored + context * per_token)


def decoder_bytes(shape: Shape, recipe: QuantRecipe) -> float:
    """Count the bytes of all layers' weight matrices at a recipe's bits, without scales."""
    layers = [recipe.for_layer(index).tensor_bits for index in range(shape.layers)]
    return sum(bits.weight(name) * math.prod(size) / 8 for bits in layers for name, size in _matrices(shape).items())


def linear_bytes(shape: Shape, name: str, recipe: QuantRecipe) -> int:
    """Count the bytes of one linear layer's weights by its layer's recipe, with scales, zero points and cluster offsets."""
    rows, columns = _matrices(shape)[name]
    bits, groups = recipe.tensor_bits.weight(name), _groups(shape, recipe)[INPUT_SITE[name]]
    offsets = 4 * (groups + 1)
    if bits >= FLOAT_BITS:
        return 4 * rows * columns + offsets
    official = recipe.method == "rptq" and recipe.variant == "official"
    scale, zero = 4 if official else 2, 2 if official or bits == 8 else 1
    return rows * (math.ceil(columns * bits / 8) + (scale + zero) * groups) + offsets


def cache_bytes(shape: Shape, bits: Bits) -> float:
    """Count the bytes of one token's keys and values in one layer: float32 where either of them is not quantised."""
    cached = [32, 32] if FLOAT_BITS in (bits.k, bits.v) else [bits.k, bits.v]
    return shape.kv_heads * sum(math.ceil(shape.head_dim * own / 8) for own in cached)


def _matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each fused linear layer."""
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv": (heads + 2 * kv_heads, shape.hidden),
        "o": (shape.hidden, heads),
        "up": ((shape.ffn_matrices - 1) * shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
    }


def _grid_bytes(shape: Shape, recipe: QuantRecipe) -> int:
    """Count the bytes of one layer's activation grids, and of the orders in which its norms and heads put their channels."""
    bits, groups = recipe.tensor_bits, _groups(shape, recipe)
    if recipe.method == "bitnet":
        return 0
    grids = sum(8 * groups[site] + 4 * (groups[site] + 1) for site in SITES if bits.site(site) < FLOAT_BITS)
    if recipe.method != "rptq":
        return grids
    rotated = shape.positions == 0 and min(bits.q, bits.k) < FLOAT_BITS
    return grids + 4 * (2 * shape.hidden + (shape.kv_heads * shape.head_dim if rotated else 0))


def _groups(shape: Shape, recipe: QuantRecipe) -> dict[str, int]:
    """Count the clusters of each site."""
    if recipe.method != "rptq" and recipe.variant != "matched":
        return dict.fromkeys(SITES, 1)
    c = recipe.clusters
    per_head = {"q": c.R2, "k": c.R2, "v": c.R3, "o_in": c.R3}
    whole = {"attn_in": min(c.R1, shape.hidden), "mlp_in": min(c.R4, shape.hidden), "down_in": min(c.R5, shape.ffn)}
    heads = {site: shape.kv_heads if site in ("k", "v") else shape.heads for site in per_head}
    return whole | {site: heads[site] * min(count, shape.head_dim) for site, count in per_head.items()}


def memory_estimate(name: str, scheme: str, *, batch: int, sequence: int) -> MemoryEstimate:
    """Project the memory of a model by name (`model_shape`) under a scheme; "W16A16" is the float baseline."""
    known = {**SCHEMES, "W16A16": Bits()}
    if scheme not in known:
        raise InputError(f"scheme is {str(scheme)[:40]!r}: use one of {', '.join(known)}.", code="E-PARAM-SCHEME")
    return estimate(model_shape(name), known[scheme], batch=batch, sequence=sequence, label=f"{name} {scheme}")


def measured_parts(model: CausalModel) -> dict[str, int]:
    """Count the bytes of a model's tensors by part, each distinct storage once; working copies of backends are left out."""
    parts = {
        "packed weights": 0,
        "scales and zero points": 0,
        "decoder weights (float)": 0,
        "embeddings and head (float)": 0,
        "norms, biases and orders": 0,
    }
    seen: set[int] = set()
    for module in model.blocks.modules():
        for name, tensor in _own_tensors(module):
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            parts[_part(module, name, tensor)] += _nbytes(tensor)
    for module in model.modules():
        for _, tensor in _own_tensors(module):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                large = tensor.dim() == 2
                parts["embeddings and head (float)" if large else "norms, biases and orders"] += _nbytes(tensor)
    return {name: value for name, value in parts.items() if value}


def working_bytes(model: CausalModel) -> int:
    """Count the bytes of the backends' working copies that exist right now."""
    from core.models.io.quantized import modules_of

    return sum(m.working_bytes for m in modules_of(model))


def kv_bytes_per_token(model: CausalModel) -> int:
    """Count the stored bytes of one token's keys and values over all layers; a first token with bits of its own is left out."""
    spec = model.blocks[0].spec
    layers = model.decoder.new_cache().layers
    return sum(layer.bytes_per_token(spec.kv_heads, spec.head_dim, model.dtype.itemsize) for layer in layers)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    persistent = [(n, t) for n, t in module._buffers.items() if t is not None and n not in module._non_persistent_buffers_set]
    return [(n, t) for n, t in module._parameters.items() if t is not None] + persistent


def _part(module: nn.Module, name: str, tensor: Tensor) -> str:
    if name == "packed":
        return "packed weights"
    if name in ("weight_scale", "weight_zero", "scale", "zero_point", "bounds"):
        return "scales and zero points"
    return "decoder weights (float)" if tensor.dim() == 2 and name == "weight" else "norms, biases and orders"


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from core.checks import FLOAT_BITS, require_choice
from core.errors import InputError
from core.evaluation.shapes import Shape, find_shape
from core.recipe import INPUT_SITE, SCHEMES, SITES, Bits

if TYPE_CHECKING:  # the formula needs neither module: the page and commands that only project do not load torch
    from torch import Tensor, nn

    from core.models.decoder import CausalModel
    from core.recipe import QuantRecipe

PROJECTED: dict[str, Bits] = {"W16A16": Bits(), **SCHEMES}
"""Bits of every scheme that memory is projected for, the unquantised model first."""

ASSUMPTIONS = (
    "Formula, published accounting: every parameter at the weight bits, keys and values at theirs, one layer's activations; "
    "scales, zero points and runtime buffers left out."
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by formula of a scheme at a batch and a sequence length; `ASSUMPTIONS` says what they leave out."""

    scheme: str
    batch: int
    sequence: int
    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.kv_cache + self.activations

    def to_dict(self) -> dict[str, object]:
        """Return the fields and the total as JSON types."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Claim:
    """A published statement about memory, and the two projections whose difference it speaks of.

    Attributes:
        said: the statement. model: a name of `SHAPES`.
        before, after: schemes. batch, sequence: where it was made.
    """

    said: str
    model: str
    before: str
    after: str
    batch: int = 64
    sequence: int = 8192

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return find_shape(self.model)

    def check(self) -> tuple[MemoryEstimate, MemoryEstimate]:
        """Compute both projections: (before, after)."""
        before, after = memory_grid(self.shape, (self.before, self.after), (self.batch,), (self.sequence,))
        return before, after


CLAIMS = (
    Claim("over 900 GB saved", "opt-66b", "W4A16", "W4A4"),
    Claim("up to 80 % less memory", "opt-175b", "W16A16", "W4A3KV"),
)
"""The statements on memory of RPTQ (arXiv:2304.01089, abstract and introduction)."""


def memory_grid(
    shape: Shape, schemes: Sequence[str], batches: Sequence[int], sequences: Sequence[int]
) -> list[MemoryEstimate]:
    """Project memory for every scheme (of `PROJECTED`), batch and sequence length, the sequence length changing fastest.

    Raises: InputError for an unknown scheme, or a batch or sequence outside 1 … 10**7.
    """
    known = [(name, PROJECTED[require_choice("scheme", name, tuple(PROJECTED))]) for name in schemes]
    return [
        estimate(shape, bits, batch=batch, sequence=sequence, scheme=scheme)
        for scheme, bits in known
        for batch in batches
        for sequence in sequences
    ]


def estimate(shape: Shape, bits: Bits, *, batch: int, sequence: int, scheme: str = "custom") -> MemoryEstimate:
    """Project memory by formula. Scales, zero points and the runtime's own buffers are not included.

    Raises: InputError if batch or sequence is outside 1 … 10**7.
    """
    for name, value in (("batch", batch), ("sequence", sequence)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**7:
            raise InputError(
                f"{name} is {str(value)[:40]!r}: use a whole number from 1 to 10000000.", code=f"E-PARAM-{name.upper()}"
            )
    tokens = batch * sequence
    cache = shape.layers * tokens * shape.kv_heads * shape.head_dim * (bits.k + bits.v) // 8
    activations = tokens * (max(1, shape.top_k) * shape.ffn * bits.down_in + shape.heads * shape.head_dim * bits.o_in) // 8
    return MemoryEstimate(scheme, batch, sequence, shape.parameters * bits.weights // 8, cache, activations)


def largest_batch(shape: Shape, scheme: str, *, sequence: int, memory: int) -> int:
    """Count the sequences of so many tokens that fit into `memory` bytes beside the weights; 0 if not even one does."""
    (one,) = memory_grid(shape, (scheme,), (1,), (sequence,))
    return max(0, memory - one.weights) // max(1, one.kv_cache + one.activations)


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
    return float_parts + weights + grids, float(sum(cache_bytes(shape, own.tensor_bits, kv_scale_bytes(own)) for own in layers))


def total_bytes(shape: Shape, recipe: QuantRecipe, context: int) -> int:
    """Count the bytes of a recipe's model and of the keys and values of `context` tokens, as stored."""
    stored, per_token = recipe_bytes(shape, recipe)
    return math.ceil(stored + context * per_token)


def decoder_bytes(shape: Shape, recipe: QuantRecipe) -> float:
    """Count the bytes of all layers' weight matrices at a recipe's bits, without scales."""
    layers = [recipe.for_layer(index).tensor_bits for index in range(shape.layers)]
    sizes = {name: math.prod(size) * linear_copies(shape, name) for name, size in linear_sizes(shape).items()}
    return sum(bits.weight(name) * size / 8 for bits in layers for name, size in sizes.items())


def linear_bytes(shape: Shape, name: str, recipe: QuantRecipe) -> int:
    """Count the bytes of one linear layer's weights, those of all experts, by its layer's recipe, with scales, zero points and
    cluster offsets."""
    return linear_copies(shape, name) * _linear_bytes(shape, name, recipe)


def _linear_bytes(shape: Shape, name: str, recipe: QuantRecipe) -> int:
    rows, columns = linear_sizes(shape)[name]
    bits, groups = recipe.tensor_bits.weight(name), _groups(shape, recipe)[INPUT_SITE[name]]
    if recipe.plus is not None:
        size = recipe.plus.group or (columns if recipe.by_token(INPUT_SITE[name]) else 0)
        groups = math.ceil(columns / size) if size else groups
    offsets = 4 * (groups + 1)
    if bits >= FLOAT_BITS:
        return 4 * rows * columns + offsets
    official = recipe.method == "rptq" and recipe.variant == "official"
    scale, zero = 4 if official else 2, 2 if official or bits == 8 else 1
    return rows * (math.ceil(columns * bits / 8) + (scale + zero) * groups) + offsets


def cache_bytes(shape: Shape, bits: Bits, scale_bytes: int = 0) -> float:
    """Count the bytes of one token's keys and values in one layer: float32 where either of them is not quantised.

    Args: scale_bytes: of each head's scale, where it is stored with the token (`kv_scale_bytes`).
    """
    if FLOAT_BITS in (bits.k, bits.v):
        return shape.kv_heads * 2 * 4 * shape.head_dim
    return shape.kv_heads * sum(math.ceil(shape.head_dim * own / 8) + scale_bytes for own in (bits.k, bits.v))


def kv_scale_bytes(recipe: QuantRecipe) -> int:
    """Return the bytes of the scale that each head of each token has: 0 where scales are known in advance."""
    return 2 if recipe.rotation is not None and recipe.rotation.kv == "token" else 0


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each fused linear layer."""
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv": (heads + 2 * kv_heads, shape.hidden),
        "o": (shape.hidden, heads),
        "up": ((shape.ffn_matrices - 1) * shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
    }


def linear_copies(shape: Shape, name: str) -> int:
    """Count how often a layer has the linear layer of this name: once for each expert of a mixture."""
    return shape.experts if shape.experts and name in ("up", "down") else 1


def layer_floats(shape: Shape) -> int:
    """Count the entries of one layer's weight matrices."""
    return sum(rows * columns * linear_copies(shape, name) for name, (rows, columns) in linear_sizes(shape).items())


def _grid_bytes(shape: Shape, recipe: QuantRecipe) -> int:
    """Count the bytes of one layer's activation grids, and of the orders in which its norms and heads put their channels."""
    bits, groups = recipe.tensor_bits, _groups(shape, recipe)
    if recipe.method == "bitnet":
        return 0
    if recipe.rotation is not None:
        width, static = shape.kv_heads * shape.head_dim, recipe.rotation.kv == "static"
        mean = 4 * width if recipe.rotation.key_mean and min(bits.q, bits.k) < FLOAT_BITS else 0
        return mean + sum(12 * width + 4 for own in (bits.k, bits.v) if static and own < FLOAT_BITS)
    copies = {site: linear_copies(shape, name) for name, site in INPUT_SITE.items()}  # every expert has grids of its own
    static = [site for site in SITES if bits.site(site) < FLOAT_BITS and not recipe.by_token(site)]
    grids = sum(copies.get(site, 1) * (8 * groups[site] + 4 * (groups[site] + 1)) for site in static)
    if recipe.method != "rptq":
        return grids
    rotated = shape.positions == 0 and min(bits.q, bits.k) < FLOAT_BITS
    norms = sum(name in recipe.reorderings for name in ("R1", "R4"))
    stored = norms * shape.hidden if recipe.order == "layer" else 0
    if recipe.plus is not None and recipe.plus.key_mean and min(bits.q, bits.k) < FLOAT_BITS:
        grids += 4 * shape.kv_heads * shape.head_dim
    return grids + 4 * (stored + (shape.kv_heads * shape.head_dim if rotated else 0))


def _groups(shape: Shape, recipe: QuantRecipe) -> dict[str, int]:
    """Count the clusters of each site: those of the weights that read it."""
    if recipe.rotation is not None:
        columns = {site: linear_sizes(shape)[name][1] for name, site in INPUT_SITE.items()}
        return {site: math.ceil(width / (recipe.rotation.group or width)) for site, width in columns.items()}
    if recipe.method != "rptq" and recipe.variant != "matched":
        return dict.fromkeys(SITES, 1)
    c = recipe.clusters
    per_head = {"q": c.R2, "k": c.R2, "v": c.R3, "o_in": c.R3}
    whole = {"attn_in": min(c.R1, shape.hidden), "mlp_in": min(c.R4, shape.hidden), "down_in": min(c.R5, shape.ffn)}
    heads = {site: shape.kv_heads if site in ("k", "v") else shape.heads for site in per_head}
    return whole | {site: heads[site] * min(count, shape.head_dim) for site, count in per_head.items()}


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


def module_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's tensors, each distinct storage once, without working copies of backends."""
    found = {tensor.data_ptr(): tensor for part in module.modules() for _, tensor in _own_tensors(part)}
    return sum(map(_nbytes, found.values()))


def working_bytes(model: CausalModel) -> int:
    """Count the bytes of the backends' working copies that exist right now."""
    from core.models.io.quantized import modules_of

    return sum(m.working_bytes for m in modules_of(model))


def held_bytes(model: CausalModel) -> int:
    """Count the bytes of a model in memory: its tensors and the backends' working copies."""
    return sum(measured_parts(model).values()) + working_bytes(model)


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
    if name in ("weight_scale", "weight_zero", "zero_point", "bounds") or name.startswith("scale"):
        return "scales and zero points"
    return "decoder weights (float)" if tensor.dim() == 2 and name in ("weight", "router") else "norms, biases and orders"


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

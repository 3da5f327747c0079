"""Choose bits of every layer's weights, keys and values for a budget of bytes, from predicted costs.

With c(p, b) the predicted divergence of part p at b bits and s(p, b) its bytes,

    least Σ c(p, b_p)  where  Σ s(p, b_p) <= budget        or       least Σ s(p, b_p)  where  Σ c(p, b_p) <= bound

both solved exactly (`core.probe.knapsack`). Parts are the four linear layers and the cache of each layer, keys and values being
one part with two numbers of bits. Bytes are those of the stored tensors (`recipe_bytes`) plus the cache of a stated number of
tokens. Activations take no stored bytes. They keep the recipe's bits, or share as many bits per token in all among the layers,
the same problem once more with s(p, b) the bits of a site's channels. Their cost is in every sum.

Predictions scatter, most where they are smallest, and the best of many choices is found where they err downwards: so the choice
takes fewer bits of a part to cost at least what more bits do. What is reported is the sum of the predictions as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, product

from core.checks import FLOAT_BITS, require_float
from core.errors import InputError
from core.evaluation.memory import cache_bytes, kv_scale_bytes, linear_bytes, total_bytes
from core.evaluation.shapes import Shape
from core.overrides import Overrides
from core.probe.knapsack import choose
from core.probe.plans import cell_name
from core.probe.report import CONTEXT, Allocation, GroupCount, Prediction, Uniform, require_context
from core.progress import Progress, part, silent
from core.recipe import INPUT_SITE, PER_CHANNEL, Bits, Clusters, QuantRecipe

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Bits that a part may have."""
CACHE, ACTIVATIONS = ("k", "v"), ("attn_in", "q", "o_in", "mlp_in", "down_in")
"""Sites that are stored, and sites that are not."""

Predict = Callable[[QuantRecipe, Progress], Prediction]
"""Predicts the cost of a recipe on one probe: `core.probe.predict` with its first arguments."""


@dataclass(frozen=True)
class _Table:
    """Predicted costs of a recipe by part and bits.

    Attributes:
        weights, cache, sites: whether bits of weights, and of keys and values, are chosen; the activations whose are.
        costs: by name of the part and bits. fixed: of all other parts. recipes: with these bits everywhere.
    """

    recipe: QuantRecipe
    weights: bool
    cache: bool
    sites: tuple[str, ...]
    costs: dict[str, dict[int, float]]
    fixed: float
    recipes: dict[int, QuantRecipe]

    @property
    def falling(self) -> dict[str, dict[int, float]]:
        """The costs, raised where needed so that they never rise with the bits."""
        return {
            name: dict(zip(BITS, [*accumulate((own[bits] for bits in reversed(BITS)), max)][::-1], strict=True))
            for name, own in self.costs.items()
        }

    def sum(self, bits: Mapping[str, int]) -> float:
        """Return the predicted divergence of a choice of bits for every part."""
        return self.fixed + math.fsum(self.costs[name][value] for name, value in bits.items())


def allocate(
    predict: Predict,
    shape: Shape,
    recipe: QuantRecipe,
    *,
    budget: float | None = None,
    bound: float | None = None,
    context: int = CONTEXT,
    activations: bool = False,
    progress: Progress = silent,
) -> Allocation:
    """Choose bits of every layer's weights, keys and values. What a recipe keeps in float stays in float.

    Args:
        recipe: everything else; bits that it gives weights, keys and values of single layers are chosen anew.
        activations: choose bits of the activations too, as many per token in all as the recipe has.
        budget: bytes of the model and of the cache of `context` tokens; None with no `bound`: those of `recipe`.
        bound: nats per token; the fewest bytes within it are chosen.
    Raises: InputError where the budget is too small, the bound too strict, or nothing can be chosen.
    """
    require_context(context)
    if budget is not None and bound is not None:
        raise InputError("A budget and a bound are given: give one of them.", code="E-PARAM-BUDGET")
    if bound is None:
        budget = total_bytes(shape, recipe, context) if budget is None else require_float("budget", budget, 1, 1e15, "give bytes")
    else:
        require_float("bound", bound, 0, 100, "give nats per token, 0 to 100")
    table = _table(predict, recipe, activations, progress)
    bits = _spread(table, shape)
    fixed = table.sum(bits)
    sizes, costs, options = _groups(table, shape, context)
    rest = total_bytes(shape, table.recipes[BITS[0]], context) - sum(own[0] for own in sizes)
    if budget is not None:
        picks = choose(sizes, costs, budget - rest)
    elif bound < fixed:
        rule = f"The bound is {bound:.4g}, but activations alone cost {fixed:.4g} nats: allow more."
        raise InputError(rule, code="E-PARAM-BUDGET")
    else:
        picks = choose(costs, sizes, bound - fixed)
    bits |= {name: value for own, at in zip(options, picks, strict=True) for name, value in own[at].items()}
    chosen = tuple((int(layer), _place(cell), value) for (_, layer, cell), value in ((n.split("."), b) for n, b in bits.items()))
    made = replace(recipe, overrides=Overrides(recipe.overrides.entries + chosen))
    uniform = _uniform(table, shape, context)
    return Allocation(
        overrides=made.overrides.to_dict(),
        bits=bits,
        predicted=table.sum(bits),
        nbytes=total_bytes(shape, made, context),
        context=context,
        budget=budget,
        bound=bound,
        uniform=uniform,
        rival=_rival(uniform, budget, bound),
    )


def smallest_g(predict: Predict, recipe: QuantRecipe, *, within: float = 0.05, progress: Progress = silent) -> GroupCount:
    """Find the smallest g (`Clusters.uniform`) whose predicted divergence is near that of one cluster per channel.

    Powers of two are tried upwards, then the interval below the first that is near is halved; that fewer clusters never cost
    less is taken for granted.

    Args: within: largest relative difference, 0 to 10.
    Raises: InputError for a recipe without clusters.
    """
    require_float("within", within, 0, 10, "give a share, 0 to 10")
    if recipe.method != "rptq" and recipe.variant != "matched":
        raise InputError(f"The method {recipe.method} has no clusters: choose rptq, or rtn matched.", code="E-PARAM-METHOD")
    found: dict[int, float] = {}

    def cost(g: int) -> float:
        if g not in found:
            progress(f"Predicting g = {g}", None)
            found[g] = predict(replace(recipe, clusters=Clusters.uniform(g)), silent).total
        return found[g]

    enough = cost(PER_CHANNEL) * (1 + within)
    high = next(g for g in (2**i for i in range(17)) if cost(g) <= enough)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= enough else (middle, high)
    return GroupCount(high, cost(high), cost(PER_CHANNEL), within)


def _table(predict: Predict, recipe: QuantRecipe, activations: bool, progress: Progress) -> _Table:
    """Predict every part at every number of bits."""
    bits = recipe.tensor_bits
    weights, cache = bits.weights < FLOAT_BITS, max(bits.k, bits.v) < FLOAT_BITS
    if recipe.method == "bitnet" or not (weights or cache):
        rule = "This recipe has no weights or keys and values whose bits can be chosen: use rptq or rtn with fewer than 16 bits."
        raise InputError(rule, code="E-PARAM-SCHEME")
    stored = (*(("weights",) if weights else ()), *(CACHE if cache else ()))
    sites = tuple(site for site in ACTIVATIONS if activations and bits.site(site) < FLOAT_BITS)
    cells = {*(INPUT_SITE if weights else ()), *(CACHE if cache else ()), *sites}
    costs: dict[str, dict[int, float]] = {}
    recipes, fixed = {}, 0.0
    for at, own in enumerate(BITS):
        recipes[own] = recipe.with_bits(dict.fromkeys(stored, own))
        tell = part(progress, at / len(BITS), (at + 1) / len(BITS))
        found = predict(recipes[own].with_bits(dict.fromkeys(sites, own)), tell).cells
        for name, kld in found.items():
            if name.rpartition(".")[2] in cells:
                costs.setdefault(name, {})[own] = kld
        fixed = math.fsum(kld for name, kld in found.items() if name not in costs)
    return _Table(recipe, weights, cache, sites, costs, fixed, recipes)


def _groups(table: _Table, shape: Shape, context: int) -> tuple[list[list[float]], list[list[float]], list[list[dict[str, int]]]]:
    """List the options of every part: bytes, costs that never rise with the bits, and the bits that they stand for."""
    sizes, costs, options, falling = [], [], [], table.falling
    for layer in range(shape.layers):
        own = {bits: recipe.for_layer(layer) for bits, recipe in table.recipes.items()}
        for linear in INPUT_SITE if table.weights else ():
            name = cell_name(layer, linear)
            sizes.append([linear_bytes(shape, linear, own[bits]) for bits in BITS])
            costs.append(list(falling[name].values()))
            options.append([{name: bits} for bits in BITS])
        if table.cache:
            k, v, pairs = *(cell_name(layer, site) for site in CACHE), list(product(BITS, BITS))
            scale = kv_scale_bytes(table.recipe)
            sizes.append([context * cache_bytes(shape, Bits(k=one, v=other), scale) for one, other in pairs])
            costs.append([falling[k][one] + falling[v][other] for one, other in pairs])
            options.append([{k: one, v: other} for one, other in pairs])
    return sizes, costs, options


def _spread(table: _Table, shape: Shape) -> dict[str, int]:
    """Choose the activations' bits, as many per token in all as the recipe has; of no site where none are chosen."""
    heads = shape.heads * shape.head_dim
    widths = {"attn_in": shape.hidden, "q": heads, "o_in": heads, "mlp_in": shape.hidden, "down_in": shape.ffn}
    had = _own_bits(table, shape)
    sizes = [[widths[name.rpartition(".")[2]] * bits for bits in BITS] for name in had]
    limit = sum(widths[name.rpartition(".")[2]] * bits for name, bits in had.items())
    picks = choose(sizes, [list(table.falling[name].values()) for name in had], limit)
    return {name: BITS[at] for name, at in zip(had, picks, strict=True)}


def _own_bits(table: _Table, shape: Shape) -> dict[str, int]:
    """Return the recipe's bits of the activations that are chosen; those that it leaves in float are not."""
    layers = [table.recipe.for_layer(layer).tensor_bits for layer in range(shape.layers)]
    places = {cell_name(layer, site): own.site(site) for layer, own in enumerate(layers) for site in table.sites}
    return {name: bits for name, bits in places.items() if bits < FLOAT_BITS}


def _place(cell: str) -> str:
    return f"weights.{cell}" if cell in INPUT_SITE else cell


def _uniform(table: _Table, shape: Shape, context: int) -> tuple[Uniform, ...]:
    """Count and predict every uniform recipe."""
    found, own = [], _own_bits(table, shape)
    for weights, cache in product(BITS if table.weights else (None,), BITS if table.cache else (None,)):
        point = Uniform(weights, cache, 0, 0.0)
        kinds = dict.fromkeys(INPUT_SITE, weights) | dict.fromkeys(CACHE, cache)
        bits = {name: kinds[cell] for name in table.costs if (cell := name.rpartition(".")[2]) in kinds} | own
        size = total_bytes(shape, table.recipes[BITS[0]].with_bits(point.bits), context)
        found.append(replace(point, nbytes=size, predicted=table.sum(bits)))
    return tuple(sorted(found, key=lambda point: point.nbytes))


def _rival(uniform: tuple[Uniform, ...], budget: float | None, bound: float | None) -> Uniform | None:
    if budget is not None:
        return min((p for p in uniform if p.nbytes <= budget), key=lambda p: p.predicted, default=None)
    return min((p for p in uniform if p.predicted <= bound), key=lambda p: p.nbytes, default=None)

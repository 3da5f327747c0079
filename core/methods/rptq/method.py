"""RPTQ: cluster channels of similar range, one static scale per cluster, GPTQ weights in the same groups.

Variants. `official` repeats the published code's rules: 2**bits grid, moving-average ranges, unscaled q in R2, R3
clustered on P·V, Hessians of unquantised inputs. `default` has the same scheme table and cluster counts, and the rules that
measured better (docs/log.md). `strict` is `default` with the norm outputs at the scheme's activation bits. `sorted` is
`default` with clusters of equal size, of channels sorted by range. With a recipe's order `shared`, the clusters of R1 and R4
are runs of one order for all layers (`core.methods.rptq.shared`).
Source: Yuan et al., arXiv:2304.01089; details in docs/rptq.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from core.bits import expert_site, input_site
from core.methods.apply import build_block
from core.methods.base import (
    FLOAT_FIRST_TOKENS,
    SEARCHED_RANGES,
    LayerPlan,
    LayerStatistics,
    Method,
    SiteKey,
    channel_importance,
)
from core.methods.rptq.cluster import ChannelClusters, cluster_channels
from core.methods.rptq.reorder import Orders, query_channels, reorder_block
from core.methods.rptq.segments import best_runs, most_runs, power_of_two
from core.methods.rptq.shared import residual_order, shared_clusters
from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.observer import RangeRules, SitePlan, plan_site
from core.quant.ranges import ChannelRanges
from core.recipe import FLOAT_BITS, INPUT_SITE, REORDER_OF, REORDERS, QuantRecipe
from core.report import WeightError


@dataclass(frozen=True)
class RPTQRules:
    """Rules in which the variants differ.

    Attributes:
        ranges: how a range becomes a grid.
        published_kmeans: ten restarts of scikit-learn's KMeans, head by head, rather than the faster way to equal inertia.
        scaled_query: cluster R2 on q as it is quantised (scaled by E**-0.5) rather than on the raw projection.
        own_value_stats: cluster R3 on v and o_in rather than on o_in alone; KV-only schemes cluster on k and v alone.
        sink_tokens: first positions left out of ranges and kept in float.
        equal_sizes: cut channels sorted by range into clusters of equal size, without KMeans.
    """

    ranges: RangeRules
    published_kmeans: bool
    scaled_query: bool
    own_value_stats: bool
    sink_tokens: int
    equal_sizes: bool = False


OFFICIAL = RPTQRules(
    RangeRules(Grid.OFFICIAL, ema=True, clip_search=False),
    published_kmeans=True,
    scaled_query=False,
    own_value_stats=False,
    sink_tokens=0,
)
BETTER = RPTQRules(
    SEARCHED_RANGES,
    published_kmeans=False,
    scaled_query=True,
    own_value_stats=True,
    sink_tokens=FLOAT_FIRST_TOKENS,
)

_RULES = {"official": OFFICIAL, "sorted": replace(BETTER, equal_sizes=True)}


def rules_of(recipe: QuantRecipe) -> RPTQRules:
    """Return the rules of a recipe's variant."""
    return _RULES.get(recipe.variant, BETTER)


def reorder_clusters(
    name: str,
    ranges: dict[str, ChannelRanges],
    recipe: QuantRecipe,
    *,
    groups: int,
    head_dim: int,
    refine_up_to: float = float("inf"),
) -> ChannelClusters:
    """Cluster one reordering: R1, R4, R5 over the width, R2, R3 inside key/value heads (over Hkv * E channels).

    Args:
        ranges: of the sites of `REORDERS[name]`.
        groups: query heads per key/value head; head_dim: E.
        refine_up_to: points times clusters up to which KMeans' answer is improved; a slider needs a limit.
    """
    count = getattr(recipe.clusters, name)
    if name in ("R2", "R3"):
        points, block = _head_points(name, ranges, recipe, groups, head_dim), head_dim
    else:
        points, block = _points(*(ranges[site] for site in REORDERS[name])), None
    rules = rules_of(recipe)
    better = not rules.published_kmeans
    options = {"n_init": 1 if better else 10, "refine": better and len(points) * count <= refine_up_to, "batched": better}
    return cluster_channels(points, count, block=block, seed=recipe.seed, equal=rules.equal_sizes, **options)


def _points(*ranges: ChannelRanges) -> np.ndarray:
    """Stack the maxima of each tensor, then the minima: [C, 2 n]."""
    return torch.stack([r.high for r in ranges] + [r.low for r in ranges], dim=1).numpy()


def _head_points(name: str, ranges: dict[str, ChannelRanges], recipe: QuantRecipe, groups: int, head_dim: int) -> np.ndarray:
    rules, bits = rules_of(recipe), recipe.tensor_bits
    kv_only = rules.own_value_stats and bits.q == FLOAT_BITS and bits.o_in == FLOAT_BITS
    query_site, own_site = ("q", "k") if name == "R2" else ("o_in", "v")
    united = _united(ranges[query_site], groups, head_dim)
    if kv_only:
        return _points(ranges[own_site])
    if name == "R2":
        factor = 1.0 if rules.scaled_query else head_dim**0.5
        return _points(_scaled(united, factor), ranges[own_site])
    return _points(ranges[own_site], united) if rules.own_value_stats else _points(united)


def _united(ranges: ChannelRanges, groups: int, head_dim: int) -> ChannelRanges:
    """Join ranges of H * E query channels over the query heads of each key/value head: [Hkv * E]."""

    def join(values: Tensor, largest: bool) -> Tensor:
        heads = values.view(-1, groups, head_dim)
        return (heads.amax(1) if largest else heads.amin(1)).flatten()

    return ChannelRanges(join(ranges.low, False), join(ranges.high, True), ranges.sample_low, ranges.sample_high, ranges.rows)


def _scaled(ranges: ChannelRanges, factor: float) -> ChannelRanges:
    return ChannelRanges(ranges.low * factor, ranges.high * factor, ranges.sample_low, ranges.sample_high, ranges.rows)


def site_clusters(site: str, clusters: ChannelClusters, *, groups: int, head_dim: int) -> ChannelClusters:
    """Return the clusters of a reordering for the channels of one of its sites: in q and o_in, every query head has those of its
    key/value head."""
    if site not in ("q", "o_in"):
        return clusters
    heads = clusters.order[clusters.offsets[:-1]] // head_dim
    counts = [clusters.counts[heads == h] for h in range(len(clusters.order) // head_dim) for _ in range(groups)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
    return ChannelClusters(query_channels(_local(clusters.order, head_dim), groups), offsets)


class RPTQ(Method):
    """The method "rptq": see the module's docstring. Plans are pure functions of statistics and recipe."""

    takes_experts = True

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """Return the variant's count when any activation is quantised, else 0."""
        return rules_of(recipe).sink_tokens if recipe.tensor_bits.quantizes_activations else 0

    def calibration_softmax_bits(self, recipe: QuantRecipe) -> int:
        """Return the scheme's bits for variant official, whose published code calibrates with a quantised softmax; else 16."""
        return recipe.tensor_bits.softmax if recipe.variant == "official" else 16

    def residual_order(self, layers: Iterable[Mapping[str, ChannelRanges]], recipe: QuantRecipe) -> Tensor | None:
        """Choose one order for all layers where the recipe asks for it."""
        return residual_order(layers, recipe.seed) if recipe.order == "shared" else None

    def orders(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> dict[str, Tensor]:
        """Choose the orders of one layer by clustering; the shared order of the residual stream is not one of them."""
        names = [name for name in recipe.reorderings if not _is_shared(name, recipe)]
        found = {name: _clusters(name, stats, recipe, spec).order for name in names if name != "R5" or not spec.experts}
        if spec.experts:
            own = (stats.at(expert_site("down_in", i))[0] for i in range(spec.experts))
            found["R5"] = torch.stack([_clusters("R5", one, recipe, spec).order for one in own])
        return {name: _local(order, spec.head_dim) if name in ("R2", "R3") else order for name, order in found.items()}

    def weight_grid(self, recipe: QuantRecipe) -> Grid:
        """Return the variant's grid."""
        return rules_of(recipe).ranges.grid

    def site_key(self, site: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `plan_site` depends on beside the statistics."""
        name = REORDER_OF[site]
        key = _cluster_key(name, recipe) if name in recipe.reorderings else None
        count = getattr(recipe.clusters, name) if key else 1
        return SiteKey(recipe.tensor_bits.site(site), count, (recipe.segments, rules_of(recipe), key and key[2:]))

    def weight_key(self, name: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `fake_weight` depends on beside the statistics."""
        site = self.site_key(INPUT_SITE[name], recipe)
        return SiteKey(recipe.tensor_bits.weight(name), site.clusters, (site.rest, recipe.segments == "exact" or site.bits))

    def plan_site(self, stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> SitePlan:
        """Choose clusters, order and grids of one site."""
        return stats.once(("site", site, self.site_key(site, recipe)), partial(_plan_site, stats, site, recipe, spec))

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Apply the orders to the block, quantise its weights in the clusters of their inputs, attach the quantisers."""
        orders = {site: plan.sites[site].order for site in map(input_site, block.spec.linears)}
        reordered = reorder_block(block, Orders(**plan.orders))
        return build_block(reordered, plan, hessians=stats.hessians, grid=self.weight_grid(recipe), orders=orders)


def _local(order: Tensor, head_dim: int) -> Tensor:
    """Turn an order over Hkv * E channels into orders inside each head, [Hkv, E]."""
    return order.view(-1, head_dim) % head_dim


def _is_shared(name: str, recipe: QuantRecipe) -> bool:
    """Say whether the clusters of a reordering are runs of the order that all layers share."""
    return recipe.order == "shared" and name in ("R1", "R4")


def _cluster_key(name: str, recipe: QuantRecipe) -> tuple[Hashable, ...]:
    """Collect all of a recipe that `_clusters` depends on."""
    kv_only = recipe.tensor_bits.q == recipe.tensor_bits.o_in == FLOAT_BITS
    special = _is_shared(name, recipe) or (name in ("R2", "R3") and kv_only)
    return name, getattr(recipe.clusters, name), rules_of(recipe), recipe.seed, special


def _clusters(name: str, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> ChannelClusters:
    """Cluster one reordering of a layer, once."""
    make = partial(reorder_clusters, name, stats.ranges, recipe, groups=spec.groups, head_dim=spec.head_dim)
    if _is_shared(name, recipe):
        (site,), count, equal = REORDERS[name], getattr(recipe.clusters, name), rules_of(recipe).equal_sizes
        importance = _importance(stats, spec).get(site)
        make = partial(shared_clusters, stats.residual, stats.ranges[site], count, importance, equal=equal)
    return stats.once(_cluster_key(name, recipe), make)


def _importance(stats: LayerStatistics, spec: BlockSpec) -> dict[str, Tensor]:
    """Compute `channel_importance`, once."""
    return stats.once("importance", partial(channel_importance, stats, spec))


def _plan_site(stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> SitePlan:
    """Choose the grids of one site in the clusters of its reordering."""
    bits, name, found = recipe.tensor_bits.site(site), REORDER_OF[site], ChannelClusters.identity(spec.width(site))
    if name in recipe.reorderings:
        found = site_clusters(site, _clusters(name, stats, recipe, spec), groups=spec.groups, head_dim=spec.head_dim)
    order, offsets = found.order, found.offsets
    importance = _importance(stats, spec).get(site)
    weight = None if importance is None else importance[order]
    ranges = stats.calibrated[site].permuted(order)
    few = recipe.segments != "exact" and site in INPUT_SITE.values()
    spare = few and bits < 8 and recipe.segments == "pow2"
    if few and not spare:
        limit = most_runs(len(order)) if bits < FLOAT_BITS else len(offsets) - 1
        offsets = best_runs(ranges.low, ranges.high, weight, limit=limit)
    plan = plan_site(ranges, offsets, bits, rules_of(recipe).ranges, weight)
    return replace(power_of_two(plan, ranges) if spare else plan, order=order)

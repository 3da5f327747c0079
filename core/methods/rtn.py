"""Round to nearest (RTN): the baseline of RPTQ, in two variants, with the bits of the same schemes.

    plain     variant "default": one static range per activation tensor, exact minimum to maximum of every token; one
              scale per weight row. What most papers call RTN.
    matched   variant "matched": everything as in RPTQ's variant "default" except the reordering. As many groups, but of
              neighbouring channels and of equal size, so stored bits per weight and per cached key are the same; the same
              clip search with the same importance; the first token in float. The difference between this row and RPTQ's is
              what clustering and reordering channels are worth.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

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
from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.observer import RangeRules, SitePlan, plan_site
from core.recipe import INPUT_SITE, REORDER_OF, QuantRecipe
from core.report import WeightError

PLAIN_RANGES = RangeRules(Grid.EXACT, ema=False, clip_search=False)


class RoundToNearest(Method):
    """The method "rtn". No channel moves; weights are rounded as `recipe.weights` says."""

    takes_experts = True

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """Return 1 for the matched variant where activations are quantised, as RPTQ does; else 0."""
        return FLOAT_FIRST_TOKENS if recipe.variant == "matched" and recipe.tensor_bits.quantizes_activations else 0

    def site_key(self, site: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `plan_site` depends on beside the statistics."""
        matched = recipe.variant == "matched"
        return SiteKey(recipe.tensor_bits.site(site), getattr(recipe.clusters, REORDER_OF[site]) if matched else 1, matched)

    def weight_key(self, name: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `fake_weight` depends on beside the statistics."""
        return self.site_key(INPUT_SITE[name], recipe)._replace(bits=recipe.tensor_bits.weight(name))

    def plan_site(self, stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> SitePlan:
        """Choose the grid of one site, or one per group of neighbours in the matched variant."""
        key = self.site_key(site, recipe)
        return stats.once(("rtn", site, key), partial(_plan_site, stats, site, key, spec))

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Quantise the weights in the groups of their inputs and attach the quantisers."""
        return build_block(block, plan, hessians=stats.hessians, grid=self.weight_grid(recipe))


def _plan_site(stats: LayerStatistics, site: str, key: SiteKey, spec: BlockSpec) -> SitePlan:
    """Choose the grids of one site: of the matched variant's groups of neighbours (per head where a site has heads), or one."""
    bits, count, matched = key
    if not matched:
        return plan_site(stats.calibrated[site], torch.tensor([0, spec.width(site)]), bits, PLAIN_RANGES)
    heads = {"q": spec.heads, "o_in": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}.get(site, 1)
    importance = stats.once("importance", partial(channel_importance, stats, spec)).get(site)
    offsets = equal_groups(spec.width(site), count, heads)
    return plan_site(stats.calibrated[site], offsets, bits, SEARCHED_RANGES, importance)


def equal_groups(width: int, count: int, heads: int) -> Tensor:
    """Cut `width` channels into `count` runs of neighbours per head, equal to within one channel.

    Returns: [G + 1] int64 boundaries, G = heads · count; at most one run per channel.
    """
    own = width // heads
    count = min(count, own)
    return torch.tensor([head * own + i * own // count for head in range(heads) for i in range(count)] + [width])


METHOD = RoundToNearest()

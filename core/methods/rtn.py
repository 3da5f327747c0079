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
    Fake,
    LayerPlan,
    LayerStatistics,
    SiteKey,
    channel_importance,
    rounds_by_gptq,
)
from core.methods.fake import fake_site, fake_weight
from core.models.architectures import BlockSpec
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.linear.base import LinearLayer
from core.quant.observer import RangeRules, SitePlan, plan_site
from core.recipe import INPUT_SITE, REORDERS, SITES, QuantRecipe
from core.report import WeightError

PLAIN_RANGES = RangeRules(Grid.EXACT, ema=False, clip_search=False)


class RoundToNearest:
    """The method "rtn". No channel moves; weights are rounded as `recipe.weights` says."""

    keeps_ternary = False

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """Return 1 for the matched variant where activations are quantised, as RPTQ does; else 0."""
        return FLOAT_FIRST_TOKENS if recipe.variant == "matched" and recipe.tensor_bits.quantizes_activations else 0

    def calibration_softmax_bits(self, recipe: QuantRecipe) -> int:
        """Return 16: the softmax output stays in float during calibration."""
        return 16

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """Say whether the weights are rounded by GPTQ, which reads Hessians."""
        return rounds_by_gptq(recipe)

    def plan_layer(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> LayerPlan:
        """Choose the grids of one layer: one per site, or one per group of neighbours in the matched variant."""
        bits, sites = recipe.tensor_bits, {site: self.plan_site(stats, site, recipe, spec) for site in SITES}
        return LayerPlan({}, sites, bits.softmax, bits.weights, self.sink_tokens(recipe))

    def site_key(self, site: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `plan_site` depends on beside the statistics."""
        matched = recipe.variant == "matched"
        name = next(name for name, sites in REORDERS.items() if site in sites)
        return SiteKey(recipe.tensor_bits.site(site), getattr(recipe.clusters, name) if matched else 1, matched)

    def weight_key(self, name: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `fake_weight` depends on beside the statistics."""
        return self.site_key(INPUT_SITE[name], recipe)._replace(bits=recipe.tensor_bits.weights)

    def plan_site(self, stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> SitePlan:
        """Choose the grid of one site, or one per group of neighbours in the matched variant."""
        key = self.site_key(site, recipe)
        return stats.once(("rtn", site, key), partial(_plan_site, stats, site, key, spec))

    def fake_site(self, plan: SitePlan, site: str, recipe: QuantRecipe, spec: BlockSpec) -> Fake | None:
        """Make the function that rounds a site."""
        return fake_site(plan, self.sink_tokens(recipe))

    def fake_weight(self, linear: LinearLayer, name: str, plan: SitePlan, recipe: QuantRecipe, spec: BlockSpec) -> Tensor | None:
        """Round a weight to nearest in the groups of its input."""
        return fake_weight(linear, plan, bits=recipe.tensor_bits.weights, grid=Grid.EXACT)

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Quantise the weights in the groups of their inputs and attach the quantisers."""
        return build_block(block, plan, hessians=stats.hessians, grid=Grid.EXACT)


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

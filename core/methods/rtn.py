"""Round-to-nearest without clusters: the baseline. One static range per activation tensor, one per weight row.

The bits are those of the same schemes, so a row "RTN W4A4" differs from "RPTQ W4A4" by the method alone.
"""

from __future__ import annotations

import torch

from core.methods.apply import build_block
from core.methods.base import METHODS, LayerPlan, LayerStatistics, WeightNote, rounds_by_gptq
from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.observer import RangeRules, plan_site
from core.recipe import SITES, QuantRecipe

RULES = RangeRules(Grid.EXACT, ema=False, clip_search=False)


class RoundToNearest:
    """Exact min/max of the calibration text, no order, no clusters; weights by `recipe.weights`."""

    keeps_ternary = False

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """None: the baseline treats every token alike."""
        return 0

    def calibration_softmax_bits(self, recipe: QuantRecipe) -> int:
        """Float softmax while calibrating."""
        return 16

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """For GPTQ."""
        return rounds_by_gptq(recipe)

    def plan_layer(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> LayerPlan:
        """One grid per site."""
        bits = recipe.tensor_bits
        sites = {
            site: plan_site(stats.calibrated[site], torch.tensor([0, spec.width(site)]), bits.site(site), RULES) for site in SITES
        }
        return LayerPlan({}, sites, bits.softmax, bits.weights, sink_tokens=0)

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightNote]]:
        """Quantise weights per row, attach quantisers."""
        return build_block(block, plan, hessians=stats.hessians, grid=RULES.grid)


METHODS.register("rtn", RoundToNearest())

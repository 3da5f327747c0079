"""The method "rptq", with the parts of the method rotation that a recipe adds to it: RPTQ+.

    x̃ = (x / s)[order] - mean        clusters of the ranges of x̃, which are those of x scaled and moved
    w̃ = (w s)[:, order]              in groups of neighbouring columns, whatever clusters the input has

Scales s and the keys' mean are those of the method rotation, orders and clusters those of RPTQ on what they leave: a range
follows a scale and a shift of its channel exactly. A site with a range of each token has no clusters: attn_in, mlp_in and
down_in then keep their channels' order, and may be rotated, as nothing depends on single channels any more.

Not legal, so not offered: a range of each token for keys and values, whose scales would be stored with them; a rotation inside
heads, which k and v have to share with q and o_in, and which would leave them no clusters.
Weights are rounded for the quantised inputs; docs/beyond.md says what each part is worth. Without additions this is RPTQ.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from core.methods.base import LayerPlan, LayerStatistics, SiteKey
from core.methods.fake import Fake
from core.methods.rotation.fold import Basis
from core.methods.rotation.method import (
    RotatedPlan,
    change_bases,
    changes_basis,
    fake_based_site,
    fake_based_weight,
    plan_rotated,
    quantize_block,
    site_basis,
)
from core.methods.rptq.method import RPTQ
from core.methods.rptq.reorder import Orders, reorder_block
from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.options import PlusOptions, RotationOptions
from core.quant.linear.base import LinearLayer
from core.quant.observer import SitePlan
from core.quant.ranges import ChannelRanges
from core.recipe import INPUT_SITE, REORDER_OF, SITES, QuantRecipe
from core.report import WeightError


class RPTQPlus(RPTQ):
    """RPTQ as `core.methods.rptq.method` has it, and with the parts of `PlusOptions` where the recipe has them."""

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """Say whether `apply_layer` reads Hessians of float inputs: RPTQ does, with additions they are of quantised inputs."""
        return recipe.plus is None and super().uses_hessians(recipe)

    def uses_exact_inputs(self, recipe: QuantRecipe) -> bool:
        """Say whether the target of GPTQ is half-way to the unquantised model."""
        return recipe.plus is not None and recipe.plus.halfway and super().uses_hessians(recipe)

    def orders(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> dict[str, Tensor]:
        """Choose the orders of one layer by clustering what scales and the keys' mean leave."""
        return super().orders(stats if recipe.plus is None else _changed(stats, recipe, spec)[0], recipe, spec)

    def site_key(self, site: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `plan_site` depends on beside the statistics."""
        own = super().site_key(site, recipe)
        return own if recipe.plus is None else own._replace(rest=(own.rest, recipe.plus, _changing(recipe)))

    def weight_key(self, name: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `fake_weight` depends on beside the statistics."""
        if recipe.plus is None:
            return super().weight_key(name, recipe)
        site = self.site_key(INPUT_SITE[name], recipe)
        return site._replace(bits=recipe.tensor_bits.weight(name), rest=(site.rest, recipe.by_token(INPUT_SITE[name])))

    def plan_site(self, stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> SitePlan:
        """Choose basis, order and grids of one site: in clusters, or of each token."""
        if recipe.plus is None:
            return super().plan_site(stats, site, recipe, spec)
        changed, bases = _changed(stats, recipe, spec)
        found = super().plan_site(changed, site, recipe, spec)
        key = ("plus", site, self.site_key(site, recipe), self.weight_key("qkv", recipe).bits)
        return stats.once(key, partial(_plan, stats, site, recipe, spec, found, bases[site]))

    def fake_site(self, plan: SitePlan, site: str, recipe: QuantRecipe, spec: BlockSpec) -> Fake | None:
        """Make the function that rounds a site as the quantised layer does; None where it stays in float."""
        if recipe.plus is None:
            return super().fake_site(plan, site, recipe, spec)
        return fake_based_site(plan, site, spec, self.sink_tokens(recipe))

    def fake_weight(self, linear: LinearLayer, name: str, plan: SitePlan, recipe: QuantRecipe, spec: BlockSpec) -> Tensor | None:
        """Round a weight to nearest in the groups that it has, columns in the model's own order; None at 16 bits."""
        if recipe.plus is None:
            return super().fake_weight(linear, name, plan, recipe, spec)
        return fake_based_weight(linear, plan, recipe.tensor_bits.weight(name), clip=recipe.plus.clip)

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Apply scales and orders to the block, quantise its weights, attach the quantisers."""
        if recipe.plus is None:
            return super().apply_layer(block, plan, stats, recipe)
        gptq = recipe.weights == "gptq"
        return quantize_block(in_bases(block, plan), plan, stats.streams, clip=recipe.plus.clip, gptq=gptq)


def in_bases(block: DecoderBlock, plan: LayerPlan) -> DecoderBlock:
    """Make the float block with a plan's scales and orders, but for rotations and the keys' mean."""
    return reorder_block(change_bases(block, plan), Orders(**plan.orders))


def _changing(recipe: QuantRecipe) -> tuple[bool, ...]:
    """Say of every site whether it changes its basis."""
    return tuple(changes_basis(site, recipe) for site in SITES)


def _rotation(options: PlusOptions, *, rotate: bool = False) -> RotationOptions:
    """Return the options of the method rotation that plan a site as additions do."""
    return RotationOptions(scale=options.scale, rotate=rotate, key_mean=options.key_mean, group=options.group)


def _changed(stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> tuple[LayerStatistics, dict[str, Basis]]:
    """Return the statistics of a layer behind its scales and without the keys' mean, and the bases [C] of its sites."""
    options = _rotation(recipe.plus)

    def make() -> tuple[LayerStatistics, dict[str, Basis]]:
        changing = zip(SITES, _changing(recipe), strict=True)
        bases = {site: site_basis(stats, site, options, spec) if changes else Basis() for site, changes in changing}
        ranges = {site: _moved(own, bases[site]) for site, own in stats.ranges.items()}
        calibrated = ranges if stats.calibrated is stats.ranges else {s: _moved(r, bases[s]) for s, r in stats.calibrated.items()}
        weights = {s: w if bases[s].scale is None else w * bases[s].scale.square() for s, w in stats.importance.items()}
        return replace(stats, ranges=ranges, calibrated=calibrated, importance=weights, made={}), bases

    return stats.once(("plus", options.scale, options.key_mean, _changing(recipe)), make)


def _moved(ranges: ChannelRanges, basis: Basis) -> ChannelRanges:
    """Return the ranges of channels that are scaled and moved."""
    names = ("low", "high", "sample_low", "sample_high", "rows")
    return ChannelRanges(*(basis.to(getattr(ranges, name)) for name in names))


def _plan(
    stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec, found: SitePlan, basis: Basis
) -> RotatedPlan:
    """Make RPTQ's plan of a site one in its basis: with ranges of tokens where they are chosen, and groups of the weight.

    Args:
        found: in clusters of what the basis leaves.
        basis: its scale and mean.
    """
    options, width = recipe.plus, spec.width(site)
    own = {"basis": replace(basis, mean=None if basis.mean is None else basis.mean[found.order], order=found.order)}
    if recipe.by_token(site):
        rotates = site in options.rotate.split("+")
        alone = REORDER_OF[site] not in recipe.reorderings  # q and o_in share their order with k and v
        turned = replace(own["basis"], block=0 if rotates else None, order=None if alone else found.order)
        return plan_rotated(stats, site, turned, recipe.tensor_bits.site(site), _rotation(options, rotate=rotates), spec)
    groups = torch.tensor([*range(0, width, options.group), width]) if options.group else found.offsets
    return RotatedPlan(found.bits, found.offsets, found.params, found.sqnr_db, groups, found.order, **own, folded=True)


METHOD = RPTQPlus()

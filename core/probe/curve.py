"""Predict what one site costs by number of clusters: KMeans, equal groups, one grid, one grid per channel.

Everything is planned by the rules of RPTQ's variant default (searched ranges, first token in float), so that only the grouping
differs. The squared error of the same groupings is in `core.methods.rptq.explore`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from core.errors import InputError
from core.methods.base import SEARCHED_RANGES, channel_importance
from core.methods.fake import fake_site
from core.methods.rptq.explore import counts_within, knee
from core.methods.rptq.plus import METHOD
from core.models.decoder import CausalModel
from core.probe.plans import Layer, cell_name, require_cell
from core.probe.predict import predict, site_cost
from core.probe.probe import Probe
from core.probe.report import CostCurve
from core.probe.statistics import Statistics
from core.progress import Progress, silent
from core.quant.observer import plan_site
from core.recipe import FLOAT_BITS, PER_CHANNEL, REORDER_OF, REORDERS, SITES, Clusters, QuantRecipe


@torch.no_grad()
def cost_curve(
    probe: Probe,
    model: CausalModel,
    statistics: Statistics,
    recipe: QuantRecipe,
    site: str,
    layers: Sequence[int],
    *,
    progress: Progress = silent,
) -> CostCurve:
    """Predict the divergence of one site in some layers, everything else in float, by the number of clusters.

    Args:
        statistics: of the recipe's calibration. recipe: of the method rptq, variant default, without overrides.
        site: one of `core.recipe.SITES`, below 16 bits in the recipe.
    Raises: InputError for a site or layer that does not exist, and for a recipe that leaves the site in float.
    """
    for layer in layers:
        require_cell(model, layer, site)
    spec, bits = model.blocks[0].spec, recipe.tensor_bits.site(site) if site in SITES else FLOAT_BITS
    if bits >= FLOAT_BITS:
        raise InputError(f"{site} is not quantised here: name one of {', '.join(SITES)} with 2 to 8 bits.", code="E-PARAM-SITE")
    block = spec.head_dim if REORDER_OF[site] in ("R2", "R3") else spec.width(site)
    counts, cells = counts_within(block), {cell_name(layer, site) for layer in layers}

    def costs(variant: str, groups: Sequence[int]) -> list[float]:
        found = []
        for count in groups:
            progress(f"Predicting g = {count}", None)
            made = replace(recipe, variant=variant, clusters=Clusters(*[count] * len(REORDERS)))
            found.append(predict(probe, model, statistics, made, cells=cells).total)
        return found

    *kmeans, per_channel = costs("default", [*counts, PER_CHANNEL])
    return CostCurve(
        site=site,
        layers=tuple(layers),
        bits=bits,
        g=tuple(counts),
        kmeans=tuple(kmeans),
        equal=tuple(costs("sorted", counts)),
        per_tensor=math.fsum(_one_grid(probe, Layer.of(model, layer, statistics, recipe), layer, site) for layer in layers),
        per_channel=per_channel,
        knee=knee([*counts, block], [*kmeans, per_channel]),
        noise_floor=probe.noise_floor,
    )


def _one_grid(probe: Probe, looked: Layer, index: int, site: str) -> float:
    """Predict the cost of a site with one grid for the whole tensor, heads included."""
    stats, spec, bits = looked.stats, looked.block.spec, looked.recipe.tensor_bits.site(site)
    importance = stats.once("importance", partial(channel_importance, stats, spec)).get(site)
    plan = plan_site(stats.calibrated[site], torch.tensor([0, spec.width(site)]), bits, SEARCHED_RANGES, importance)
    return site_cost(probe, looked, index, site, fake_site(plan, METHOD.sink_tokens(looked.recipe)))

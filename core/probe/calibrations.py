"""Compare what two calibrations make of a recipe: ranges of channels, and the clusters formed on them

Ranges and clusters are those of plans: the statistics that the recipe's method sees, without the first token where it leaves that
out. Clusters have no names, so those of two plans are matched such that as few channels as possible change.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

from core.methods import method
from core.methods.rptq.cluster import ChannelClusters
from core.models.decoder import CausalModel
from core.probe.plans import Layer, cell_name
from core.probe.report import SiteShift
from core.probe.statistics import Statistics
from core.progress import Progress, silent
from core.quant.observer import SitePlan
from core.recipe import REORDER_OF, SITES, QuantRecipe


def compare_plans(
    model: CausalModel, both: tuple[Statistics, Statistics], recipe: QuantRecipe, *, progress: Progress = silent
) -> dict[str, SiteShift]:
    """Compare ranges and clusters of every site, by "layers.<i>.<site>".

    Args: both: statistics of calibration A and of calibration B, for `recipe`.
    """
    planner, found = method(recipe.method), {}
    for index, block in enumerate(model.blocks):
        progress(f"Comparing layer {index + 1} of {len(model.blocks)}", index / len(model.blocks))
        looked = [Layer.of(model, index, statistics, recipe) for statistics in both]
        for site in SITES:
            ranges = [layer.stats.ranges[site] for layer in looked]
            plans = [planner.plan_site(layer.stats, site, layer.recipe, block.spec) for layer in looked]
            heads = block.spec.width(site) // block.spec.head_dim if REORDER_OF[site] in ("R2", "R3") else 1
            found[cell_name(index, site)] = shift(
                np.stack([(r.high - r.low).numpy() for r in ranges]), np.stack([_labels(plan) for plan in plans]), heads
            )
    return found


def shift(widths: np.ndarray, labels: np.ndarray, heads: int = 1) -> SiteShift:
    """Compare one site's ranges and clusters with calibration A and with B.

    Args:
        widths: [2, C] float, of every channel's range. labels: [2, C] int, the cluster of every channel, channels in one order.
        heads: equal parts of C in which clusters are formed.
    """
    moved, alike = 0, []
    for one, other in zip(*labels.reshape(2, heads, -1), strict=True):
        shared = contingency_matrix(one, other)
        moved += len(one) - int(shared[linear_sum_assignment(-shared)].sum())
        alike.append(adjusted_rand_score(one, other))
    return SiteShift(widths.astype(np.float32), moved, float(np.mean(alike)))


def _labels(plan: SitePlan) -> np.ndarray:
    """Return the cluster of each channel, [C], in the model's own order."""
    order = ChannelClusters.identity(int(plan.offsets[-1])).order if plan.order is None else plan.order
    return ChannelClusters(order, plan.offsets).labels.numpy()

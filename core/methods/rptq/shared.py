"""Find one order of the residual stream for all layers, in place of each layer's own R1 and R4.

    point of a channel     (max, min) at attn_in and mlp_in of every layer, [4 L]; a site's are divided by the rms of its widths
    order                  KMeans of the points in CLUSTERS clusters; clusters side by side as the leaves of a tree of their
                           centres, channels inside by mean width, narrowest first
    clusters of a site     at most g runs of that order with the least Σ (importance of a run) (range of the run)²

Such an order needs no store that reorders: embedding, norms, weights and head carry it (`DecoderBlock.in_order`), so every engine
for the model's architecture runs it. Runs are chosen for each site and layer; what KMeans would find there may lie apart.
RPTQ (arXiv:2304.01089) has one order for each layer. Tree: Ward (1963); order of its leaves: Bar-Joseph et al. (2001).
Other ways to one order, and what they gave: docs/rptq.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, optimal_leaf_ordering, ward
from torch import Tensor

from core.methods.rptq.cluster import ChannelClusters, kmeans_labels
from core.methods.rptq.segments import best_runs
from core.quant.ranges import ChannelRanges

SITES = ("attn_in", "mlp_in")
"""Sites that read the residual stream."""
CLUSTERS = 32
"""Clusters of the order, for every g: 16 to 64 differ by less than 3 % in predicted error."""
MOST_CUTS = 1024
"""Places where a run may end: at every channel up to this width, at every second one up to twice that, and so on."""


def residual_order(layers: Iterable[Mapping[str, ChannelRanges]], seed: int) -> Tensor:
    """Find an order of the residual stream in which channels whose ranges are similar in all layers lie together.

    Args:
        layers: ranges of the sites of every layer.
        seed: of KMeans.
    Returns: [D] int64, new = old[order].
    """
    found = [ranges[site] for ranges in layers for site in SITES]
    low, high = (np.stack([getattr(r, name).double().numpy() for r in found]) for name in ("low", "high"))  # [2 L, D]
    scale = np.sqrt(np.square(high - low).mean(1, keepdims=True))
    low, high = (np.divide(bound, scale, out=np.zeros_like(bound), where=scale > 0) for bound in (low, high))
    points = np.concatenate([high, low]).T
    labels = kmeans_labels(points, CLUSTERS, n_init=1, seed=seed)
    centres = np.stack([points[labels == i].mean(0) for i in range(labels.max() + 1)])
    if len(centres) > 1:
        tree = optimal_leaf_ordering(ward(centres), centres)
        labels = np.argsort(leaves_list(tree))[labels]
    return torch.from_numpy(np.lexsort(((high - low).mean(0), labels)))


def shared_clusters(
    order: Tensor | None, ranges: ChannelRanges, count: int, importance: Tensor | None, *, equal: bool
) -> ChannelClusters:
    """Cut the shared order into clusters for one site.

    Args:
        order: [D] int64; None where the channels lie in it already.
        ranges: of the site. importance: [D] factors of its channels' squared steps; None for equal ones. Neither is ordered.
        count: clusters; equal: of equal size to within one channel, wherever ranges change.
    """
    width = len(ranges.low)
    order = torch.arange(width) if order is None else order
    count = min(count, width)
    if equal or count == width:
        return ChannelClusters(order, torch.arange(count + 1) * width // count)
    weight = None if importance is None else importance[order]
    return ChannelClusters(
        order, best_runs(ranges.low[order], ranges.high[order], weight, limit=count, align=-(-width // MOST_CUTS))
    )

"""Cluster the channels of a site by their (max, min) and lay clusters side by side.

Points: (max, min) per channel for R1, R4, R5, R3; (q max, k max, q min, k min) for R2, one set per key/value head.
KMeans is scikit-learn's. Clusters are ranked by the centroid's width, narrow first (equal widths by place), channels inside
keep their order, so the result does not depend on KMeans' arbitrary labels.
Source: RPTQ (arXiv:2304.01089), `tensor_calc_reorder_index`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor


@dataclass(frozen=True)
class ChannelClusters:
    """A reordering: new = old[order], clusters are the runs between offsets.

    Attributes:
        order: [C] int64, a permutation.
        offsets: [G + 1] int64, 0 … C, strictly increasing.
    """

    order: Tensor
    offsets: Tensor

    @classmethod
    def identity(cls, width: int) -> ChannelClusters:
        """The original order, one cluster."""
        return cls(torch.arange(width), torch.tensor([0, width]))

    @property
    def counts(self) -> Tensor:
        """[G] channels per cluster."""
        return self.offsets.diff()

    @property
    def labels(self) -> Tensor:
        """[C] cluster of each channel, in the original order."""
        labels = torch.empty(len(self.order), dtype=torch.int64)
        labels[self.order] = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)
        return labels


def cluster_channels(
    points: np.ndarray, count: int, *, block: int | None = None, n_init: int = 10, seed: int = 0
) -> ChannelClusters:
    """Cluster channels by their points, inside blocks of equal width.

    Args:
        points: [C, d] float, one point per channel.
        count: clusters per block; fewer come back where a block has fewer distinct points.
        block: width of a block (a head); None for the whole width. A channel never leaves its block.
        n_init, seed: of scikit-learn's KMeans.
    Returns: ChannelClusters over all blocks, block after block.
    """
    width = len(points)
    block = block or width
    orders, counts = [], []
    for start in range(0, width, block):
        labels = kmeans_labels(points[start : start + block], count, n_init=n_init, seed=seed)
        orders.append(np.argsort(labels, kind="stable") + start)
        counts.append(np.bincount(labels))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return ChannelClusters(torch.from_numpy(np.concatenate(orders)), torch.from_numpy(offsets))


def kmeans_labels(points: np.ndarray, count: int, *, n_init: int, seed: int) -> np.ndarray:
    """Labels [n] of `points` [n, d], 0 = the narrowest cluster; every label occurs.

    The width of a cluster is the mean of its points' max minus min: first half of a point minus its second half.
    """
    points = np.ascontiguousarray(points, dtype=np.float64)
    distinct = np.unique(points, axis=0)
    count = min(count, len(distinct))
    if count == len(points):
        labels = np.arange(len(points))
    elif count == len(distinct):
        labels = np.unique(points, axis=0, return_inverse=True)[1].reshape(-1)
    elif count == 1:
        return np.zeros(len(points), dtype=np.int64)
    else:
        labels = KMeans(n_clusters=count, n_init=n_init, random_state=seed).fit(points).labels_
    half = points.shape[1] // 2
    widths = (points[:, :half] - points[:, half:]).sum(axis=1)
    present, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(-1)
    sizes = np.bincount(labels)
    width, place = (np.bincount(labels, weights=w) / sizes for w in (widths, points.sum(axis=1)))
    rank = np.empty(len(present), dtype=np.int64)
    rank[np.lexsort((place, width))] = np.arange(len(present))
    return rank[labels]

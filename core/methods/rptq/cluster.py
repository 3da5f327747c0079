"""Cluster the channels of a site by (max, min), and order them so that clusters are contiguous.

Points: (max, min) per channel for R1, R4, R5, R3; (q max, k max, q min, k min) for R2, one set per key/value head.
Over the whole width, scikit-learn's KMeans runs once and `improve` lowers the error of its answer; the many small problems of
heads are solved together (`kmeans_batch`). Variant official repeats the published code: ten restarts of scikit-learn, one head
after another. Clusters are sorted by the width of their centre, narrowest first (equal widths by place), and channels inside
keep their order, so the result does not depend on the arbitrary labels of KMeans. `equal_labels` is a rule without KMeans.
Source: RPTQ (arXiv:2304.01089), `tensor_calc_reorder_index`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

RESTARTS = 8
"""Restarts of `kmeans_batch`: its inertia is then within 1 % of scikit-learn's with ten (`python -m benchmarks reorder`)."""

LARGEST_BATCHED = 8192
"""Points times clusters of a problem up to which `kmeans_batch` is faster than scikit-learn, problem by problem."""

MOVES, FAILURES = 16, 2
"""`improve` stops after 16 moves, or after 2 in a row that did not lower the error."""

ITERATIONS = 100


@dataclass(frozen=True)
class ChannelClusters:
    """A reordering, new = old[order], in which cluster i is the run of channels offsets[i] … offsets[i + 1] - 1.

    Attributes:
        order: [C] int64, a permutation.
        offsets: [G + 1] int64, 0 … C, strictly increasing.
    """

    order: Tensor
    offsets: Tensor

    @classmethod
    def identity(cls, width: int) -> ChannelClusters:
        """Return the original order with all channels in one cluster."""
        return cls(torch.arange(width), torch.tensor([0, width]))

    @property
    def counts(self) -> Tensor:
        """Channels per cluster, [G]."""
        return self.offsets.diff()

    @property
    def labels(self) -> Tensor:
        """Cluster of each channel in the original order, [C]."""
        labels = torch.empty(len(self.order), dtype=torch.int64)
        labels[self.order] = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)
        return labels


def cluster_channels(
    points: np.ndarray,
    count: int,
    *,
    block: int | None = None,
    n_init: int = 1,
    seed: int = 0,
    refine: bool = True,
    batched: bool = True,
    equal: bool = False,
) -> ChannelClusters:
    """Cluster channels by their points, inside blocks of equal width.

    Args:
        points: [C, d] float, one point per channel.
        count: clusters per block; fewer come back where a block has fewer distinct points.
        block: width of a block (a head); None for the whole width. A channel never leaves its block.
        n_init, seed: of scikit-learn's KMeans.
        refine: `improve` its answer. batched: solve all blocks together; False calls scikit-learn for each block.
        equal: cut channels sorted by range into clusters of equal size (`equal_labels`); no KMeans.
    Returns: ChannelClusters over all blocks, block after block.
    """
    width = len(points)
    block = block or width
    together = None
    if not equal and batched and width > block > count and block * count <= LARGEST_BATCHED:
        together = kmeans_batch(points.reshape(-1, block, points.shape[1]), count, seed=seed)
    orders, counts = [], []
    for start in range(0, width, block):
        found = None if together is None else together[start // block]
        part = points[start : start + block]
        if equal:
            labels = equal_labels(part, count)
        else:
            labels = kmeans_labels(part, count, n_init=n_init, seed=seed, refine=refine, found=found)
        orders.append(np.argsort(labels, kind="stable") + start)
        counts.append(np.bincount(labels))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return ChannelClusters(torch.from_numpy(np.concatenate(orders)), torch.from_numpy(offsets))


def kmeans_labels(
    points: np.ndarray, count: int, *, n_init: int, seed: int, refine: bool = True, found: np.ndarray | None = None
) -> np.ndarray:
    """Label points [n, d] by cluster: [n], 0 = the narrowest; every label occurs. `found` [n] are labels already computed.

    The width of a cluster is the mean over its points of max minus min: first half of a point minus its second half.
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
    elif found is not None:
        labels = found
    else:
        fitted = KMeans(n_clusters=count, n_init=n_init, random_state=seed).fit(points)
        labels = improve(points, fitted.cluster_centers_) if refine else fitted.labels_
    present, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(-1)
    sizes = np.bincount(labels)
    width, place = (np.bincount(labels, weights=w) / sizes for w in (_widths(points), points.sum(axis=1)))
    rank = np.empty(len(present), dtype=np.int64)
    rank[np.lexsort((place, width))] = np.arange(len(present))
    return rank[labels]


def equal_labels(points: np.ndarray, count: int) -> np.ndarray:
    """Cut points [n, d] sorted by width into `count` groups, equal to within one point: labels [n], 0 = the narrowest."""
    labels = np.empty(len(points), dtype=np.int64)
    labels[np.argsort(_widths(points), kind="stable")] = np.arange(len(points)) * min(count, len(points)) // len(points)
    return labels


def _widths(points: np.ndarray) -> np.ndarray:
    """Compute the width of each channel's range, summed over the tensors that its point [d] describes: maxima less minima."""
    half = points.shape[1] // 2
    return (points[:, :half] - points[:, half:]).sum(axis=1)


def improve(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Lower the inertia of a KMeans answer by moving single centres; return the labels [n].

    A move merges the two clusters whose union costs least, and puts the freed centre on the outermost point of the cluster with
    the largest error; Lloyd's algorithm follows. One start with these moves is as good as ten starts
    (`python -m benchmarks reorder`).

    Args:
        points: [n, d] float64; centres: [k, d], every one nearest to some point, k >= 3.
    """
    labels, centres, errors, sizes = _lloyd(points, centres)
    failures = 0
    for _ in range(MOVES if len(centres) > 2 else 0):
        worst = int(np.argsort(-errors)[failures])
        cost = _distances(centres, centres) * (sizes[:, None] * sizes / np.maximum(sizes[:, None] + sizes, 1))
        np.fill_diagonal(cost, np.inf)
        cost[worst], cost[:, worst] = np.inf, np.inf
        i, j = np.unravel_index(cost.argmin(), cost.shape)
        members = np.flatnonzero(labels == worst)
        moved = centres.copy()
        moved[i] = (sizes[i] * centres[i] + sizes[j] * centres[j]) / max(sizes[i] + sizes[j], 1)
        moved[j] = points[members[np.square(points[members] - centres[worst]).sum(1).argmax()]]
        trial = _lloyd(points, moved)
        if trial[2].sum() < errors.sum() * (1 - 1e-9):
            labels, centres, errors, sizes = trial
            failures = 0
        else:
            failures += 1
            if failures == min(FAILURES, len(centres)) or sizes[np.argsort(-errors)[failures]] == 0:
                break
    return labels


def _lloyd(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Run Lloyd's algorithm: labels [n], centres [k, d], error and size of each cluster [k]. Empty ones keep their centre."""
    count, labels = len(centres), None
    for _ in range(ITERATIONS):
        found = _distances(points, centres).argmin(1)
        if labels is not None and np.array_equal(found, labels):
            break
        labels, sizes = found, np.bincount(found, minlength=count)
        sums = np.stack([np.bincount(labels, weights=column, minlength=count) for column in points.T], axis=1)
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
    errors = np.bincount(labels, weights=np.square(points - centres[labels]).sum(1), minlength=count)
    return labels, centres, errors, sizes


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute squared distances [n, k] of a [n, d] and b [k, d]."""
    return np.square(a).sum(1)[:, None] - 2 * (a @ b.T) + np.square(b).sum(1)


def kmeans_batch(points: np.ndarray, count: int, *, seed: int, restarts: int = RESTARTS) -> np.ndarray:
    """Solve many small KMeans problems at once: Lloyd's algorithm from `restarts` D²-sampled starts each; the best one is kept.

    Args:
        points: [B, n, d]; every problem has the same number of points.
        count: clusters per problem, at most n.
    Returns: labels [B, n] int64 in no particular order; a cluster may be empty where points coincide.
    Source: k-means++ seeding (Arthur and Vassilvitskii, 2007); Lloyd (1982).
    """
    problems, n, _ = points.shape
    x = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float64)).repeat_interleave(restarts, dim=0)  # [B r, n, d]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(x))
    first = torch.randint(n, (len(x),), generator=generator)
    centres = [x[rows, first]]
    nearest = _squared(x, centres[0][:, None])[..., 0]
    for _ in range(count - 1):
        chance = nearest + torch.finfo(torch.float64).tiny  # all distances are 0 if every point is a centre
        centres.append(x[rows, torch.multinomial(chance, 1, generator=generator)[:, 0]])
        nearest = torch.minimum(nearest, _squared(x, centres[-1][:, None])[..., 0])
    centre, labels = torch.stack(centres, dim=1), None  # [B r, k, d]
    for _ in range(ITERATIONS):
        distance, found = _squared(x, centre).min(dim=2)
        if labels is not None and torch.equal(found, labels):
            break
        labels = found
        member = torch.nn.functional.one_hot(labels, count).to(x.dtype).transpose(1, 2)  # [B r, k, n]
        size = member.sum(2, keepdim=True)
        centre = torch.where(size > 0, member @ x / size.clamp_min(1), centre)
    inertia = distance.sum(1).view(problems, restarts)
    return labels.view(problems, restarts, n)[torch.arange(problems), inertia.argmin(1)].numpy()


def _squared(x: Tensor, centre: Tensor) -> Tensor:
    """Compute squared distances [B, n, k] of x [B, n, d] to centre [B, k, d]."""
    return (x[:, :, None] - centre[:, None]).square().sum(-1)

"""Cluster ranges that were observed before, fast enough for a slider: no model and no tokens are needed.

The clusters are those that RPTQ's plan of the layer would form from these ranges, with every activation quantised: R2 and R3 are
formed once per key/value head, on points of both sites that share the order. Two things differ in a run: it leaves the first
token of every window out (variant official does not), and it improves KMeans' answer at any size, here only up to `REFINED`.

The predicted error of a clustering is the mean squared step of its clusters divided by that of one step for all channels:
rounding noise is step² / 12 wherever values spread over several codes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from core.calibration.report import RangesReport, SiteRanges
from core.errors import InputError
from core.methods.rptq.cluster import ChannelClusters
from core.methods.rptq.method import reorder_clusters, site_clusters
from core.quant.affine import Grid, choose_qparams
from core.quant.ranges import ChannelRanges
from core.recipe import REORDER_OF, REORDERS, Clusters, QuantRecipe

REFINED = 2**17
"""Points times clusters up to which KMeans' answer is improved: 4,096 channels in 32 clusters, 45 ms on one thread."""
LARGEST_COUNT = 256
"""Largest number of clusters of a curve, below one per channel."""


@dataclass(frozen=True)
class ClusterInfo:
    """One cluster: the range that covers its channels, and the grid for that range."""

    index: int
    size: int
    low: float
    high: float
    scale: float
    zero_point: int


@dataclass(frozen=True)
class ClusterView:
    """The clusters of one site, for drawing.

    Attributes:
        order: [C] int32, new = old[order]. labels: [C] int32, cluster of each channel in the original order, counted inside a
            head for per-head sites, 0 = narrowest. offsets: [G + 1] int32.
        low, high: [C] float32 in the original order.
        predicted_error: relative to one scale for the whole tensor (1.0).
    """

    site: str
    bits: int
    order: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    clusters: list[ClusterInfo]
    low: np.ndarray
    high: np.ndarray
    predicted_error: float
    seconds: float


@dataclass(frozen=True)
class GridNoise:
    """Rounding noise of one site over the power of its median token: with one grid, with clusters, with a grid per channel."""

    tensor: float
    clusters: float
    channels: float


@dataclass(frozen=True)
class ErrorCurve:
    """Predicted error by number of clusters, relative to one scale for the whole tensor.

    Attributes:
        g: clusters, per head for q, k, v, o_in.
        kmeans, equal: with KMeans, and with equal groups of channels sorted by range (the variant "sorted").
        per_channel: with one scale per channel, the least possible.
        knee: of `kmeans`, see `knee`.
    """

    site: str
    bits: int
    g: list[int]
    kmeans: list[float]
    equal: list[float]
    per_channel: float
    knee: int | None


def recluster(report: RangesReport, site: str, clusters: Clusters, *, bits: int = 4) -> ClusterView:
    """Cluster one observed site with the counts of its reordering. Raises: InputError for an unknown site."""
    start = time.perf_counter()
    entry = _entry(report, site)
    found = _clusters(report, entry, clusters)
    order, offsets = found.order.numpy(), found.offsets.numpy()
    infos = []
    for i, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        members = order[first:last]
        infos.append((i, len(members), float(entry.low[members].min()), float(entry.high[members].max())))
    scales = _scales(np.array([c[2] for c in infos]), np.array([c[3] for c in infos]), bits)
    views = [ClusterInfo(*c, float(s), int(z)) for c, s, z in zip(infos, *scales, strict=True)]
    per_block = found.labels.numpy() - np.repeat(_first_label(offsets, order, entry.block), entry.block)
    return ClusterView(
        site,
        bits,
        order.astype(np.int32),
        per_block.astype(np.int32),
        offsets.astype(np.int32),
        views,
        entry.low,
        entry.high,
        _relative(entry, order, offsets),
        time.perf_counter() - start,
    )


def grid_noise(report: RangesReport, view: ClusterView) -> GridNoise:
    """Predict the rounding noise of a clustering, step² / 12, in a report that has `peaks`.

    The power of the median token is what a rotation keeps, and what massive tokens do not change.
    """
    entry, width = _entry(report, view.site), len(view.low)
    (step,), _ = _scales(view.low.min(keepdims=True), view.high.max(keepdims=True), view.bits)
    one = float(step) ** 2 / 12 / max(report.peaks[view.site].power, 1e-24)
    return GridNoise(one, one * view.predicted_error, one * _relative(entry, np.arange(width), np.arange(width + 1)))


def error_curve(report: RangesReport, site: str, *, bits: int = 4) -> ErrorCurve:
    """Predict the relative error at the cluster counts of `counts_within`."""
    entry = _entry(report, site)
    counts, width = counts_within(entry.block), len(entry.low)

    def errors(variant: str) -> list[float]:
        found = (_clusters(report, entry, Clusters(*[count] * len(REORDERS)), variant) for count in counts)
        return [_relative(entry, clusters.order.numpy(), clusters.offsets.numpy()) for clusters in found]

    kmeans, per_channel = errors("default"), _relative(entry, np.arange(width), np.arange(width + 1))
    return ErrorCurve(
        site, bits, counts, kmeans, errors("sorted"), per_channel, knee([*counts, entry.block], [*kmeans, per_channel])
    )


def counts_within(block: int) -> list[int]:
    """List the cluster counts of a curve: 1, 2, 4, … up to the block's width, at most `LARGEST_COUNT`."""
    return [2**power for power in range(min(block, LARGEST_COUNT).bit_length())]


def knee(counts: Sequence[int], costs: Sequence[float]) -> int | None:
    """Find the cluster count beyond which more clusters gain little: the point farthest below the line between the ends.

    x = log2 count and y = cost, both scaled to 0 … 1. None where no point lies below the line.
    Source: the Kneedle rule (Satopää et al., 2011) for a falling curve.

    Args: counts: rising, the last one per channel.
    """
    drop, spread = costs[0] - costs[-1], math.log2(counts[-1])
    if drop <= 0 or spread == 0:
        return None
    below = [1 - math.log2(g) / spread - (cost - costs[-1]) / drop for g, cost in zip(counts, costs, strict=True)]
    return counts[below.index(max(below))] if max(below) > 0 else None


def _entry(report: RangesReport, site: str) -> SiteRanges:
    if site not in report.sites:
        raise InputError(
            f"Site {str(site)[:40]!r} was not observed: use one such as {next(iter(report.sites))}.", code="E-PARAM-SITE"
        )
    return report.sites[site]


def _clusters(report: RangesReport, entry: SiteRanges, clusters: Clusters, variant: str = "default") -> ChannelClusters:
    """Cluster a site by the rules of the method itself."""
    name = REORDER_OF[entry.kind]
    ranges = {kind: _ranges(report.sites[f"layers.{entry.layer}.{kind}"]) for kind in REORDERS[name]}
    recipe = QuantRecipe(report.model, clusters=clusters, variant=variant)
    heads = {"groups": report.groups, "head_dim": entry.block}
    if name == "R5" and entry.block < len(entry.low):  # each expert by itself
        (whole,) = ranges.values()
        parts = [{entry.kind: whole.permuted(own)} for own in torch.arange(len(entry.low)).split(entry.block)]
        found = [reorder_clusters(name, part, recipe, **heads, refine_up_to=REFINED) for part in parts]
        orders = torch.cat([one.order + i * entry.block for i, one in enumerate(found)])
        return ChannelClusters(orders, torch.cat([torch.zeros(1, dtype=torch.int64), *(one.counts for one in found)]).cumsum(0))
    return site_clusters(entry.kind, reorder_clusters(name, ranges, recipe, **heads, refine_up_to=REFINED), **heads)


def _ranges(entry: SiteRanges) -> ChannelRanges:
    """Return a site's ranges without samples, which clustering does not use."""
    low, high = torch.tensor(entry.low), torch.tensor(entry.high)
    return ChannelRanges(low, high, *(torch.empty(0, len(low)) for _ in range(3)))


def _first_label(offsets: np.ndarray, order: np.ndarray, block: int) -> np.ndarray:
    """Return the number of the first cluster of each block."""
    return np.unique(order[offsets[:-1]] // block, return_index=True)[1]


def _scales(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    params = choose_qparams(torch.from_numpy(low), torch.from_numpy(high), bits=bits, grid=Grid.EXACT)
    return params.scale.numpy(), params.zero_point.numpy()


def _relative(entry: SiteRanges, order: np.ndarray, offsets: np.ndarray) -> float:
    whole = float(entry.high.max() - entry.low.min())
    if whole == 0:
        return 1.0
    starts, sizes = offsets[:-1], np.diff(offsets)
    width = np.maximum.reduceat(entry.high[order], starts) - np.minimum.reduceat(entry.low[order], starts)
    return float((sizes * (width / whole) ** 2).sum() / sizes.sum())

"""Cluster ranges that were observed before, fast enough for a slider: no model and no tokens are needed.

The clusters are those that RPTQ's plan of the layer would form from these ranges, with every activation quantised: R2 and R3 are
formed once per key/value head, on points of both sites that share the order. Two things differ in a run: it leaves the first
token of every window out (variant official does not), and it improves KMeans' answer at any size, here only up to `REFINED`.

The predicted error of a clustering is the mean squared step of its clusters divided by that of one step for all channels:
rounding noise is step² / 12 wherever values spread over several codes.
"""

from __future__ import annotations

import time
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
class ErrorCurve:
    """Predicted relative error by number of clusters (per head for q, k, v, o_in), and `per_channel`, the least possible."""

    site: str
    bits: int
    g: list[int]
    relative_error: list[float]
    per_channel: float


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


def error_curve(report: RangesReport, site: str, *, bits: int = 4) -> ErrorCurve:
    """Predict the relative error at g = 1, 2, 4, … up to the block's width, at most 256."""
    entry = _entry(report, site)
    counts = [1]
    while counts[-1] * 2 <= min(entry.block, 256):
        counts.append(counts[-1] * 2)
    errors = []
    for count in counts:
        found = _clusters(report, entry, Clusters(count, count, count, count, count))
        errors.append(_relative(entry, found.order.numpy(), found.offsets.numpy()))
    width = len(entry.low)
    return ErrorCurve(site, bits, counts, errors, _relative(entry, np.arange(width), np.arange(width + 1)))


def _entry(report: RangesReport, site: str) -> SiteRanges:
    if site not in report.sites:
        raise InputError(
            f"Site {str(site)[:40]!r} was not observed: use one such as {next(iter(report.sites))}.", code="E-PARAM-SITE"
        )
    return report.sites[site]


def _clusters(report: RangesReport, entry: SiteRanges, clusters: Clusters) -> ChannelClusters:
    """Cluster a site by the rules of the method itself."""
    name = REORDER_OF[entry.kind]
    ranges = {kind: _ranges(report.sites[f"layers.{entry.layer}.{kind}"]) for kind in REORDERS[name]}
    recipe, heads = QuantRecipe(report.model, clusters=clusters), {"groups": report.groups, "head_dim": entry.block}
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

"""C1: clusterings of the reorder stage on observed ranges, against scikit-learn with ten restarts."""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np
from sklearn.cluster import KMeans

from benchmarks.common import Result, interleave
from core import Calibration, Workbench
from core.calibration.report import RangesReport
from core.methods.rptq.cluster import ChannelClusters, cluster_channels

WHOLE, PER_HEAD = {"attn_in": 32, "mlp_in": 32, "down_in": 32}, {"k": 4, "v": 4}
EVERY = 6


def problems(report: RangesReport) -> dict[str, tuple[np.ndarray, int, int | None]]:
    """Collect points [C, 2], clusters and block of the five reorderings of every sixth layer."""
    chosen = {}
    for name, site in report.sites.items():
        if site.layer % EVERY == 0 and site.kind in (*WHOLE, *PER_HEAD):
            points = np.stack([site.high, site.low], axis=1).astype(np.float64)
            chosen[name] = (points, WHOLE.get(site.kind) or PER_HEAD[site.kind], site.block if site.kind in PER_HEAD else None)
    return chosen


def published(points: np.ndarray, count: int, block: int | None) -> list[np.ndarray]:
    """Compute labels per block: KMeans with ten restarts, block by block."""
    size = block or len(points)
    return [KMeans(count, n_init=10, random_state=0).fit(points[i : i + size]).labels_ for i in range(0, len(points), size)]


def inertia(points: np.ndarray, labels: np.ndarray) -> float:
    """Compute the sum of squared distances to the cluster means."""
    return float(sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels)))


def _found_inertia(points: np.ndarray, found: ChannelClusters) -> float:
    clusters = np.split(found.order.numpy(), found.offsets[1:-1].numpy())
    return float(sum(((points[c] - points[c].mean(0)) ** 2).sum() for c in clusters))


def _published_inertia(points: np.ndarray, count: int, block: int | None) -> float:
    size = block or len(points)
    parts = published(points, count, block)
    return sum(inertia(points[i * size : (i + 1) * size], labels) for i, labels in enumerate(parts))


def run(model: str) -> list[Result]:
    """Measure speed and inertia over the published loop, whole widths and heads apart and together."""
    bench = Workbench()
    bench.model(model)
    start = time.perf_counter()
    report = bench.observe(model, Calibration(tokens=1024))
    forward = time.perf_counter() - start
    groups = defaultdict(list)
    for points, count, block in problems(report).values():
        for group in ("heads" if block else "whole widths", "the stage"):
            groups[group].append((points, count, block))
    results = []
    for group, members in groups.items():
        slow, fast = interleave(
            lambda m=members: [published(*p) for p in m],
            lambda m=members: [cluster_channels(p, g, block=b) for p, g, b in m],
            rounds=3,
            warm_up=False,
        )
        ratios = [_found_inertia(p, cluster_channels(p, g, block=b)) / _published_inertia(p, g, b) for p, g, b in members]
        results.append(
            Result(
                f"C1 reorder: clustering of {group}",
                slow / fast,
                "scikit-learn, n_init=10, head by head",
                "≥ 2.5×, inertia ± 1 %" if group == "the stage" else "",
                fast * EVERY,
                note=f"inertia {np.mean(ratios):.3f} of it (worst {max(ratios):.3f}); observing 1,024 tokens: {forward:.1f} s",
            )
        )
    return results

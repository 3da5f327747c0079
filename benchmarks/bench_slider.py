"""Time the g slider: clustering of one observed site, as the page does it, at 4,096 channels."""

from __future__ import annotations

from statistics import median

import numpy as np

from benchmarks.common import Result
from core import Clusters, RangesReport, SiteRanges, recluster

CHANNELS = 4096


def run(model: str) -> list[Result]:
    """Measure seconds of `recluster` at several g, on skewed synthetic ranges (the model is not needed)."""
    generator = np.random.default_rng(0)
    width = np.exp(generator.normal(size=CHANNELS)).astype(np.float32)
    width[:24] *= 40
    low, high = -width * generator.random(CHANNELS, dtype=np.float32), width
    site = SiteRanges("layers.0.mlp_in", 0, "mlp_in", low, high, CHANNELS)
    report = RangesReport("synthetic", None, {}, "synthetic", 0, 0, 0.0, "cpu", 1, {site.site: site})
    results = []
    for g in (8, 32, 128):
        recluster(report, site.site, Clusters.uniform(g))
        times = [recluster(report, site.site, Clusters.uniform(g)).seconds for _ in range(7)]
        results.append(Result(f"g slider: recluster {CHANNELS} channels, g = {g}", None, "-", "≤ 0.15 s", seconds=median(times)))
    return results

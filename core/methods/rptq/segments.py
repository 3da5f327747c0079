"""Merge or rescale clusters so that integer products need few accumulators; it costs accuracy.

`aligned`: 1 to ACCUMULATORS runs of the planned channel order with boundaries at multiples of ALIGN columns, chosen to
minimise Σ (importance of a run's channels) (range of the run)². Channels keep their order; a run's grid covers all of them, so
no further values are clipped. Layers with a float input have no accumulators, so they get as many runs as there were clusters.
`pow2`: clusters stay, and each scale becomes the largest one divided by 2**e, 0 <= e <= 8 - bits, rounded up. A code of b bits
times 2**(8 - b - e) fits int8, so one accumulator serves all clusters; the weight has one scale per row. Inputs of 8 bits have no
bits to spare and are aligned instead.

These boundaries are not in RPTQ (arXiv:2304.01089), which takes those that KMeans finds.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from core.quant.affine import QParams
from core.quant.observer import SitePlan, fake_rows, sqnr_db
from core.quant.ranges import ChannelRanges
from kernels import code_limits
from kernels.linear.choose import MIN_COLUMNS_PER_SEGMENT

ALIGN = 32
ACCUMULATORS = 4


def most_runs(width: int) -> int:
    """Return how many runs pay in integer products of `width` columns: ACCUMULATORS, or fewer where runs would be too narrow."""
    return max(1, min(ACCUMULATORS, width // MIN_COLUMNS_PER_SEGMENT))


def best_runs(low: Tensor, high: Tensor, importance: Tensor | None, *, limit: int, align: int = ALIGN) -> Tensor:
    """Choose boundaries of at most `limit` runs, [G + 1] int64: 0, multiples of `align`, C. Takes O((C / align)² limit) steps.

    Args:
        low, high: [C] ranges of the channels in the planned order.
        importance: [C] factors of their squared steps; None for equal ones.
    """
    cuts = [*range(0, len(low), align), len(low)]
    weight = np.ones(len(low)) if importance is None else importance.double().numpy()
    sums = np.concatenate([[0.0], np.cumsum(np.add.reduceat(weight, cuts[:-1]))])
    lows, highs = np.minimum.reduceat(low.numpy(), cuts[:-1]), np.maximum.reduceat(high.numpy(), cuts[:-1])
    count = len(lows)
    cost = np.full((count + 1, count + 1), np.inf)  # of one run from cut i to cut j
    for i in range(count):
        width = np.maximum.accumulate(highs[i:]) - np.minimum.accumulate(lows[i:])
        cost[i, i + 1 :] = (sums[i + 1 :] - sums[i]) * width.astype(np.float64) ** 2
    best, came = cost[0].copy(), []  # best[j]: least cost of the runs up to cut j
    for _ in range(min(limit, count) - 1):
        through = best[:, None] + cost
        previous = through.argmin(0)
        better = through.min(0) < best
        came.append(np.where(better, previous, -1))
        best = np.where(better, through.min(0), best)
    chosen, at = [count], count
    for previous in reversed(came):
        if previous[at] >= 0:
            at = int(previous[at])
            chosen.append(at)
    return torch.tensor([0, *(cuts[i] for i in reversed(chosen))])


def power_of_two(site: SitePlan, ranges: ChannelRanges) -> SitePlan:
    """Replace a site's scales by the largest one over powers of two, with one weight group; the grids keep their centres."""
    qmin, qmax = code_limits(site.bits)
    scale, zero = site.params.scale, site.params.zero_point
    largest, middle = scale.max(), (qmin + qmax) / 2
    exponent = (torch.frexp(largest / scale).exponent - 1).clamp_(0, 8 - site.bits)
    shared = largest * 2.0**-exponent
    params = QParams(shared, (middle - (middle - zero) * scale / shared).round())
    noise = sqnr_db(ranges.rows, fake_rows(ranges.rows, params, site.offsets, site.bits))
    return replace(site, params=params, sqnr_db=noise, weight_offsets=torch.tensor([0, int(site.offsets[-1])]))

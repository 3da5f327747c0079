"""Choose scale and zero point per cluster of one site, by the published rules or by better ones.

Published: moving-average ranges, official grid. Better: exact ranges without the first token, both ends on the grid, and
each cluster's range shrunk towards its centre by the factor with the smallest squared error on sampled rows, the channels
weighted by how much the layer that reads them amplifies their errors. Why: docs/log.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from core.quant.affine import Grid, QParams, choose_qparams
from core.quant.ranges import ChannelRanges, cluster_bounds, ema_bounds
from core.quant.segments import expand, segment_sum
from kernels import code_limits, fake_quantize

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)

SEARCH_COLUMNS = 128
"""Channels that a search looks at together: 512 rows of them stay in a core's cache."""


@dataclass(frozen=True)
class RangeRules:
    """Rules by which observed ranges become a grid.

    Attributes:
        grid: OFFICIAL (2**bits steps) or EXACT (2**bits - 1).
        ema: moving-average bounds instead of exact ones.
        clip_search: shrink each cluster's range where that lowers the weighted squared error.
    """

    grid: Grid
    ema: bool
    clip_search: bool


@dataclass(frozen=True)
class SitePlan:
    """The quantisation of one activation site.

    Attributes:
        bits: 2 to 8, or 16 for not quantised.
        offsets: [G + 1] int64 cluster boundaries in the planned order (16-bit sites keep them: weights are grouped by them).
        params: scale and zero point per cluster [G]; None at 16 bits.
        sqnr_db: signal to quantisation noise on sampled calibration rows, dB; None at 16 bits.
        weight_offsets: clusters of the weight columns that read the site where they are not `offsets`.
        order: [C] int64, new = old[order], where the planned order is not the model's own.
    """

    bits: int
    offsets: Tensor
    params: QParams | None
    sqnr_db: float | None
    weight_offsets: Tensor | None = None
    order: Tensor | None = None


def plan_site(ranges: ChannelRanges, offsets: Tensor, bits: int, rules: RangeRules, importance: Tensor | None = None) -> SitePlan:
    """Plan the quantisation of one site whose channels are in cluster order.

    Args:
        ranges: of the site, in the planned order.
        offsets: [G + 1] int64.
        bits: 2 to 8, or 16 for none.
        importance: [C] factors of the channels' squared errors; None for equal ones.
    """
    if bits >= 16:
        return SitePlan(16, offsets, None, None)
    low, high = (ema_bounds if rules.ema else cluster_bounds)(ranges, offsets)
    params = choose_qparams(low, high, bits=bits, grid=rules.grid)
    if rules.clip_search:
        params = _search(ranges.rows, low, high, offsets, bits, rules.grid, importance)
    return SitePlan(bits, offsets, params, sqnr_db(ranges.rows, fake_rows(ranges.rows, params, offsets, bits)))


def sqnr_db(signal: Tensor, approximation: Tensor) -> float:
    """Compute the signal-to-noise ratio 10 log10(Σ x² / Σ (x - x̂)²) in dB; infinite for an exact copy."""
    noise = float((signal - approximation).square().sum(dtype=torch.float64))
    return decibels(float(signal.square().sum(dtype=torch.float64)), noise)


def decibels(power: float, noise: float) -> float:
    """Compute 10 log10(power / noise) of two finite sums of squares; infinite without noise, -infinite without power."""
    if noise == 0:
        return math.inf
    return 10 * (math.log10(power) - math.log10(noise)) if power > 0 else -math.inf


def _search(
    rows: Tensor, low: Tensor, high: Tensor, offsets: Tensor, bits: int, grid: Grid, importance: Tensor | None
) -> QParams:
    """Find the factor of each cluster's range with the smallest error; of equal ones the largest."""
    centre, half = (high + low) / 2, (high - low) / 2
    factors = torch.tensor(SHRINK)[:, None]  # [F, 1]
    tried = choose_qparams(centre - factors * half, centre + factors * half, bits=bits, grid=grid)  # [F, G]
    qmin, qmax = code_limits(bits)
    scale, zero = expand(tried.scale, offsets), expand(tried.zero_point, offsets)  # [F, C]
    lower, upper = qmin - zero, qmax - zero
    error = torch.empty_like(scale)
    for start in range(0, rows.shape[1], SEARCH_COLUMNS):
        part = slice(start, start + SEARCH_COLUMNS)
        x = rows[:, part].contiguous()
        for one in range(len(SHRINK)):
            error[one, part] = fake_quantize(x, scale[one, part], lower[one, part], upper[one, part]).sub_(x).square_().sum(0)
    best = segment_sum(error if importance is None else error * importance, offsets).argmin(0, keepdim=True)
    return QParams(*(t.gather(0, best)[0] for t in (tried.scale, tried.zero_point)))


def fake_rows(rows: Tensor, params: QParams, offsets: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise rows [R, C] with clusters between `offsets`."""
    qmin, qmax = code_limits(bits)
    zero = expand(params.zero_point, offsets)
    return fake_quantize(rows, expand(params.scale, offsets), qmin - zero, qmax - zero)

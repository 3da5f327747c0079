"""Per-channel ranges of activations: exact, and the published code's moving average.

Exact: minimum and maximum over every token. EMA (published code): per calibration sample t, at cluster level,

    M_0 = max_0          M_t = 0.99 M_{t-1} + 0.01 max_t          (the same for the minimum)

Source: RPTQ's official `ema_minmax` metric, which broadcasts a cluster's bound to its channels after every step, so the
average runs on cluster bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.quant.segments import segment_max, segment_min

EMA_DECAY = 0.99


@dataclass(frozen=True)
class ChannelRanges:
    """Ranges of one site.

    Attributes:
        low, high: [C] float32, exact over all observed tokens.
        sample_low, sample_high: [S, C], the same per calibration sample (window).
        rows: [R, C] float32, a seeded sample of tokens, for clip search and error figures.
    """

    low: Tensor
    high: Tensor
    sample_low: Tensor
    sample_high: Tensor
    rows: Tensor

    def permuted(self, order: Tensor) -> ChannelRanges:
        """Return the same channels in another order: new = old[order]."""
        return ChannelRanges(*(getattr(self, name)[..., order] for name in ("low", "high", "sample_low", "sample_high", "rows")))


def cluster_bounds(ranges: ChannelRanges, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the exact (low, high) of each cluster, [G] each. Channels must be in cluster order."""
    return segment_min(ranges.low, offsets), segment_max(ranges.high, offsets)


def channel_ema(ranges: ChannelRanges) -> tuple[Tensor, Tensor]:
    """Compute the moving-average (low, high) of each channel over the samples, [C] each."""
    return _ema(ranges.sample_low), _ema(ranges.sample_high)


def ema_bounds(ranges: ChannelRanges, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the moving-average (low, high) of each cluster over the samples, [G] each."""
    return _ema(segment_min(ranges.sample_low, offsets)), _ema(segment_max(ranges.sample_high, offsets))


def _ema(samples: Tensor) -> Tensor:
    state = samples[0].clone()
    for value in samples[1:]:
        state = torch.lerp(state, value, 1.0 - EMA_DECAY)
    return state

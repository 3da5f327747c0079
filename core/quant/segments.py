"""Reduce and expand runs of contiguous channels that share a scale.

one run [0, C]            per tensor
G runs [0, 7, 12, …, C]   per cluster, after the reordering has made clusters contiguous
C runs                    per channel
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_min(values: Tensor, offsets: Tensor) -> Tensor:
    """Compute the minimum of each run along the last dimension: values [..., C], offsets [G + 1] int64 -> [..., G]."""
    return torch.segment_reduce(values.movedim(-1, 0).contiguous(), "min", offsets=offsets, axis=0).movedim(0, -1)


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """Compute the maximum of each run along the last dimension: values [..., C], offsets [G + 1] int64 -> [..., G]."""
    return torch.segment_reduce(values.movedim(-1, 0).contiguous(), "max", offsets=offsets, axis=0).movedim(0, -1)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Compute the sum of each run along the last dimension: values [..., C], offsets [G + 1] int64 -> [..., G]."""
    return torch.segment_reduce(values.movedim(-1, 0).contiguous(), "sum", offsets=offsets, axis=0).movedim(0, -1)


def expand(per_run: Tensor, offsets: Tensor) -> Tensor:
    """Repeat the value of each run for its channels: per_run [..., G], offsets [G + 1] -> [..., C]."""
    return torch.repeat_interleave(per_run, offsets.diff(), dim=-1)

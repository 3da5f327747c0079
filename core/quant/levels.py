"""List the numbers that a grid can represent over one channel, by the same rules that quantise tensors.

    tensor, cluster    the codes of an affine grid on a range, EXACT rule of `core.quant.affine`
    fp4                E2M1 with scale max|x| / 12, as `core.quant.dynamic.fp4_minmax`
    ternary            -α, 0 and α with α = mean|x|, as `core.quant.dynamic.ternary_absmean`

BitNet takes max|x| over one token and mean|x| over one matrix; here both are taken over the values of the channel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from core.checks import require_choice
from core.quant.affine import Grid, choose_qparams
from core.quant.dynamic import fp4_minmax, ternary_absmean
from kernels import code_limits

GRIDS = ("tensor", "cluster", "fp4", "ternary")
RAMP = 241
"""Numbers between the ends of a range that are quantised to find every code: ten for each step of the finest code."""


@dataclass(frozen=True)
class ChannelGrid:
    """A grid over one channel.

    Attributes:
        levels: the numbers that it represents, ascending, in units of the activation.
        used: how many of them the values of the channel are rounded to at most.
    """

    levels: list[float]
    used: int


def channel_grid(
    name: str, low: float, high: float, mean_size: float, ranges: Mapping[str, tuple[float, float]], *, bits: int = 4
) -> ChannelGrid:
    """Make a grid over the values of a channel.

    Args:
        name: one of GRIDS.
        low, high, mean_size: smallest and largest value of the channel, and the mean of its absolute values.
        ranges: bounds that the affine grids "tensor" and "cluster" cover.
        bits: of the affine grids, 2 to 8.
    Raises: InputError for another name.
    """
    if require_choice("grid", name, GRIDS) in ranges:
        levels = affine_levels(*ranges[name], bits)
    elif name == "fp4":
        codes, scale = fp4_minmax(torch.linspace(-1, 1, RAMP) * max(abs(low), abs(high)))
        levels = (codes.unique() * scale).tolist()
    else:
        scale = float(ternary_absmean(torch.tensor([mean_size]))[1])
        levels = [-scale, 0.0, scale]
    middles = [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]
    return ChannelGrid(levels, 1 + bisect_left(middles, high) - bisect_left(middles, low))


def affine_levels(low: float, high: float, bits: int) -> list[float]:
    """List the numbers of the affine grid on [low, high], ascending. Raises: NumericError for a bound that is not finite."""
    params, (qmin, qmax) = choose_qparams(torch.tensor(low), torch.tensor(high), bits=bits, grid=Grid.EXACT), code_limits(bits)
    return ((torch.arange(qmin, qmax + 1) - params.zero_point) * params.scale).tolist()

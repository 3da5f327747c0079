"""Levels of grids over a channel: every number that the quantisers themselves give, and no other."""

from __future__ import annotations

import pytest
import torch

from core.errors import InputError
from core.quant.affine import Grid, choose_qparams
from core.quant.dynamic import fp4_minmax, ternary_absmean
from core.quant.levels import GRIDS, channel_grid
from kernels import code_limits, fake_quantize
from tests.core.tools import gaussian

RANGES = {"tensor": (-40.0, 25.0), "cluster": (-3.0, 2.5)}


def grid_of(name, x, bits=4):
    return channel_grid(name, float(x.min()), float(x.max()), float(x.abs().mean()), RANGES, bits=bits)


def rounded(name, x, bits=4):
    """The values after the quantiser of that name, by its own function."""
    if name in RANGES:
        params = choose_qparams(*torch.tensor(RANGES[name]), bits=bits, grid=Grid.EXACT)
        limits = torch.tensor(code_limits(bits)) - params.zero_point
        return fake_quantize(x, params.scale, *limits)
    codes, scale = (fp4_minmax if name == "fp4" else ternary_absmean)(x)
    return codes * scale


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("shift", [0.0, 1.7])
def test_values_are_rounded_to_the_levels_and_reach_all_that_are_used(name, shift):
    x = torch.linspace(-2.9 + shift, 2.4, 100_000)
    x = x * torch.rand(1, generator=torch.Generator().manual_seed(1))  # no end is a level by chance
    found, values = grid_of(name, x), rounded(name, x).unique()
    distance = (values[:, None] - torch.tensor(found.levels)).abs().amin(1)
    assert float(distance.max()) < 1e-5
    assert found.used == len(values)


@pytest.mark.parametrize(("name", "count"), [("tensor", 16), ("cluster", 16), ("fp4", 15), ("ternary", 3)])
def test_the_number_of_levels(name, count):
    found = grid_of(name, gaussian(1, 5000))
    assert len(found.levels) == count and found.levels == sorted(found.levels) and 0.0 in found.levels
    assert 1 <= found.used <= count


def test_a_quiet_channel_uses_few_levels_of_the_whole_tensor_and_many_of_its_cluster():
    quiet = torch.linspace(-2, 2, 50)
    assert grid_of("tensor", quiet).used == 1 < 10 < grid_of("cluster", quiet).used
    assert len(grid_of("tensor", quiet, bits=8).levels) == 256


def test_a_channel_of_zeros_has_a_grid_and_another_name_is_refused():
    assert grid_of("fp4", torch.zeros(4)).used == grid_of("ternary", torch.zeros(4)).used == 1
    with pytest.raises(InputError, match="tensor, cluster, fp4, ternary"):
        grid_of("int3", torch.zeros(4))

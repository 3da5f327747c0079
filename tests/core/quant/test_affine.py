"""Both grids against the published formulas written in Python floats: anchors, ends, constants, clipping, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.errors import NumericError
from core.quant.affine import MAX_ZERO_POINT, Grid, QParams, choose_qparams, round_scale
from kernels import code_limits, dequantize, quantize

FLOATS = st.floats(-1e6, 1e6, width=32)
RELATIVE = 2e-6
"""Float32 rounding of the bounds themselves, relative to the larger bound."""


def params_of(low: float, high: float, bits: int, grid: Grid, **options: bool) -> QParams:
    return choose_qparams(torch.tensor([low]), torch.tensor([high]), bits=bits, grid=grid, **options)


def round_trip(x: Tensor, params: QParams, bits: int) -> Tensor:
    return dequantize(quantize(x, params.scale, params.zero_point, *code_limits(bits)), params.scale, params.zero_point)


def between(low: float, high: float, n: int = 257) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64).mul(high - low).add(low).float().clamp(low, high)


@pytest.mark.parametrize("bits, limits", [(2, (-2, 1)), (3, (-4, 3)), (4, (-8, 7)), (8, (-128, 127))])
def test_code_limits(bits, limits):
    assert code_limits(bits) == limits


@pytest.mark.parametrize(
    "low, high, bits, scale, zero",
    [
        (80, 100, 4, 1.25, -72),
        (-100, -50, 4, 3.125, 24),
        (-1, 1, 8, 2 / 256, 0),
        (0, 6, 4, 0.375, -8),
        (0, 6, 3, 0.75, -4),
        (0, 6, 8, 6 / 256, -128),
        (-1, 3, 2, 1.0, -1),
    ],
)
def test_official_anchors(low, high, bits, scale, zero):
    found = params_of(low, high, bits, Grid.OFFICIAL)
    assert float(found.scale) == pytest.approx(scale, rel=1e-7) and float(found.zero_point) == zero


@pytest.mark.parametrize("bits", range(2, 9))
def test_relu_range_on_the_official_grid(bits):
    """The published grid: [0, M] has z = -2^(n-1) exactly, keeps 0 exactly and takes M to M (1 - 2^-n)."""
    found = params_of(0.0, 5.0, bits, Grid.OFFICIAL)
    assert float(found.zero_point) == -(2 ** (bits - 1))
    back = round_trip(torch.tensor([0.0, 5.0]), found, bits)
    assert float(back[0]) == 0 and float(back[1]) == pytest.approx(5 * (1 - 2.0**-bits), rel=1e-6)


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(2, 8), one=FLOATS, other=FLOATS)
def test_official_is_the_published_formula(bits, one, other):
    low, high = min(one, other), max(one, other)
    found = params_of(low, high, bits, Grid.OFFICIAL)
    scale = min(max((high - low) * 2.0**-bits, 1e-4), 1e4)
    zero = min(max(-0.5 * (high + low) / scale, -1e4), 1e4)
    assert float(found.scale) == pytest.approx(scale, rel=1e-6)
    assert abs(float(found.zero_point) - zero) <= 0.5 + 2e-6 * abs(zero)
    assert float(found.zero_point) == int(found.zero_point)


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(2, 8), one=FLOATS, other=FLOATS)
def test_official_errors(bits, one, other):
    """Half a step inside and at the bottom, up to one and a half at the top, unless a limit of the rule acts."""
    low, high = min(one, other), max(one, other)
    found = params_of(low, high, bits, Grid.OFFICIAL)
    scale = float(found.scale)
    if not 1e-4 < scale < 1e4 or abs(float(found.zero_point)) >= 1e4:
        return
    x, slack = between(low, high), RELATIVE * max(abs(low), abs(high))
    error = (round_trip(x, found, bits) - x).abs()
    assert float(error.max()) <= 1.5 * scale + slack
    inside = x <= high - 1.5 * scale
    assert (error[inside] <= 0.5 * scale + slack).all() and float(error[0]) <= 0.5 * scale + slack


def test_official_top_bin_is_clipped_by_a_step_and_a_half():
    """z rounds the midpoint to a code: the worst case is a tie, at which the grid ends 1.5 steps below the maximum."""
    worst = 0.0
    for low in torch.linspace(-3, 3, 601).tolist():
        found = params_of(low, low + 16.0, 4, Grid.OFFICIAL)
        top = torch.tensor([low + 16.0])
        worst = max(worst, float((top - round_trip(top, found, 4)) / found.scale))
    assert 1.45 < worst <= 1.5 + 1e-5


@settings(max_examples=400, deadline=None)
@given(bits=st.integers(2, 8), one=FLOATS, other=FLOATS)
def test_exact_keeps_both_ends_on_the_grid(bits, one, other):
    low, high = min(one, other), max(one, other)
    found = params_of(low, high, bits, Grid.EXACT)
    scale, slack = float(found.scale), RELATIVE * max(abs(low), abs(high))
    assert scale > 0 and float(found.zero_point) == int(found.zero_point)
    assert abs(float(found.zero_point)) <= MAX_ZERO_POINT * 1.001 + 2**bits
    x = between(low, high)
    codes = quantize(x, found.scale, found.zero_point, *code_limits(bits))
    error = (round_trip(x, found, bits) - x).abs()
    assert float(error.max()) <= 0.5 * scale + slack
    if high - low > max(1e-4 * max(abs(low), abs(high)), 1e-35):
        assert codes[0] == code_limits(bits)[0] and codes[-1] >= code_limits(bits)[1] - 1
        assert scale == pytest.approx((high - low) / (2**bits - 1), rel=1e-5, abs=slack)


@settings(max_examples=300, deadline=None)
@given(bits=st.integers(2, 8), value=st.floats(-(2.0**100), 2.0**100, width=32))
def test_constants_come_back(bits, value):
    found = params_of(value, value, bits, Grid.EXACT)
    x = torch.tensor([value])
    assert float(round_trip(x, found, bits)) == pytest.approx(float(x), rel=1e-6, abs=1e-37)


@settings(max_examples=200, deadline=None)
@given(bits=st.integers(2, 8), value=st.floats(2.0**-100, 2.0**100, width=32), ulps=st.integers(1, 40))
def test_nearly_constant_ranges_keep_their_value(bits, value, ulps):
    """Ranges too narrow for an exact zero point must not lose the value they sit at."""
    low = torch.tensor(value)
    high = low
    for _ in range(ulps):
        high = torch.nextafter(high, torch.tensor(math.inf))
    found = choose_qparams(low[None], high[None], bits=bits, grid=Grid.EXACT)
    x = torch.stack([low, high])
    assert ((round_trip(x, found, bits) - x).abs() <= 1e-5 * x.abs()).all()


@pytest.mark.parametrize("grid", list(Grid), ids=str)
@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize(
    "low, high", [(0.0, 0.0), (-0.0, 0.0), (1e-45, 1e-45), (0.0, 1e-44), (-1e-38, 1e-38), (1e38, 1e38), (-1e38, 1e38)]
)
def test_degenerate_ranges_stay_finite(grid, bits, low, high):
    found = params_of(low, high, bits, grid)
    assert math.isfinite(float(found.scale)) and float(found.scale) > 0 and math.isfinite(float(found.zero_point))
    back = round_trip(torch.tensor([low, 0.0, high]), found, bits)
    assert torch.isfinite(back).all()
    if low == high == 0:
        assert back.abs().max() == 0


@pytest.mark.parametrize("grid", list(Grid), ids=str)
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("end", ("low", "high"))
def test_nan_and_infinity_are_refused(grid, bad, end):
    bounds = {"low": torch.tensor([0.0, 0.0]), "high": torch.tensor([1.0, 1.0])}
    bounds[end][1] = bad
    with pytest.raises(NumericError) as caught:
        choose_qparams(**bounds, bits=4, grid=grid)
    assert caught.value.code == "E-NUM-NAN" and len(str(caught.value)) < 240


def test_the_official_limits_act_and_can_be_lifted_for_weights():
    assert float(params_of(0, 1e-9, 4, Grid.OFFICIAL).scale) == pytest.approx(1e-4)
    assert float(params_of(-1e9, 1e9, 4, Grid.OFFICIAL).scale) == pytest.approx(1e4)
    assert float(params_of(50, 50, 4, Grid.OFFICIAL).zero_point) == -1e4
    assert float(params_of(50, 50, 4, Grid.OFFICIAL, clip_zero_point=False).zero_point) == pytest.approx(-5e5, rel=1e-5)


def test_shape_follows_the_bounds():
    low, high = -torch.rand(3, 5), torch.rand(3, 5)
    kept = low.clone(), high.clone()
    for grid in Grid:
        found = choose_qparams(low, high, bits=4, grid=grid)
        assert found.scale.shape == found.zero_point.shape == (3, 5) and found.scale.dtype == torch.float32
        one = choose_qparams(low[1, 2], high[1, 2], bits=4, grid=grid)
        assert one.scale == found.scale[1, 2] and one.zero_point == found.zero_point[1, 2]
    assert torch.equal(low, kept[0]) and torch.equal(high, kept[1])


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_a_scale_to_storage_keeps_the_grid_consistent(bits):
    low = torch.linspace(-3, 0, 50)
    high = torch.linspace(0.01, 2, 50)
    stored = round_scale(choose_qparams(low, high, bits=bits, grid=Grid.EXACT), low, torch.float16, bits=bits)
    assert torch.equal(stored.scale, stored.scale.half().float()), "the codes are made for the scale that is stored"
    bottom = round_trip(low, stored, bits)
    assert ((bottom - low).abs() <= stored.scale / 2 + 1e-6).all()


def test_small_weights_keep_a_useful_scale():
    """A cluster whose weights are all below 1e-4 must not vanish in the storage type's smallest number."""
    low, high = torch.tensor([-4e-5]), torch.tensor([5e-5])
    stored = round_scale(choose_qparams(low, high, bits=4, grid=Grid.EXACT), low, torch.float16, bits=4)
    x = between(-4e-5, 5e-5)
    assert float((round_trip(x, stored, 4) - x).norm() / x.norm()) < 0.15


def test_the_zero_point_is_that_of_the_rounded_scale():
    """A range too narrow for float16: its scale grows to the smallest useful one, and its lower end is fewer steps from zero."""
    low, high = torch.tensor([-7e-7]), torch.tensor([8e-7])
    params = choose_qparams(low, high, bits=4, grid=Grid.EXACT)
    stored = round_scale(params, low, torch.float16, bits=4)
    assert params.zero_point.tolist() == [-1.0]
    assert stored.zero_point.tolist() == [-8.0 + round(7e-7 / float(stored.scale))] == [-7.0]


def test_scales_outside_the_storage_type_stay_finite():
    low, high = torch.tensor([-1e9, -1e-12, 0.0]), torch.tensor([1e9, 1e-12, 0.0])
    stored = round_scale(choose_qparams(low, high, bits=4, grid=Grid.EXACT), low, torch.float16, bits=4)
    assert torch.isfinite(stored.scale).all() and (stored.scale > 0).all() and torch.isfinite(stored.scale.half()).all()
    assert torch.isfinite(round_trip(high, stored, 4)).all()

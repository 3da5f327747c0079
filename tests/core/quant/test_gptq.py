"""GPTQ against its textbook form: one column at a time, the inverse Hessian updated explicitly, float64, no blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from core.errors import NumericError
from core.quant.affine import Grid
from core.quant.gptq import DAMPING, inverse_factor, quantize_weight, round_to_nearest
from kernels import code_limits
from tests.core.tools import poisoned_memory

WIDTHS = (1, 2, 15, 16, 17, 63, 127, 128, 129, 145, 300)
"""Around the inner block of 16 and the outer block of 128."""


def offsets_of(width: int, clusters: int) -> Tensor:
    inner = torch.randperm(max(width - 1, 1), generator=torch.Generator().manual_seed(width))[: clusters - 1] + 1
    return torch.tensor(sorted({0, width, *inner[inner < width].tolist()}))


def problem(width: int, rows: int = 12, samples: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [N, K], inputs [M, K] (correlated, of unequal size), Hessian Xᵀ X in float32."""
    g = torch.Generator().manual_seed(seed + width)
    mix = torch.eye(width) + 0.5 * torch.randn(width, width, generator=g) / width**0.5
    x = torch.randn(samples, width, generator=g) @ mix * (torch.rand(width, generator=g) * 3 + 0.1)
    return torch.randn(rows, width, generator=g), x, x.t() @ x


def naive_gptq(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and how far each rounded value was from a tie, in steps. scale, zero: [N, K]."""
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0
    h.diagonal().add_(DAMPING * hessian.double().diagonal().mean())
    inverse = torch.linalg.inv(h)
    codes, margin = torch.empty_like(w), torch.empty_like(w)
    for i in range(w.shape[1]):
        steps = w[:, i] / scale[:, i]
        margin[:, i] = (steps - steps.floor() - 0.5).abs()
        codes[:, i] = (steps.round() + zero[:, i]).clamp(qmin, qmax)
        error = (w[:, i] - scale[:, i] * (codes[:, i] - zero[:, i])) / inverse[i, i]
        w[:, i + 1 :] -= error[:, None] * inverse[i, i + 1 :][None]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]  # column i leaves the problem
    return codes, margin


def spread(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(values.double(), offsets.diff(), dim=1)


def objective(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    e = (weight - quantized).double()
    return float(torch.einsum("nk,kl,nl->", e, hessian.double(), e))


@pytest.mark.parametrize("bits, grid", [(2, Grid.EXACT), (3, Grid.OFFICIAL), (4, Grid.EXACT), (8, Grid.OFFICIAL)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_are_those_of_textbook_gptq(width, bits, grid):
    weight, _, hessian = problem(width)
    offsets = offsets_of(width, 1 + width // 20)
    found = quantize_weight(weight, hessian, offsets, bits=bits, grid=grid)
    assert found.method == "gptq" and found.fallback is None
    w, (qmin, qmax) = found.weight, code_limits(bits)
    expected, margin = naive_gptq(weight, hessian, spread(w.scale, offsets), spread(w.zero_point, offsets), qmin, qmax)
    got = w.codes.double() + qmin
    same = got == expected
    if not bool(same.all()):  # a tie may fall either way in float32; what follows it in that row then differs rightly
        for row in range(len(weight)):
            wrong = (~same[row]).nonzero().flatten()
            if len(wrong):
                assert margin[row, wrong[0]] < 2e-3, f"row {row}, column {int(wrong[0])} differs without a tie"
        assert float((~same).any(1).float().mean()) < 0.3


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("clusters", (1, 5, 300))
def test_error_on_the_inputs_is_below_round_to_nearest(bits, clusters):
    weight, x, hessian = problem(300)
    offsets = torch.arange(301) if clusters == 300 else offsets_of(300, clusters)
    if clusters == 300:
        weight = weight + 0.01
    gptq = quantize_weight(weight, hessian, offsets, bits=bits, grid=Grid.OFFICIAL)
    rtn = round_to_nearest(weight, offsets, bits=bits, grid=Grid.OFFICIAL)
    a, b = (objective(weight, r.weight.dequantize(), hessian) for r in (gptq, rtn))
    assert a <= b * (1.0001 if clusters == 300 else 0.8)
    direct = float((x @ (weight - gptq.weight.dequantize()).t()).double().square().sum())
    assert direct == pytest.approx(a, rel=1e-3), "the objective is the output error on the calibration inputs"


@pytest.mark.parametrize("width", [128, 160, 320])
@pytest.mark.parametrize("bits", [3, 4])
def test_clusters_fitted_while_rounding_have_smaller_errors(bits, width):
    """Groups across the boundaries of both levels of columns; a factor that never wins changes nothing."""
    weight, _, hessian = problem(width, rows=24)
    offsets = torch.tensor([*range(0, width, 32), width])
    errors = {}
    for shrink in ((1.0,), (1.0, 0.9, 0.8, 0.7)):
        made = quantize_weight(weight, hessian, offsets, bits=bits, grid=Grid.EXACT, shrink=shrink)
        assert made.method == "gptq" and made.weight.scale.shape == (24, width // 32)
        errors[shrink] = objective(weight, made.weight.dequantize(), hessian)
    assert errors[(1.0, 0.9, 0.8, 0.7)] < errors[(1.0,)]
    nearest = [round_to_nearest(weight, offsets, bits=bits, grid=Grid.EXACT, shrink=s).weight.dequantize() for s in errors]
    assert (weight - nearest[1]).square().sum() < (weight - nearest[0]).square().sum()


def test_a_diagonal_hessian_is_round_to_nearest():
    """Independent inputs have nothing to compensate."""
    weight, _, _ = problem(145)
    offsets = offsets_of(145, 4)
    hessian = torch.diag(torch.rand(145, generator=torch.Generator().manual_seed(0)) + 0.1)
    gptq = quantize_weight(weight, hessian, offsets, bits=3, grid=Grid.EXACT)
    assert torch.equal(gptq.weight.codes, round_to_nearest(weight, offsets, bits=3, grid=Grid.EXACT).weight.codes)


@pytest.mark.parametrize("factor", (1e-8, 1e-3, 1e6, 1e20))
def test_the_scale_of_the_hessian_does_not_matter(factor):
    weight, _, hessian = problem(63)
    offsets = offsets_of(63, 3)
    one, other = (quantize_weight(weight, hessian * f, offsets, bits=4, grid=Grid.EXACT) for f in (1.0, factor))
    assert other.method == "gptq" and float((one.weight.codes == other.weight.codes).float().mean()) > 0.98


@pytest.mark.parametrize("width", (16, 129))
def test_the_factor_inverts_the_damped_hessian(width):
    _, _, hessian = problem(width)
    factor, reason = inverse_factor(hessian)
    assert reason is None and torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
    h = hessian.double() / float(hessian.diagonal().max())
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    product = factor.double().t() @ factor.double() @ h
    assert float((product - torch.eye(width)).norm() / width**0.5) < 1e-3


@pytest.mark.parametrize("grid", list(Grid), ids=str)
def test_dead_inputs_are_zeroed_and_disturb_nobody(grid):
    weight, x, _ = problem(40)
    dead = torch.tensor([0, 7, 39])
    x[:, dead] = 0
    hessian, offsets = x.t() @ x, torch.tensor([0, 8, 20, 40])
    found = quantize_weight(weight, hessian, offsets, bits=4, grid=grid)
    assert found.method == "gptq"
    back = found.weight.dequantize()
    assert torch.isfinite(back).all()
    step = torch.repeat_interleave(found.weight.scale.float(), offsets.diff(), dim=1)[:, dead]
    assert (back[:, dead].abs() <= (0 if grid is Grid.EXACT else 0.5) * step).all(), "zero, or its nearest code"
    other = weight.clone()
    other[:, dead] = other[:, dead].clamp(-0.1, 0.1)  # inside every cluster's range: only the dead columns change
    again = quantize_weight(other, hessian, offsets, bits=4, grid=grid).weight.codes
    alive = [i for i in range(40) if i not in dead.tolist()]
    assert float((again[:, alive] == found.weight.codes[:, alive]).float().mean()) > 0.5


def bad_hessians() -> dict[str, Tensor]:
    _, x, good = problem(20)
    nan, negative = good.clone(), -good
    nan[3, 4] = math.nan
    infinite = good.clone()
    infinite[0, 0] = math.inf
    indefinite = torch.full((20, 20), 100.0) - torch.diag(torch.linspace(90, 99, 20))
    phantom = good.clone()
    phantom[5, 5] = 0  # a dead input that is nevertheless correlated with the others
    return {
        "nan": nan,
        "infinite": infinite,
        "zero": torch.zeros(20, 20),
        "negative": negative,
        "indefinite": indefinite,
        "correlated dead input": phantom,
    }


@pytest.mark.parametrize("case", bad_hessians())
def test_a_hessian_that_cannot_be_factorised_falls_back_and_says_so(case):
    weight, _, _ = problem(20)
    offsets = offsets_of(20, 3)
    found = quantize_weight(weight, bad_hessians()[case], offsets, bits=4, grid=Grid.EXACT)
    assert torch.isfinite(found.weight.dequantize()).all()
    if found.method == "rtn":
        assert found.fallback and len(found.fallback) < 120
        expected = round_to_nearest(weight, offsets, bits=4, grid=Grid.EXACT).weight
        assert torch.equal(found.weight.codes, expected.codes)
    assert found.method == "rtn" or case == "correlated dead input"


@pytest.mark.parametrize("rank", (1, 3, 19))
@pytest.mark.parametrize("factor", (1.0, 1e-6, 1e12))
def test_few_calibration_tokens_give_a_singular_hessian_that_damping_cures(rank, factor):
    weight, x, _ = problem(200)
    x = x[:rank] * factor**0.5
    found = quantize_weight(weight, x.t() @ x, offsets_of(200, 3), bits=4, grid=Grid.EXACT)
    assert found.method == "gptq" and torch.isfinite(found.weight.dequantize()).all()
    rtn = round_to_nearest(weight, offsets_of(200, 3), bits=4, grid=Grid.EXACT)
    errors = [float((x @ (weight - r.weight.dequantize()).t()).double().square().sum()) for r in (found, rtn)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(("excess", "damping"), [(0.0, 0.01), (0.05, 0.1), (0.5, 1.0), (5.0, 10.0), (20.0, None)])
def test_damping_grows_tenfold_until_the_hessian_is_positive_definite(excess, damping):
    """[[1, 1 + e], [1 + e, 1]] has the eigenvalue -e: every damping up to it fails."""
    hessian = torch.tensor([[1.0, 1 + excess], [1 + excess, 1.0]]) * 3.0
    factor, reason = inverse_factor(hessian)
    if damping is None:
        assert factor is None and reason == "the Hessian is not positive definite even with 10 damping"
        return
    damped = hessian.double() / 3 + damping * torch.eye(2, dtype=torch.float64)
    assert reason is None
    assert torch.allclose((factor.t() @ factor).double() @ damped, torch.eye(2, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("size", (1e-30, 1e-12, 1e-7))
def test_a_weight_too_small_for_a_float16_scale_keeps_a_positive_one(size):
    weight = torch.tensor([[size, -size, 0.3, -0.2]])
    found = round_to_nearest(weight, torch.tensor([0, 2, 4]), bits=4, grid=Grid.EXACT).weight
    assert found.scale.dtype == torch.float16 and (found.scale > 0).all()
    back = found.dequantize()
    assert torch.isfinite(back).all() and ((back - weight).abs() <= 0.5 * found.scale[:, [0, 0, 1, 1]].float() + 1e-9).all()


def test_one_huge_input_does_not_break_the_factorisation():
    weight, x, _ = problem(64)
    x[:, 3] *= 1e4
    found = quantize_weight(weight, x.t() @ x, offsets_of(64, 3), bits=4, grid=Grid.EXACT)
    assert found.method == "gptq" and found.fallback is None


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_damaged_weight_is_refused(bad):
    weight, _, hessian = problem(20)
    weight[2, 3] = bad
    with pytest.raises(NumericError, match="1 NaN or infinite"):
        quantize_weight(weight, hessian, torch.tensor([0, 20]), bits=4, grid=Grid.EXACT)


@pytest.mark.parametrize("grid", list(Grid), ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_round_to_nearest_is_the_nearest_code(bits, grid):
    weight, _, _ = problem(63)
    offsets = torch.tensor([0, 1, 20, 63])
    found = round_to_nearest(weight, offsets, bits=bits, grid=grid).weight
    scale, zero = spread(found.scale, offsets), spread(found.zero_point, offsets)
    qmin, qmax = code_limits(bits)
    codes = torch.arange(qmin, qmax + 1).double()
    grid_values = scale[..., None] * (codes - zero[..., None])  # [N, K, 2**bits]
    best = (weight.double()[..., None] - grid_values).abs().amin(-1)
    assert torch.allclose((weight.double() - found.dequantize().double()).abs(), best, atol=1e-5)
    assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_groups_are_rows_times_clusters_with_zero_as_a_code(bits):
    weight = problem(50)[0] + 3.0  # far from zero: EXACT still includes it
    offsets = torch.tensor([0, 7, 8, 50])
    found = round_to_nearest(weight, offsets, bits=bits, grid=Grid.EXACT).weight
    assert found.scale.shape == found.zero_point.shape == (12, 3)
    assert found.scale.dtype == torch.float16 and found.zero_point.dtype == torch.int8
    assert int(found.zero_point.min()) >= code_limits(bits)[0] and int(found.zero_point.max()) <= code_limits(bits)[1]
    for c in range(3):
        part = weight[:, offsets[c] : offsets[c + 1]]
        expected = (part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)) / (2**bits - 1)
        assert torch.allclose(found.scale[:, c].float(), expected, rtol=1e-3)


def test_constant_and_zero_weights():
    for value in (0.0, 0.02, -3.0, 1e-6):
        weight = torch.full((3, 10), value)
        for grid in Grid:
            back = round_to_nearest(weight, torch.tensor([0, 4, 10]), bits=4, grid=grid).weight.dequantize()
            tolerance = {Grid.EXACT: max(1e-3 * abs(value), 1e-6), Grid.OFFICIAL: 1e-4}[grid]
            assert ((back - weight).abs() <= tolerance).all(), (value, grid)


def test_inputs_are_not_changed():
    weight, _, hessian = problem(40)
    hessian[3], hessian[:, 3] = 0, 0
    offsets = offsets_of(40, 3)
    kept = weight.clone(), hessian.clone(), offsets.clone()
    quantize_weight(weight, hessian, offsets, bits=4, grid=Grid.EXACT)
    assert all(torch.equal(a, b) for a, b in zip((weight, hessian, offsets), kept, strict=True))


def test_poisoned_memory_changes_nothing():
    """torch.empty filled with NaN: every value that is used was written first."""
    weight, _, hessian = problem(145)
    plain = quantize_weight(weight, hessian, offsets_of(145, 4), bits=4, grid=Grid.EXACT)
    with poisoned_memory():
        poisoned = quantize_weight(weight, hessian, offsets_of(145, 4), bits=4, grid=Grid.EXACT)
    assert torch.equal(plain.weight.codes, poisoned.weight.codes)

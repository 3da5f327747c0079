"""BitNet's quantisers: exact properties of the formulas, and statistics of Gaussian inputs."""

from __future__ import annotations

import math

import pytest
import torch

from core.quant.dynamic import (
    EPS,
    INPUT_KINDS,
    MODES,
    fp4_minmax,
    int4_absmean,
    int8_absmax,
    quantize_input,
    ternary_absmean,
    topk_int8,
    topk_mask,
)
from tests.core.tools import gaussian


def sqnr(x: torch.Tensor, coded: tuple[torch.Tensor, torch.Tensor]) -> float:
    codes, scale = coded
    return float(10 * torch.log10(x.square().sum() / (x - codes * scale).square().sum()))


def share(mask: torch.Tensor) -> float:
    return float(mask.float().mean()) * 100


# Exact ---------------------------------------------------------------------------------------------------------------


def test_worked_example_of_every_formula():
    x = torch.tensor([[1.0, -2.0, 0.5, 0.1]])
    codes, scale = int8_absmax(x)
    assert codes.tolist() == [[64.0, -127.0, 32.0, 6.0]]  # 63.5 goes to the even 64
    assert scale.item() == pytest.approx(2 / 127)
    codes, scale = int4_absmean(x)  # mean |x| = 0.9, √7 / 0.9 = 2.9397
    assert codes.tolist() == [[3.0, -6.0, 1.0, 0.0]]
    assert scale.item() == pytest.approx(0.9 / math.sqrt(7))
    codes, scale = fp4_minmax(x)  # u = 6, -12, 3, 0.6
    assert codes.tolist() == [[6.0, -12.0, 3.0, 1.0]]
    assert scale.item() == pytest.approx(2 / 12)
    codes, scale = fp4_minmax(x, fmt="e1m2")  # 3.5 goes to the even 4
    assert codes.tolist() == [[4.0, -7.0, 2.0, 0.0]]
    codes, scale = topk_int8(x)
    assert codes.tolist() == [[64.0, -127.0, 0.0, 0.0]]
    codes, scale = ternary_absmean(x)
    assert codes.tolist() == [[1, -1, 1, 0]] and codes.dtype == torch.int8
    assert scale.shape == () and scale.item() == pytest.approx(0.9)


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_integer_product_equals_the_product_of_dequantised_operands(kind):
    x, w = gaussian(16, 256), gaussian(64, 256, seed=1) * 0.02
    codes, scale = quantize_input(x, kind)
    ternary, alpha = ternary_absmean(w)
    integer = (codes.to(torch.int64) @ ternary.to(torch.int64).t()).to(torch.float64) * scale.double() * alpha.double()
    float_path = (codes * scale) @ (ternary * alpha).t()
    assert float((integer - float_path).abs().max() / integer.abs().max()) <= 1e-6  # 3.5e-7 measured


def test_fp4_takes_the_nearest_value_of_the_e2m1_grid():
    x = gaussian(64, 512).double().float()
    codes, scale = fp4_minmax(x)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    grid = torch.cat([-grid.flip(0), grid])
    value = x.double() * (6 / x.abs().amax(-1, keepdim=True).double())
    nearest = (value[..., None] - grid).abs().amin(-1)
    chosen = (value - codes.double() / 2).abs()
    assert float((chosen - nearest).abs().max()) < 1e-5


def test_codes_stay_in_their_ranges():
    x = gaussian(200, 384)
    x[::2] *= 50 * torch.rand(100, 1, generator=torch.Generator().manual_seed(3))
    codes, _ = int8_absmax(x)
    assert codes.abs().max() == 127 and bool((codes.abs().amax(-1) == 127).all())
    codes, _ = int4_absmean(x)
    assert codes.min() == -8 and codes.max() == 7
    codes, _ = fp4_minmax(x)
    assert set(codes.abs().unique().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0}
    codes, _ = fp4_minmax(x, fmt="e1m2")
    assert set(codes.abs().unique().tolist()) == set(map(float, range(8)))
    codes, _ = ternary_absmean(x)
    assert set(codes.unique().tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("power", [-6, 3])
def test_a_power_of_two_moves_to_the_scale(kind, power):
    x = gaussian(8, 96)
    codes, scale = quantize_input(x, kind)
    other, larger = quantize_input(x * 2.0**power, kind)
    assert torch.equal(codes, other) and torch.equal(scale * 2.0**power, larger)
    t, alpha = ternary_absmean(x)
    u, beta = ternary_absmean(x * 2.0**power)
    assert torch.equal(t, u) and torch.equal(alpha * 2.0**power, beta)


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_sign_symmetry(kind):
    x = gaussian(32, 128)
    codes, scale = quantize_input(x, kind)
    mirrored, same = quantize_input(-x, kind)
    assert torch.equal(scale, same)
    if "int4" in kind:  # -8 has no opposite
        assert bool((codes == -8).any()) or kind == "int4x2"
        assert torch.equal(codes.clamp(-7, 7), -mirrored.clamp(-7, 7))
    else:
        assert torch.equal(codes, -mirrored)


def test_int8_is_idempotent_and_the_absmean_quantisers_are_not():
    x = gaussian(16, 256)
    codes, scale = int8_absmax(x)
    again, _ = int8_absmax(codes * scale)
    assert torch.equal(codes, again)
    codes, scale = int4_absmean(x)
    _, smaller = int4_absmean(codes * scale)
    assert float(smaller.mean()) < 0.995 * float(scale.mean())  # what was clipped is missing from the mean
    t, alpha = ternary_absmean(x)
    _, shrunk = ternary_absmean(t * alpha)
    assert shrunk.item() == pytest.approx(alpha.item() * float((t != 0).float().mean()), rel=1e-6)


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.55, 1.0])
def test_topk_keeps_exactly_k_and_masks_before_or_after_alike(keep):
    x = gaussian(32, 130)
    x[0] = 1.0  # all equal: the first ones stay
    x[1] = 0.0
    mask = topk_mask(x, keep)
    count = int(130 * keep)
    assert bool((mask.sum(-1) == count).all())
    assert mask[0].nonzero().flatten().tolist() == list(range(count))
    assert bool((x.abs().masked_fill(mask, 0).amax(-1) <= x.abs().masked_fill(~mask, math.inf).amin(-1)).all())
    after, scale = topk_int8(x, keep=keep)
    before, same = int8_absmax(x * mask)
    assert torch.equal(after, before) and torch.equal(scale, same) and torch.equal(scale, int8_absmax(x)[1])


def test_at_least_one_value_is_kept():
    assert int(topk_mask(gaussian(3, 4), 0.01).sum()) == 3


def test_zero_rows_give_zero_codes_and_a_finite_scale():
    zero = torch.zeros(2, 8)
    for kind in INPUT_KINDS:
        codes, scale = quantize_input(zero, kind)
        assert not codes.any() and bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    codes, scale = ternary_absmean(zero)
    assert not codes.any() and scale.item() == pytest.approx(EPS)


def test_inputs_are_not_changed_and_lower_precision_is_computed_in_float32():
    x = gaussian(4, 64).to(torch.bfloat16)
    copy = x.clone()
    for kind in INPUT_KINDS:
        codes, scale = quantize_input(x, kind)
        assert codes.dtype == scale.dtype == torch.float32
        exact, same = quantize_input(x.float(), kind)
        assert torch.equal(codes, exact) and torch.equal(scale, same)
    assert torch.equal(x, copy)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="int4x3"):
        quantize_input(gaussian(1, 4), "int4x3")
    with pytest.raises(ValueError, match="e3m0"):
        fp4_minmax(gaussian(1, 4), fmt="e3m0")


def test_every_mode_names_known_quantisers_for_the_same_four_inputs():
    for name, kinds in MODES.items():
        assert set(kinds) == {"attn_in", "o_in", "mlp_in", "down_in"}
        assert set(kinds.values()) <= {*INPUT_KINDS, "fp"}
        assert (name == "fp") == ("fp" in kinds.values())


# Statistics of N(0, 1) -----------------------------------------------------------------------------------------------


def test_int4_on_gaussian_input():
    x = gaussian(400, 1536)
    codes, scale = int4_absmean(x)
    assert scale.mean().item() == pytest.approx(0.3016, abs=0.0005)
    assert share(codes == 0) == pytest.approx(12.0, abs=0.5)
    assert share((codes == 7) | (codes == -8)) == pytest.approx(3.7, abs=0.2)
    assert share(x / scale > 7.5) == pytest.approx(1.19, abs=0.1)
    assert share(x / scale < -8.5) == pytest.approx(0.52, abs=0.06)
    assert sqnr(x, (codes, scale)) == pytest.approx(18.82, abs=0.1)
    wide = int4_absmean(x, factor=2.0)
    assert share(wide[0] == 0) == pytest.approx(23.7, abs=0.5) and sqnr(x, wide) == pytest.approx(15.18, abs=0.1)


@pytest.mark.parametrize(
    ("width", "a8", "a8_db", "fp4", "fp4_db", "uniform", "uniform_db"),
    [(1536, 1.11, 41.9, 11.7, 18.7, 20.0, 16.7), (4096, 1.20, 41.2, 12.6, 18.5, 21.5, 16.0)],
)
def test_absmax_quantisers_on_gaussian_input(width, a8, a8_db, fp4, fp4_db, uniform, uniform_db):
    x = gaussian(300, width)
    coded = int8_absmax(x)
    assert share(coded[0] == 0) == pytest.approx(a8, abs=0.05) and sqnr(x, coded) == pytest.approx(a8_db, abs=0.15)
    coded = fp4_minmax(x)
    assert share(coded[0] == 0) == pytest.approx(fp4, abs=0.3) and sqnr(x, coded) == pytest.approx(fp4_db, abs=0.15)
    coded = fp4_minmax(x, fmt="e1m2")
    assert share(coded[0] == 0) == pytest.approx(uniform, abs=0.4) and sqnr(x, coded) == pytest.approx(uniform_db, abs=0.15)


def test_ternary_weights_of_three_distributions():
    w = gaussian(1024, 1024)
    t, alpha = ternary_absmean(w)
    assert share(t == 0) == pytest.approx(31.0, abs=0.2)
    assert float((w - t * alpha).square().sum() / w.square().sum()) == pytest.approx(0.263, abs=0.002)
    assert float((w * t).sum() / (w.norm() * t.float().norm())) == pytest.approx(0.887, abs=0.002)
    assert float((w * t).sum() / t.float().square().sum()) == pytest.approx(1.068, abs=0.003)  # best scale, in σ
    uniform = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(1)) - 0.5
    assert share(ternary_absmean(uniform)[0] == 0) == pytest.approx(25.0, abs=0.2)
    laplace = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(1024, 1024, generator=torch.Generator().manual_seed(2)).clamp(1e-6, 1 - 1e-6)
    )
    assert share(ternary_absmean(laplace)[0] == 0) == pytest.approx(39.3, abs=0.3)


@pytest.mark.parametrize(("width", "zeros"), [(1024, 64.3), (6912, 66.8)])
def test_squared_relu_gate_of_independent_gaussians(width, zeros):
    gate, up = gaussian(200, width).relu().square(), gaussian(200, width, seed=1)
    assert share(gate == 0) == pytest.approx(50.0, abs=0.5)
    assert share(int8_absmax(gate * up)[0] == 0) == pytest.approx(zeros, abs=0.6)

"""The affine formula against worked examples: ties to even, clamping, and the anchors of the published quantiser."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import code_limits, code_offset, dequantize, dequantize_rows, fake_quantize, quantize, quantize_rows
from kernels.codes import signed_codes

ONE, NONE = torch.tensor(1.0), torch.tensor(0.0)


def official(low: float, high: float, bits: int) -> tuple[float, float]:
    """Scale and zero point of the published grid, in Python floats."""
    scale = min(max((high - low) * 2.0**-bits, 1e-4), 1e4)
    return scale, float(round(min(max(-0.5 * (high + low) / scale, -1e4), 1e4)))


def test_ties_go_to_even():
    x = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(x, ONE, NONE, -8, 7).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]
    assert fake_quantize(x, ONE, torch.tensor(-8.0), torch.tensor(7.0)).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


def test_rounding_comes_before_the_zero_point():
    x = torch.tensor([0.5, 1.5, -0.5])  # round(x) + 1, not round(x + 1)
    assert quantize(x, ONE, torch.tensor(1.0), -8, 7).tolist() == [1, 3, 1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_values_beyond_the_grid_are_clamped(bits):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = torch.tensor([-1e30, float("-inf"), 1e30, float("inf"), 1e4, -1e4])
    assert quantize(x, ONE, NONE, qmin, qmax).tolist() == [qmin, qmin, qmax, qmax, qmax, qmin]
    shifted = quantize(x, ONE, torch.tensor(5.0), qmin, qmax)
    assert int(shifted.min()) == qmin and int(shifted.max()) == qmax


@pytest.mark.parametrize(
    "limits, dtype",
    [
        ((-8, 7), torch.int8),
        ((-128, 127), torch.int8),
        ((0, 15), torch.int8),
        ((0, 255), torch.uint8),
        ((-128, 128), torch.int16),
        ((-300, 300), torch.int16),
    ],
    ids=lambda v: str(v).replace("torch.", ""),
)
def test_the_smallest_type_that_holds_the_code(limits, dtype):
    codes = quantize(torch.tensor([-1e9, 1e9]), ONE, NONE, *limits)
    assert codes.dtype == dtype and codes.tolist() == list(limits)


@pytest.mark.parametrize(
    "low, high, bits, scale, zero",
    [
        (80.0, 100.0, 4, 1.25, -72),
        (-100.0, -50.0, 4, 3.125, 24),
        (-1.0, 1.0, 4, 0.125, 0),
        (0.0, 16.0, 4, 1.0, -8),
        (0.0, 3.0, 8, 3 / 256, -128),
        (0.0, 3.0, 3, 3 / 8, -4),
    ],
)
def test_anchors_of_the_published_grid(low, high, bits, scale, zero):
    assert official(low, high, bits) == (pytest.approx(scale, rel=1e-12), zero)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ends = torch.tensor([low, high])
    codes = quantize(ends, torch.tensor(scale), torch.tensor(float(zero)), qmin, qmax)
    assert codes.tolist() == [qmin, qmax], "the range spans the codes, its upper end one step outside the grid"
    back = dequantize(codes, torch.tensor(scale), torch.tensor(float(zero)))
    assert abs(float(back[0]) - low) <= scale / 2 and abs(float(back[1]) - high) <= 1.5 * scale


def test_softmax_grid_is_a_quantiser_too():
    """P: round(255 p) / 255 is the affine code with scale 1/255 and zero point 0."""
    p = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fake_quantize(p, torch.tensor(1 / 255), NONE, torch.tensor(255.0)), torch.round(p / (1 / 255)) * (1 / 255))


@settings(max_examples=200, deadline=None)
@given(bits=st.integers(2, 8), zero=st.integers(-(2**20), 2**20), exponent=st.integers(-12, 12), seed=st.integers(0, 2**31))
def test_fake_is_quantise_then_dequantise(bits, zero, exponent, seed):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = torch.rand((), generator=torch.Generator().manual_seed(seed)) * 2.0**exponent + 1e-6
    spread = torch.randn(200, generator=torch.Generator().manual_seed(seed + 1)) * 2**bits
    x = (spread - zero) * scale
    z = torch.tensor(float(zero))
    codes = quantize(x, scale, z, qmin, qmax)
    fake = fake_quantize(x, scale, qmin - z, qmax - z)
    assert torch.equal(fake, dequantize(codes, scale, z))
    assert torch.equal(fake_quantize(fake, scale, qmin - z, qmax - z), fake), "idempotent"
    inside = (codes > qmin) & (codes < qmax)
    assert ((fake - x).abs()[inside] <= scale * 0.5 + x.abs()[inside] * 2e-7).all()


def test_per_channel_parameters_broadcast():
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    scale, zero = torch.tensor([0.1, 0.2, 0.5, 1.0]), torch.tensor([0.0, 3.0, -2.0, 1.0])
    codes = quantize(x, scale, zero, -8, 7)
    for c in range(4):
        assert torch.equal(codes[..., c], quantize(x[..., c], scale[c], zero[c], -8, 7))


def test_inputs_are_not_changed():
    x, scale, zero = torch.randn(4, 6), torch.full((6,), 0.3), torch.full((6,), 2.0)
    kept = [t.clone() for t in (x, scale, zero)]
    codes = quantize(x, scale, zero, -8, 7)
    kept_codes = codes.clone()
    dequantize(codes, scale, zero)
    fake_quantize(x, scale, -8 - zero, 7 - zero)
    assert all(torch.equal(a, b) for a, b in zip((x, scale, zero, codes), (*kept, kept_codes), strict=True))


def test_double_input_stays_double():
    x: Tensor = torch.randn(8, dtype=torch.float64)
    assert fake_quantize(x, torch.tensor(0.1), torch.tensor(-8.0), torch.tensor(7.0)).dtype == torch.float64


# signed and unsigned codes


@pytest.mark.parametrize("bits, offset", [(1, 1), (2, 2), (3, 4), (4, 8), (7, 64), (8, 128)])
def test_the_offset_turns_the_signed_grid_into_0_and_up(bits, offset):
    assert code_offset(bits) == offset and code_limits(bits) == (-offset, offset - 1)
    stored = torch.arange(2**bits, dtype=torch.uint8)
    signed = signed_codes(stored, bits)
    assert signed.dtype == torch.int8 and signed.tolist() == list(range(-offset, offset))
    scale, zero = torch.tensor(0.25), torch.tensor(3.0)
    assert torch.equal(dequantize(signed, scale, zero), dequantize(stored, scale, zero + offset)), "one grid, two numberings"


# one scale per row


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_are_coded_by_the_formula(bits):
    largest = 2 ** (bits - 1) - 1
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(bits))
    codes, scale = quantize_rows(x, bits)
    expected = (x.abs().amax(1, keepdim=True) / largest).half()
    assert torch.equal(scale, expected) and scale.dtype == torch.float16 and codes.dtype == torch.uint8
    rounded = [[min(max(round(v / s), -largest), largest) + largest + 1 for v in row]
               for row, s in zip(x.double().tolist(), expected.double().flatten().tolist(), strict=True)]  # fmt: skip
    assert codes.tolist() == rounded
    assert ((dequantize_rows(codes, scale, bits) - x).abs() <= 0.51 * scale.float()).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", (0.0, 1e-30, 1e-9))
def test_a_scale_too_small_for_float16_does_not_become_zero(bits, size):
    codes, scale = quantize_rows(torch.tensor([[size, -size, 0.0]]), bits)
    assert float(scale) == torch.finfo(torch.float16).smallest_normal
    assert codes.tolist() == [[code_offset(bits)] * 3] and dequantize_rows(codes, scale, bits).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", (1e9, 3e38))
def test_codes_of_rows_beyond_float16_stay_within_their_bits(bits, size):
    codes, scale = quantize_rows(torch.tensor([[size, -size, size / 1e6, 0.0]]), bits)
    assert float(scale) == torch.finfo(torch.float16).max
    assert codes[0, :2].tolist() == [2**bits - 1, 1] and int(codes[0, 3]) == code_offset(bits)
    assert torch.isfinite(dequantize_rows(codes, scale, bits)).all()

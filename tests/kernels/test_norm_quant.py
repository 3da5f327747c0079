"""Norm, reorder and quantise in one kernel against the steps one by one."""

from __future__ import annotations

import pytest
import torch

from core.models.norm import ReorderNorm
from core.quant.dynamic import quantize_input
from kernels import Backend
from kernels.norm_quant import KINDS, Norm, norm_quantize, norm_quantize_dynamic, normalized

pytestmark = pytest.mark.gpu


def setup(rows=4, width=77, *, kind="layer", dtype=torch.float32, order=True, affine=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, r = ((torch.randn(rows, width, generator=g) * 2).to(dtype) for _ in range(2))
    weight, bias = torch.rand(width, generator=g) + 0.5, torch.randn(width, generator=g)
    norm = Norm(kind, 1e-5, weight if affine else None, bias if affine and kind == "layer" else None,
                torch.randperm(width, generator=g).to(torch.int32) if order else None)  # fmt: skip
    scale = torch.rand(width, generator=g) * 0.05 + 0.01
    return x, r, norm, scale, torch.randint(-20, 20, (width,), generator=g)


def to(norm, device):
    return Norm(norm.kind, norm.eps, *(None if t is None else t.to(device) for t in (norm.weight, norm.bias, norm.order)))


def assert_codes_agree(got, expected, exact, step):
    """Equal but where the quotient is within float32's error of a half (`exact` in float64, in units of codes)."""
    near_tie = ((exact - exact.floor()) - 0.5).abs() < step
    differ = got != expected
    assert not (differ & ~near_tie).any() and (got.int() - expected.int()).abs().max() <= 1


def test_the_reference_is_the_norm_of_the_decoder_block():
    for kind in ("layer", "rms"):
        x, _, norm, *_ = setup(kind=kind)
        back = torch.empty_like(norm.order, dtype=torch.int64).scatter_(0, norm.order.long(), torch.arange(77))
        module = ReorderNorm(kind, norm.weight[back], None if norm.bias is None else norm.bias[back], 1e-5)
        assert torch.allclose(normalized(x, norm), module.reordered(norm.order.long())(x), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_static_scales(kind, add, bits, device):
    x, r, norm, scale, zero = setup(kind=kind)
    if bits == 4:
        scale, zero = scale * 16, zero // 6
    residual = r if add else None
    hidden, got = norm_quantize(
        x.to(device), to(norm, device), scale.to(device), zero.to(device), bits=bits,
        residual=None if residual is None else r.to(device), backend=Backend.TRITON,
    )  # fmt: skip
    whole, expected = norm_quantize(x, norm, scale, zero, bits=bits, residual=residual, backend=Backend.REFERENCE)
    assert torch.equal(hidden.cpu(), whole) and got.scale is None
    assert expected.codes.int().abs().max() <= 2 ** (bits - 1)
    exact = normalized(whole.double(), norm).double() / scale
    assert_codes_agree(got.codes.cpu(), expected.codes, exact, 1e-3)


@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_per_token(kind, add, device):
    x, r, norm, *_ = setup(kind="rms", width=130, seed=3)
    x[0], r[0] = 0.0, 0.0
    residual = r if add else None
    hidden, got = norm_quantize_dynamic(
        x.to(device), to(norm, device), kind, residual=None if residual is None else r.to(device), backend=Backend.TRITON
    )
    whole, expected = norm_quantize_dynamic(x, norm, kind, residual=residual, backend=Backend.REFERENCE)
    y = normalized(whole, norm)
    codes, scale = quantize_input(y, kind)
    assert torch.equal(expected.codes.float(), codes) and torch.equal(expected.scale, scale)
    assert torch.allclose(got.scale.cpu(), scale, rtol=1e-6)
    assert_codes_agree(got.codes.cpu(), expected.codes, y.double() / scale, 1e-3)
    assert torch.equal(got.code_sum.cpu(), got.codes.cpu().sum(1, dtype=torch.int32))
    assert not got.codes[0].any() and torch.equal(hidden.cpu(), whole)


def test_bfloat16_strides_and_no_affine_part(device):
    x, _, norm, scale, zero = setup(rows=90, width=6, kind="layer", order=False, affine=False, dtype=torch.bfloat16)
    _, got = norm_quantize(
        x.to(device).T, norm, *(t[:1].expand(90).to(device) for t in (scale, zero)), bits=8, backend=Backend.TRITON
    )
    _, expected = norm_quantize(x.T, norm, scale[:1].expand(90), zero[:1].expand(90), bits=8)
    assert_codes_agree(got.codes.cpu(), expected.codes, normalized(x.T, norm).double() / scale[0], 1e-3)


def test_what_is_refused():
    x, r, norm, scale, zero = setup()
    for call, words in (
        (lambda: norm_quantize(x, Norm("batch", 1e-5), scale, zero, bits=8), "'batch' is unknown"),
        (lambda: norm_quantize(x, norm, scale, zero, bits=9), "9 bits"),
        (lambda: norm_quantize_dynamic(x, norm, "fp4"), "'fp4' is unknown"),
        (lambda: norm_quantize_dynamic(x, norm, "int8", residual=r[:1]), "does not fit"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

"""The packed layer where a scale covers many columns, and for the few rows of decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.quant.affine import Grid, QParams
from core.quant.gptq import round_to_nearest
from core.quant.linear.quant import QuantizedWeight, QuantLinear
from core.quant.static import ActivationQuantizer, InputUse
from kernels import Backend, Choice
from tests.core.quant.linear.linear_tools import BACKENDS, error, exact, example


def power_of_two_layer(bits: int, weight_bits: int = 4) -> tuple[QuantLinear, Tensor]:
    """Three input clusters whose scales differ by powers of two, one weight scale per row."""
    g = torch.Generator().manual_seed(bits)
    offsets, spare = torch.tensor([0, 10, 30, 45]), 8 - bits
    x = torch.randn(9, 45, generator=g)
    params = QParams(0.3 * 2.0 ** -torch.tensor([0.0, spare, spare // 2]), torch.tensor([1.0, -2.0, 0.0]))
    weight = round_to_nearest(torch.randn(11, 45, generator=g), torch.tensor([0, 45]), bits=weight_bits, grid=Grid.EXACT).weight
    return QuantLinear.from_weight(weight, torch.randn(11, generator=g), ActivationQuantizer(bits, params, offsets)), x


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("bits", (2, 4, 6))
def test_power_of_two_scales_need_one_accumulator(bits, backend):
    layer, x = power_of_two_layer(bits)
    layer.set_backend(backend)
    assert error(layer(x), exact(layer, x)) < 3e-6
    if backend is Backend.INT8:
        assert layer.copies.get("product", pytest.fail).offsets == (0, 45)
        found = layer(x[None], InputUse(2))[0]
        assert torch.equal(found[2:], layer(x)[2:])
        assert error(found[:2], x[:2].double() @ layer.dequantized_weight().double().t() + layer.bias.double()) < 1e-6


@pytest.mark.parametrize("scales", ([1.0, 0.3], [1.0, 2.0**-5]), ids=("not a power", "too far"))
def test_other_scales_do_not_share_a_step(scales):
    q = ActivationQuantizer(4, QParams(torch.tensor(scales), torch.zeros(2)), torch.tensor([0, 5, 45]))
    assert q.common_step() is None
    weight = round_to_nearest(torch.randn(11, 45), torch.tensor([0, 45]), bits=4, grid=Grid.EXACT).weight
    layer, x = QuantLinear.from_weight(weight, None, q), torch.randn(7, 45)
    assert layer.choice.backend is Backend.REFERENCE and "rounded in float" in layer.choice.reason
    assert error(layer(x), exact(layer, x)) < 3e-6


@pytest.mark.parametrize("weight_bits", (4, 7))
def test_float_tokens_read_the_integer_weights(weight_bits):
    """Zero points inside the codes (4 bits) or beside them (7): a float row comes out as in float64."""
    layer, x = example(weight_bits=weight_bits)
    layer.set_backend(Backend.INT8)
    x[0] *= 1000
    found = layer(x[None], InputUse(1))[0]
    assert (layer.copies.get("product", pytest.fail).zero_rows is None) == (weight_bits == 4)
    assert error(found[0], x[0].double() @ layer.dequantized_weight().double().t() + layer.bias.double()) < 1e-6
    assert torch.equal(found[1:], layer(x)[1:])


# decoding with 4-bit products


@pytest.mark.parametrize("weight_bits", (2, 3, 4))
@pytest.mark.parametrize("clusters", [(0, 96), (0, 32, 96), (0, 128, 256)], ids=str)
def test_few_rows_of_float_input_use_4_bit_products(clusters, weight_bits):
    layer, x = example(clusters[-1], 48, weight_bits=weight_bits, input_bits=None, clusters=clusters)
    if layer.choice.backend is not Backend.INT4:
        pytest.skip(layer.choice.reason)
    expected = exact(layer, x)
    assert error(layer(x), expected) < 1e-6, "more rows stay in float32"
    few = layer(x[:3].view(1, 3, -1))[0]
    assert 1e-6 < error(few, expected[:3]) < 8e-3  # bfloat16: 2**-9 of each rounded number
    assert layer.working_bytes > 48 * clusters[-1] * 4
    few_bytes = layer.copies.nbytes(layer, "few rows")
    assert layer.decode_bytes == few_bytes < 48 * clusters[-1], "one token does not read the float copy of more rows"
    layer.release()
    assert layer.working_bytes == 0
    layer(x)
    assert layer.decode_bytes == layer.stored_bytes, "nor before its own copy exists"


@pytest.mark.parametrize("input_bits", [8, None], ids=["codes", "floats"])
def test_kernels_read_the_packed_weight(input_bits, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("core.quant.linear.quant.select_linear_backend", lambda *_, **__: Choice(Backend.TRITON, "test"))
    layer, x = example(128, 16, weight_bits=4, input_bits=input_bits, clusters=(0, 64, 128))
    assert layer.decode_bytes == layer.stored_bytes, "before the first product"
    layer(x)
    assert layer.takes_codes == (input_bits is not None)
    # scales in the epilogue's type and a bias of its own, or as they are stored
    scales = 2 * 16 * 4 * 2 + 16 * 4 if layer.takes_codes else 2 * 16 * (2 + 1)
    assert layer.decode_bytes == 16 * 64 + scales


def test_one_scale_per_row_stays_exact_in_4_bit_products():
    """Inputs that are exact in bfloat16, and sums that are too: nothing is rounded."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 32), generator=g).to(torch.uint8)
    weight = QuantizedWeight(
        codes, torch.rand(16, 1, generator=g), torch.full((16, 1), -3, dtype=torch.int8), torch.tensor([0, 32]), 4
    )
    layer = QuantLinear.from_weight(weight, None, None)
    if layer.choice.backend is not Backend.INT4:
        pytest.skip(layer.choice.reason)
    x = torch.zeros(4, 32)
    x[torch.arange(4), torch.arange(4) * 5] = torch.tensor([1.0, -2.0, 0.5, 4.0])
    assert error(layer(x), exact(layer, x)) < 1e-7

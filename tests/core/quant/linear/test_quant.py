"""The packed layer: what it stores, what it refuses, what it computes on every backend, and what it lets go."""

from __future__ import annotations

import pytest
import torch

from core.errors import BackendError
from core.quant.affine import Grid, QParams, choose_qparams
from core.quant.gptq import round_to_nearest
from core.quant.linear.quant import QuantizedWeight, QuantLinear
from core.quant.static import ActivationQuantizer, InputUse
from kernels import Backend, code_limits
from tests.core.quant.linear.linear_tools import BACKENDS, error, exact, example, quantizer_of


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("grid", list(Grid), ids=str)
@pytest.mark.parametrize("input_bits", (2, 4, 8))
@pytest.mark.parametrize("weight_bits", (2, 3, 4, 7))
def test_output_against_float64(backend, grid, weight_bits, input_bits):
    layer, x = example(weight_bits=weight_bits, input_bits=input_bits, grid=grid)
    layer.set_backend(backend)
    assert error(layer(x), exact(layer, x)) < 3e-6  # measured: at most 4e-7


@pytest.mark.parametrize("clusters", [(0, 45), (0, 44, 45), tuple(range(46))], ids=("one", "a single column", "per column"))
@pytest.mark.parametrize("rows", (1, 2, 17))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_backends_agree(clusters, rows, bias):
    layer, x = example(clusters=clusters, rows=rows, bias=bias)
    found = {}
    for backend in BACKENDS:
        layer.set_backend(backend)
        found[backend] = layer(x)
    # A single row makes every column a constant, coded as -128 with zero point -129: the folded bias cancels 128-fold (1.5e-5).
    assert error(found[Backend.INT8], found[Backend.REFERENCE].double()) < (5e-5 if rows == 1 else 3e-6)


@pytest.mark.parametrize("input_bits", (None, 4), ids=("float input", "4-bit input"))
def test_a_float_weight_is_used_as_it_is(input_bits):
    layer, x = example(weight_bits=16, input_bits=input_bits)
    assert layer.choice.backend is Backend.REFERENCE and error(layer(x), exact(layer, x)) < 1e-6
    assert "stay in float" in layer.choice.reason
    if input_bits:
        assert "weights" in layer.choice.reason
    assert layer.effective_bits == 32.0


def test_a_float_input_needs_the_reference():
    layer, x = example(input_bits=None)
    assert layer.choice.backend is Backend.REFERENCE and error(layer(x), exact(layer, x)) < 1e-6


@pytest.mark.parametrize("options", ({"input_bits": None}, {"weight_bits": 16}), ids=("float input", "float weight"))
def test_int8_by_name_raises_where_it_cannot_run(options):
    layer, x = example(**options)
    with pytest.raises(BackendError, match="use reference") as caught:
        layer.set_backend(Backend.INT8)
    assert caught.value.code == "E-BACKEND"
    assert torch.isfinite(layer(x)).all(), "the layer still works"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", (1, 7, 45, 64))
def test_storage_is_counted_to_the_byte(bits, width):
    clusters = (0, width) if width < 4 else (0, 3, width)
    layer, _ = example(width, 6, weight_bits=bits, input_bits=None, clusters=clusters)
    planes = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    groups = len(clusters) - 1
    packed, scales, zeros = 6 * sum((width * p + 7) // 8 for p in planes), 6 * groups * 2, 6 * groups
    assert layer.packed.numel() == packed and layer.packed.dtype == torch.uint8
    assert layer.weight_scale.dtype == torch.float16 and layer.weight_zero.dtype == torch.int8
    assert layer.effective_bits == pytest.approx(8 * (packed + scales + zeros) / (6 * width))
    saved = {name: t.numel() * t.element_size() for name, t in layer.state_dict().items()}
    assert saved == {"packed": packed, "weight_scale": scales, "weight_zero": zeros, "offsets": 4 * (groups + 1), "bias": 24}


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_working_copy_is_counted_apart_and_released(backend):
    layer, x = example()
    layer.set_backend(backend)
    before = set(layer.state_dict())
    assert layer.working_bytes == 0 and layer.decode_bytes == layer.stored_bytes
    first = layer(x)
    scales_and_bias = 3 * 11 * 4 + 11 * 4
    assert layer.working_bytes == (11 * 45 * 4 if backend is Backend.REFERENCE else 11 * 45 + scales_and_bias)
    assert layer.decode_bytes == layer.working_bytes, "instead of the packed weight"
    assert set(layer.state_dict()) == before and not list(layer.parameters())
    layer.release()
    assert layer.working_bytes == 0 and torch.equal(layer(x), first)
    layer.set_backend(backend)
    assert layer.working_bytes == 0


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_first_tokens_keep_a_float_input(backend):
    layer, x = example(rows=12)
    layer.set_backend(backend)
    x = x.view(3, 4, 45)
    found, plain = layer(x, InputUse(2)), layer(x)
    weight = layer.dequantized_weight().double()
    expected = x.double() @ weight.t() + layer.bias.double()
    assert error(found[:, :2], expected[:, :2]) < 1e-6 < error(plain[:, :2], expected[:, :2])
    assert torch.equal(found[:, 2:], plain[:, 2:])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_strided_inputs_of_any_rank(backend):
    layer, x = example(rows=12)
    layer.set_backend(backend)
    expected = layer(x)
    columns = x.t().contiguous().t()
    stacked = x.view(3, 4, 45).transpose(0, 1)
    wide = torch.stack([x, x], dim=2)[:, :, 0]
    assert error(layer(columns), expected.double()) < 1e-6 and error(layer(wide), expected.double()) < 1e-6
    assert error(layer(stacked).transpose(0, 1).reshape(12, -1), expected.double()) < 1e-6
    assert error(layer(x[:1].t().contiguous().t()), expected[:1].double()) < 1e-6
    assert layer(x[0]).shape == (11,) and layer(x[:0]).shape == (0, 11)


def test_inputs_and_weights_are_not_changed():
    layer, x = example()
    kept, state = x.clone(), {k: v.clone() for k, v in layer.state_dict().items()}
    for backend in BACKENDS:
        layer.set_backend(backend)
        layer(x, InputUse(3))
    assert torch.equal(x, kept) and all(torch.equal(v, layer.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize(
    "change",
    [
        {"packed": torch.zeros(11, 24, dtype=torch.uint8)},
        {"weight_scale": torch.ones(11, 2)},
        {"weight_zero": torch.ones(10, 3)},
        {"offsets": torch.tensor([0, 20, 45])},
        {"offsets": torch.tensor([0, 20, 20, 45])},
        {"offsets": torch.tensor([0, 30, 20, 45])},
        {"offsets": torch.tensor([1, 2, 20, 45])},
        {"offsets": torch.tensor([0, 1, 20, 44])},
    ],
    ids=("packed", "scale", "zero", "fewer clusters", "empty cluster", "falling offsets", "first offset", "last offset"),
)
def test_tensors_that_do_not_fit_are_refused(change):
    layer, _ = example()
    tensors = {k: v for k, v in layer.state_dict().items() if k in ("packed", "weight_scale", "weight_zero", "offsets")}
    QuantLinear(tensors, bits=4, in_features=45, bias=None, quantizer=None)
    with pytest.raises(ValueError, match="fit|cover"):
        QuantLinear(tensors | change, bits=4, in_features=45, bias=None, quantizer=None)


@pytest.mark.parametrize("width", (44, 46))
def test_a_quantiser_of_another_width_is_refused(width):
    layer, _ = example()
    tensors = {k: v for k, v in layer.state_dict().items() if k in ("packed", "weight_scale", "weight_zero", "offsets")}
    q = ActivationQuantizer(8, QParams(torch.ones(1), torch.zeros(1)), torch.tensor([0, width]))
    with pytest.raises(ValueError):
        QuantLinear(tensors, bits=4, in_features=45, bias=None, quantizer=q)


def test_the_integer_path_needs_equal_clusters_on_both_sides():
    """It multiplies the scales of cluster c of the input and of the weight: other boundaries are multiplied in float."""
    layer, x = example()
    tensors = {k: v for k, v in layer.state_dict().items() if k in ("packed", "weight_scale", "weight_zero", "offsets")}
    q = ActivationQuantizer(8, QParams(torch.ones(3), torch.zeros(3)), torch.tensor([0, 2, 20, 45]))
    apart = QuantLinear(tensors, bits=4, in_features=45, bias=None, quantizer=q)
    assert apart.choice.backend is Backend.REFERENCE and "groups are not the clusters" in apart.choice.reason
    assert error(apart(x), exact(apart, x)) < 3e-6
    with pytest.raises(BackendError, match="keeps 16"):
        apart.set_backend(Backend.INT8)
    q = ActivationQuantizer(8, QParams(torch.ones(3), torch.zeros(3)), torch.tensor([0, 2, 20, 44]))
    with pytest.raises(ValueError, match="44 channels"):
        QuantLinear(tensors, bits=4, in_features=45, bias=None, quantizer=q)


@pytest.mark.parametrize("offsets", ([0, 3, 3, 5], [1, 3, 5], [0, 3, 4, 5], [0, 4, 3, 5]), ids=str)
def test_activation_clusters_that_do_not_fit_are_refused(offsets):
    params = QParams(torch.ones(2), torch.zeros(2))
    ActivationQuantizer(4, params, torch.tensor([0, 3, 5]))
    with pytest.raises(ValueError, match="offsets"):
        ActivationQuantizer(4, params, torch.tensor(offsets))


def test_dequantised_weight_is_the_documented_formula():
    layer, _ = example(weight_bits=3, grid=Grid.OFFICIAL)
    weight = QuantizedWeight(
        torch.randint(0, 8, (4, 5)).to(torch.uint8), torch.rand(4, 2), torch.tensor([[300, -2]] * 4), torch.tensor([0, 2, 5]), 3
    )
    run = [0, 0, 1, 1, 1]
    expected = weight.scale[:, run] * (weight.codes.float() - 4 - weight.zero_point[:, run])
    assert torch.allclose(weight.dequantize(), expected, rtol=1e-6)
    packed = QuantLinear.from_weight(weight, None, None)
    assert torch.equal(packed.dequantized_weight(), weight.dequantize()) and layer.dequantized_weight().shape == (11, 45)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_fakes_of_a_quantiser_agree(bits):
    x = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(bits)) * 5
    q = quantizer_of(x, torch.tensor([0, 1, 4, 10]), bits)
    codes = q.codes(x)
    run = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    assert codes.dtype == torch.int8 and code_limits(bits)[0] <= int(codes.min()) <= int(codes.max()) <= code_limits(bits)[1]
    assert torch.equal(q.fake(x), q.scale[run] * (codes.float() - q.zero_point.float()[run]))
    heads = x.view(4, 6, 2, 5).transpose(1, 2)  # [B, H, T, E]
    assert torch.equal(q.fake_heads(heads).transpose(1, 2).reshape(x.shape), q.fake(x))
    use = InputUse(1)
    assert torch.equal(q.fake_heads(heads, use).transpose(1, 2).reshape(x.shape), q.fake(x, use))
    assert torch.equal(q.fake(x, use)[:, 0], x[:, 0]) and torch.equal(q.fake(x, use)[:, 1:], q.fake(x)[:, 1:])
    assert q.width == 10 and set(q.state_dict()) == {"scale", "zero_point", "offsets"}


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.INT8])
@pytest.mark.parametrize("float_tokens", [0, 2])
def test_parts_are_the_columns_of_the_whole_and_only_an_owned_input_is_overwritten(backend, float_tokens):
    g = torch.Generator().manual_seed(3)
    offsets, bound = torch.tensor([0, 40, 64]), torch.tensor([2.0, 4.0])
    quantizer = ActivationQuantizer(8, choose_qparams(-bound, bound, bits=8, grid=Grid.EXACT), offsets)
    weight = round_to_nearest(torch.randn(30, 64, generator=g), offsets, bits=4, grid=Grid.EXACT).weight
    layer = QuantLinear.from_weight(weight, torch.randn(30, generator=g), quantizer)
    layer.set_backend(backend)
    x = torch.randn(2, 5, 64, generator=g) * 3
    kept, whole = x.clone(), layer(x, InputUse(float_tokens))
    parts = list(layer.parts(x, (7, 23), InputUse(float_tokens)))
    assert [p.shape[-1] for p in parts] == [7, 23] and all(p.is_contiguous() for p in parts)
    assert torch.allclose(torch.cat(parts, dim=-1), whole, rtol=1e-5, atol=1e-5) and torch.equal(x, kept)
    assert torch.equal(layer(x, InputUse(float_tokens, owned=True)), whole)
    assert backend is Backend.INT8 or not torch.equal(x, kept)

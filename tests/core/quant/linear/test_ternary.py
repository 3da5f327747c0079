"""The ternary layer: one scale per fused projection, one product whatever computes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.errors import BackendError
from core.quant.dynamic import INPUT_KINDS, quantize_input, ternary_absmean
from core.quant.linear.ternary import TernaryLinear
from core.quant.static import InputUse
from kernels import Backend, hadamard
from tests.core.tools import gaussian, relative
from tests.kernels.fake_cuda import on_second_gpu


def fused(kind: str = "int8", *, width: int = 96, bias: bool = False, keep: float = 0.5) -> TernaryLinear:
    """q, k and v of different sizes and spreads."""
    parts = [gaussian(n, width, seed=n) * s for n, s in ((32, 0.02), (8, 1.0), (12, 30.0))]
    return TernaryLinear.from_weights(parts, gaussian(52, seed=9) if bias else None, kind=kind, keep=keep)


def expected(layer: TernaryLinear, x: torch.Tensor) -> torch.Tensor:
    """int64 sums, then the scales, projection by projection."""
    codes, scale = quantize_input(x.flatten(0, -2), layer.kind, keep=layer.keep)
    parts = [(codes.to(torch.int64) @ t.to(torch.int64).t()).to(torch.float32) * scale * a for t, a in layer.projections()]
    y = torch.cat(parts, dim=1)
    return (y if layer.bias is None else y + layer.bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("bias", [False, True], ids=("plain", "bias"))
@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 7, 96)], ids=str)
def test_every_backend_and_path_gives_the_same_bits(kind, bias, shape):
    layer, x = fused(kind, bias=bias, keep=0.3), gaussian(*shape, seed=1)
    right = expected(layer, x)
    for backend in (Backend.AUTO, Backend.INT8, Backend.REFERENCE):
        layer.set_backend(backend)
        assert torch.equal(layer(x), right)


def test_every_projection_keeps_its_own_scale():
    layer = fused()
    assert layer.weight_scale.shape == (3,) and layer.bounds.tolist() == [0, 32, 40, 52]
    for (codes, scale), (n, s) in zip(layer.projections(), ((32, 0.02), (8, 1.0), (12, 30.0)), strict=True):
        right, alpha = ternary_absmean(gaussian(n, 96, seed=n) * s)
        assert torch.equal(codes, right) and torch.equal(scale, alpha)
    weight = layer.dequantized_weight()
    assert torch.equal(weight[32:40], layer.projections()[1][0].float() * layer.weight_scale[1])


def test_chosen_rows_are_those_of_the_whole():
    layer, x = fused(bias=True), gaussian(3, 96)
    codes = layer.quantize(x)
    whole = layer.product(codes)
    assert torch.equal(layer.product(codes, slice(30, 45)), whole[:, 30:45])
    rows = torch.tensor([0, 5, 33, 51])
    assert torch.equal(layer.product(codes, rows), whole[:, rows])
    assert layer.product(codes, rows[:0]).shape == (3, 0)


def test_a_float_input_is_multiplied_in_float():
    layer, x = fused("fp", bias=True), gaussian(2, 3, 96)
    right = nn.functional.linear(x, layer.dequantized_weight(), layer.bias)
    assert torch.allclose(layer(x), right, rtol=1e-5, atol=1e-4)
    assert layer.choice.backend is Backend.REFERENCE and "float" in layer.choice.reason
    with pytest.raises(BackendError, match="use reference"):
        layer.set_backend(Backend.INT8)


@pytest.mark.parametrize("width", (64, 96, 100))
def test_a_rotated_input_meets_weights_of_rotated_channels(width):
    """With fine weights both rotations cancel; with ternary ones the float weight is that for the input as it comes."""
    x, weight = gaussian(5, width), gaussian(16, width, seed=2)
    layer = TernaryLinear.from_weights([weight], kind="h-int8")
    assert relative(hadamard(x) @ hadamard(weight).t(), x @ weight.t()) < 1e-5
    rounded = torch.cat([t.float() * a for t, a in layer.projections()])
    assert relative(rounded, hadamard(weight)) < 0.6 and torch.equal(layer.dequantized_weight(), hadamard(rounded))
    assert relative(layer(x), x @ layer.dequantized_weight().t()) < 2e-2
    assert torch.allclose(layer(x[None], InputUse(1))[0, 0], x[0] @ layer.dequantized_weight().t(), rtol=1e-4, atol=1e-4)
    assert layer.with_input("h-int4", 0.5).packed is layer.packed
    for kind in ("int4", "fp"):
        with pytest.raises(ValueError, match="round them again"):
            layer.with_input(kind, 0.5)


def test_exempt_rows_keep_a_float_input():
    layer, x = fused("int4"), gaussian(2, 5, 96)
    y = layer(x, InputUse(1))
    assert torch.equal(y[:, 1:], layer(x)[:, 1:])
    assert torch.allclose(y[:, 0], x[:, 0] @ layer.dequantized_weight().t(), rtol=1e-5, atol=1e-4)


def test_bytes_and_bits():
    layer = fused(width=128)
    stored = 52 * 32 + 3 * 4 + 4 * 4
    assert layer.effective_bits == pytest.approx(stored * 8 / (52 * 128)) and layer.bits == 2
    assert layer.working_bytes == 0
    layer(gaussian(1, 128))
    assert layer.working_bytes == layer.decode_bytes == 52 * (128 + 4)
    layer.set_backend(Backend.REFERENCE)
    assert layer.decode_bytes == layer.stored_bytes == stored
    layer(gaussian(1, 128))
    assert layer.working_bytes == layer.decode_bytes == 4 * 52 * (128 + 1)
    layer.release()
    assert layer.working_bytes == 0
    assert sorted(layer.state_dict()) == ["bounds", "packed", "weight_scale"]


def test_moving_keeps_what_was_asked_for():
    layer = fused()
    layer.set_backend(Backend.REFERENCE)
    assert layer.to("cpu").choice.backend is layer.requested is Backend.REFERENCE
    layer.set_backend(Backend.AUTO)
    assert layer.to("cpu").choice.backend is Backend.INT8


def test_a_gpu_without_kernels_is_named(monkeypatch):
    reason = "compute capability 7.5, kernels need 8.0"
    monkeypatch.setattr("core.quant.linear.ternary.triton_unsupported_reason", lambda device: reason)
    layer = fused()
    layer.packed = on_second_gpu(layer.packed)
    layer.set_backend(Backend.AUTO)
    assert (
        layer.choice.backend is Backend.REFERENCE and "no kernel runs this layer: compute capability 7.5" in layer.choice.reason
    )


def test_another_input_shares_the_weights():
    layer = fused("int8")
    other = layer.with_input("int4", 0.25)
    assert other.packed is layer.packed and (other.kind, other.keep, layer.kind) == ("int4", 0.25, "int8")


@pytest.mark.parametrize(
    "change",
    [
        {"bounds": torch.tensor([0, 32, 40])},
        {"bounds": torch.tensor([0, 32, 32, 52])},
        {"weight_scale": torch.ones(2)},
        {"weight_scale": torch.tensor([1.0, 0.0, 1.0])},
        {"packed": torch.zeros(52, 23, dtype=torch.uint8)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_tensors_that_do_not_fit_are_refused(change):
    layer = fused()
    tensors = {"packed": layer.packed, "weight_scale": layer.weight_scale, "bounds": layer.bounds} | change
    with pytest.raises(ValueError):
        TernaryLinear(tensors, in_features=96)


def test_unknown_quantisers_are_refused():
    with pytest.raises(ValueError, match="int3"):
        fused("int3")
    with pytest.raises(ValueError, match="keep"):
        fused("topk8", keep=0.0)

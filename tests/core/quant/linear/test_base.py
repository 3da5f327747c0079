"""What every linear layer of a block promises: parts, the in-place contract, working copies in one place, backends by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.errors import BackendError
from core.quant.affine import Grid, QParams
from core.quant.gptq import round_to_nearest
from core.quant.linear.base import FloatLinear, LinearLayer, WorkingCopies
from core.quant.linear.quant import QuantLinear
from core.quant.linear.ternary import TernaryLinear
from core.quant.static import ActivationQuantizer, InputUse
from kernels import Backend, Codes
from kernels.linear import int4

K, N = 64, 16
SHARED = torch.tensor([0, 32, K])


def quantizer(scales: tuple[float, ...] = (0.02, 0.03)) -> ActivationQuantizer:
    return ActivationQuantizer(8, QParams(torch.tensor(scales), torch.tensor([3.0, -2.0])), SHARED)


def packed(q: ActivationQuantizer | None, backend: Backend, offsets: torch.Tensor = SHARED, bits: int = 4) -> QuantLinear:
    weight = round_to_nearest(normal(N, K), offsets, bits=bits, grid=Grid.EXACT).weight
    layer = QuantLinear.from_weight(weight, normal(N), q)
    layer.set_backend(backend)
    return layer


def ternary(kind: str, backend: Backend = Backend.AUTO) -> TernaryLinear:
    layer = TernaryLinear.from_weights([normal(10, K), normal(N - 10, K)], normal(N), kind=kind)
    layer.set_backend(backend)
    return layer


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYERS = {
    "float": lambda: FloatLinear(normal(N, K), normal(N)),
    "float weight": lambda: QuantLinear.from_weight(normal(N, K), normal(N), quantizer(), offsets=SHARED),
    "reference": lambda: packed(quantizer(), Backend.REFERENCE),
    "int8": lambda: packed(quantizer(), Backend.INT8),
    "int8, zero points outside": lambda: packed(quantizer(), Backend.INT8, bits=7),
    "float input": lambda: packed(None, Backend.REFERENCE),
    "ternary": lambda: ternary("int8"),
    "ternary, reference": lambda: ternary("topk8", Backend.REFERENCE),
    "ternary, float input": lambda: ternary("fp"),
}
if int4.unsupported_reason(4, (0, 32, K), N) is None:
    LAYERS["int4"] = lambda: packed(None, Backend.INT4)


@pytest.fixture(params=LAYERS)
def layer(request) -> LinearLayer:
    return LAYERS[request.param]()


@pytest.mark.parametrize("float_tokens", (0, 1))
@pytest.mark.parametrize("rows", (1, 5))
def test_an_owned_input_may_be_overwritten_and_nothing_else_changes(layer, rows, float_tokens):
    x = normal(2, rows, K)
    kept, mine = x.clone(), x.clone()
    plain = layer(x, InputUse(float_tokens))
    assert torch.equal(x, kept), "an input that is not owned is the caller's"
    found = layer(mine, InputUse(float_tokens, owned=True))
    assert torch.equal(found, plain)
    assert found.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr()


def test_parts_are_the_layer_in_pieces(layer):
    x = normal(2, 5, K)
    whole = layer(x, InputUse(1))
    found = torch.cat(list(layer.parts(x, (5, 1, N - 6), InputUse(1))), dim=-1)
    assert whole.shape == (2, 5, N) and torch.allclose(found, whole, rtol=1e-5, atol=1e-5), "up to the order of float32 sums"


def test_working_copies_are_counted_and_released(layer):
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    assert layer.working_bytes == 0
    y = layer(normal(2, 5, K), InputUse(1))
    held, counted = layer.working_bytes, {id(t) for t in (*layer.parameters(), *layer.buffers())}
    assert held == layer.copies.nbytes(layer) and (held > 0) == (layer.bits < 16)
    assert layer.decode_bytes > 0 and layer.stored_bytes == sum(t.nbytes for t in layer.stored_tensors())
    assert counted >= {id(t) for t in layer.stored_tensors()} and set(layer.state_dict()) == set(before)
    layer.release()
    assert layer.working_bytes == 0 and torch.equal(layer(normal(2, 5, K), InputUse(1)), y)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_backend_that_cannot_run_leaves_the_layer_as_it_was(layer):
    y, requested, choice, held = layer(normal(3, K)), layer.requested, layer.choice, layer.working_bytes
    with pytest.raises(BackendError, match="use reference"):
        layer.set_backend(Backend.TRITON)
    assert (layer.requested, layer.choice, layer.working_bytes) == (requested, choice, held)
    assert torch.equal(layer(normal(3, K)), y)


def test_shared_tensors_of_working_copies_count_once():
    layer = packed(quantizer(), Backend.INT8)
    layer(normal(3, K))
    codes, scales, bias = N * K, 2 * N * 4, N * 4
    assert layer.working_bytes == layer.copies.nbytes(layer, "product") == codes + scales + bias
    layer(normal(1, 3, K), InputUse(1))
    assert layer.copies.nbytes(layer, "float rows") == codes + scales, "the same codes, scales of the weight alone"
    assert layer.working_bytes == codes + 2 * scales + bias


def test_working_copies_are_made_once():
    copies, made, layer = WorkingCopies(), [], nn.Identity()
    for _ in range(2):
        copies.get("a", lambda: made.append(1) or (torch.zeros(3), None))
    assert made == [1] and copies.nbytes(layer) == 12 and copies.nbytes(layer, "b") == 0
    copies.clear()
    assert copies.nbytes(layer) == 0


def test_given_codes_are_not_changed():
    """Clusters with a common step multiply the codes by factors: not those that somebody else made."""
    q = ActivationQuantizer(4, QParams(torch.tensor([0.4, 0.1]), torch.zeros(2)), SHARED)
    layer = packed(q, Backend.INT8, torch.tensor([0, K]))
    x = normal(3, K)
    codes = q.codes(x)
    given = codes.clone()
    assert torch.equal(layer(Codes(given)), layer(x)) and torch.equal(given, codes)


def test_a_float_layer_has_nothing_to_quantise():
    weight, bias, x = torch.randn(3, 5), torch.randn(3), torch.randn(2, 4, 5)
    layer = FloatLinear(weight, bias)
    expected = nn.functional.linear(x, weight, bias)
    assert torch.equal(layer(x, InputUse(2)), expected)
    assert all(torch.equal(a, b) for a, b in zip(layer.parts(x, (1, 2)), expected.split((1, 2), dim=-1), strict=True))
    assert (layer.effective_bits, layer.stored_bytes, layer.working_bytes) == (32.0, 60, 0)
    assert torch.equal(layer.dequantized_weight(), weight) and not any(p.requires_grad for p in layer.parameters())
    with pytest.raises(BackendError, match="int8 cannot run this layer"):
        layer.set_backend(Backend.INT8)
    assert layer.requested is Backend.AUTO and layer.choice.backend is Backend.REFERENCE

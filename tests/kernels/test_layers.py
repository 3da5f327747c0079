"""The layers of a quantised model through the Triton ops: the same numbers as their CPU backends.

Without a GPU the ops are asked to run interpreted, which no layer does by itself.
"""

from __future__ import annotations

import pytest
import torch

from core.quant.affine import QParams
from core.quant.linear.quant import QuantizedWeight, QuantLinear
from core.quant.linear.ternary import TernaryLinear
from core.quant.static import ActivationQuantizer
from kernels import Backend
from kernels.linear import weight_only

pytestmark = pytest.mark.gpu


def quant_linear(bits, offsets, *, quantized=True, outputs=9):
    g = torch.Generator().manual_seed(0)
    width, clusters = offsets[-1], len(offsets) - 1
    weight = QuantizedWeight(
        torch.randint(0, 2**bits, (outputs, width), generator=g).to(torch.uint8),
        (torch.rand(outputs, clusters, generator=g) * 0.1 + 0.01).to(torch.float16),
        torch.randint(-3, 4, (outputs, clusters), generator=g).to(torch.int8),
        torch.tensor(offsets), bits,
    )  # fmt: skip
    params = QParams(torch.rand(clusters, generator=g) * 0.05 + 0.01, torch.randint(-30, 30, (clusters,), generator=g).float())
    quantizer = ActivationQuantizer(8, params, torch.tensor(offsets)) if quantized else None
    return weight, torch.randn(outputs, generator=g), quantizer


@pytest.mark.parametrize("quantized", [True, False], ids=["quantised input", "float input"])
@pytest.mark.parametrize(("bits", "offsets"), [(4, (0, 32, 64)), (4, (0, 20, 64)), (3, (0, 5, 40))], ids=str)
def test_a_quantised_layer(bits, offsets, quantized, triton_everywhere, monkeypatch):
    device = triton_everywhere
    parts = quant_linear(bits, offsets, quantized=quantized)
    x = torch.randn(2, 3, offsets[-1], generator=torch.Generator().manual_seed(1))
    layer = QuantLinear.from_weight(*parts).to(device)
    assert layer.choice.backend is Backend.TRITON
    y = layer(x.to(device)).cpu()
    assert layer.takes_codes == (quantized and offsets == (0, 32, 64))
    monkeypatch.undo()
    layer = layer.cpu()
    layer.set_backend(Backend.REFERENCE)
    expected = layer(x)
    assert layer.choice.backend is Backend.REFERENCE and y.shape == expected.shape
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["int8", "topk8"])
def test_a_ternary_layer_gives_the_same_bits(kind, triton_everywhere, monkeypatch):
    device = triton_everywhere
    g = torch.Generator().manual_seed(2)
    layer = TernaryLinear.from_weights([torch.randn(n, 50, generator=g) for n in (7, 3)], kind=kind).to(device)
    assert layer.choice.backend is Backend.TRITON
    x = torch.randn(2, 3, 50, generator=g)
    y = layer(x.to(device)).cpu()
    assert layer.working_bytes == 10 * 4, "the scale of every row: nothing was unpacked"
    monkeypatch.undo()
    expected = layer.cpu()(x)
    assert torch.equal(y, expected) and layer.working_bytes == 10 * (50 + 4)


def test_triton_by_name_takes_any_number_of_rows(triton_everywhere, monkeypatch):
    device = triton_everywhere
    layer = QuantLinear.from_weight(*quant_linear(3, (0, 40), quantized=False)).to(device)
    monkeypatch.setattr(weight_only, "MAX_ROWS", 2)
    launched = []
    original = weight_only.launch
    monkeypatch.setattr(weight_only, "launch", lambda x, *a, **o: launched.append(len(x)) or original(x, *a, **o))
    for backend, expected in ((Backend.AUTO, [2]), (Backend.TRITON, [2, 3])):
        layer.set_backend(backend)
        launched.clear()
        for rows in (2, 3):
            layer(torch.zeros(rows, 40, device=device))
        assert launched == expected, backend

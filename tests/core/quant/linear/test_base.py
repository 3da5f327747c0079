"""What every linear layer of a block promises: parts, the in-place contract, working copies in one place, backends by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.errors import BackendError
from core.quant.linear.base import FloatLinear
from kernels import Backend


def test_a_float_layer_has_nothing_to_quantise():
    weight, bias, x = torch.randn(3, 5), torch.randn(3), torch.randn(2, 4, 5)
    layer = FloatLinear(weight, bias)
    expected = nn.functional.linear(x, weight, bias)
    assert torch.equal(layer(x, torch.ones(2, 4, dtype=torch.bool)), expected)
    assert all(torch.equal(a, b) for a, b in zip(layer.parts(x, (1, 2)), expected.split((1, 2), dim=-1), strict=True))
    assert (layer.effective_bits, layer.stored_bytes, layer.working_bytes) == (32.0, 60, 0)
    assert torch.equal(layer.dequantized_weight(), weight) and not any(p.requires_grad for p in layer.parameters())
    with pytest.raises(BackendError, match="int8 cannot run this layer"):
        layer.set_backend(Backend.INT8)
    assert layer.requested is Backend.AUTO and layer.choice.backend is Backend.REFERENCE

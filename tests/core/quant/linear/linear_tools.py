"""Packed layers on random numbers, and what they must compute, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from core.quant.affine import Grid, choose_qparams
from core.quant.gptq import round_to_nearest
from core.quant.linear.quant import QuantLinear
from core.quant.static import ActivationQuantizer
from kernels import Backend, code_limits

BACKENDS = (Backend.REFERENCE, Backend.INT8)


def quantizer_of(x: Tensor, offsets: Tensor, bits: int, grid: Grid = Grid.EXACT) -> ActivationQuantizer:
    runs = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    flat = x.reshape(-1, x.shape[-1])
    low = torch.stack([flat[:, a:b].min() for a, b in runs])
    high = torch.stack([flat[:, a:b].max() for a, b in runs])
    return ActivationQuantizer(bits, choose_qparams(low, high, bits=bits, grid=grid), offsets)


def example(
    width: int = 45,
    outputs: int = 11,
    *,
    weight_bits: int = 4,
    input_bits: int | None = 8,
    bias: bool = True,
    clusters: tuple[int, ...] = (0, 1, 20, 45),
    grid: Grid = Grid.EXACT,
    rows: int = 9,
) -> tuple[QuantLinear, Tensor]:
    g = torch.Generator().manual_seed(width + outputs)
    x = torch.randn(rows, width, generator=g) * (torch.rand(width, generator=g) * 4 + 0.2) + torch.randn(width, generator=g)
    weight, offsets = torch.randn(outputs, width, generator=g) / width**0.5, torch.tensor(clusters)
    made = weight if weight_bits == 16 else round_to_nearest(weight, offsets, bits=weight_bits, grid=grid).weight
    q = None if input_bits is None else quantizer_of(x, offsets, input_bits, grid)
    layer = QuantLinear.from_weight(made, torch.randn(outputs, generator=g) if bias else None, q, offsets=offsets)
    return layer, x


def exact(layer: QuantLinear, x: Tensor) -> Tensor:
    """x̂ Ŵᵀ + b in float64, x̂ and Ŵ written out from the saved buffers."""
    offsets = layer.offsets.long()
    run = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    w = layer.weight.double() if layer.bits == 16 else layer.dequantized_weight().double()
    x = x.double()
    if layer.quantizer is not None:
        q, (qmin, qmax) = layer.quantizer, code_limits(layer.quantizer.bits)
        own = torch.repeat_interleave(torch.arange(len(q.offsets) - 1), q.offsets.long().diff())
        scale, zero = q.scale.double()[own], q.zero_point.double()[own]
        x = (((x.float() / q.scale[own]).double().round() + zero).clamp(qmin, qmax) - zero) * scale
    assert len(run) == layer.in_features
    y = x @ w.t()
    return y if layer.bias is None else y + layer.bias.double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())

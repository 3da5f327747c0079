"""Build the calls of other packages that `benchmarks.gpu` times, where they are installed.

Weights are random, in the package's own 4-bit or ternary format at the job's shape, one copy per copy of the job.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu.harness import Machine

Peer = Callable[[int], object]
GROUP = 128
"""Columns per scale in GemLite's 4-bit layers."""


def liger(xs: list[Tensor], norm: Tensor, order: Tensor, scale: Tensor, eps: float) -> Peer:
    """Build Liger's RMSNorm, followed by gather and quantisation in eager torch."""
    from liger_kernel.transformers.functional import liger_rms_norm

    def call(i: int) -> Tensor:
        y = liger_rms_norm(xs[i], norm.to(xs[i].dtype), eps, in_place=False)
        return (y[:, order] / scale).round().clamp(-128, 127).to(torch.int8)

    return call


def bitsandbytes(m: Machine, x: Tensor, rows: int, copies: int) -> Peer:
    """Build NF4 layers with bfloat16 products."""
    from bitsandbytes.nn import Linear4bit

    layers = []
    for _ in range(copies):
        layer = Linear4bit(x.shape[1], rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight.data = m.randn(rows, x.shape[1])
        layers.append(layer.to(m.device))
    return lambda i: layers[i](x)


def gemlite(m: Machine, x: Tensor, rows: int, copies: int, *, inputs: int = 16) -> Peer:
    """Build 4-bit layers with groups of `GROUP` columns; inputs of 16 bits, or of 8 quantised per token by the layer."""
    from gemlite import helper

    kind = helper.A16W4_HQQ_INT if inputs == 16 else helper.A8W4_HQQ_INT_dynamic
    groups = rows * x.shape[1] // GROUP

    def layer() -> nn.Module:
        scales, zeros = (torch.full((groups, 1), v, dtype=torch.bfloat16, device=m.device) for v in (0.01, 8.0))
        return kind(device=m.device, dtype=torch.bfloat16).from_weights(m.randint(0, 16, rows, x.shape[1]), scales, zeros)

    layers = [layer() for _ in range(copies)]
    return lambda i: layers[i](x)


def gemlite_ternary(m: Machine, x: Tensor, rows: int, copies: int) -> Peer:
    """Build ternary layers whose inputs are quantised to 8 bits per token by the layer."""
    from gemlite.helper import A8W158_INT_dynamic

    def layer() -> nn.Module:
        weight = m.randint(-1, 2, rows, x.shape[1], dtype=torch.int8).to(torch.bfloat16)
        made = A8W158_INT_dynamic(device=m.device, dtype=torch.bfloat16)
        return made.from_weights(weight, torch.tensor(0.02, device=m.device))

    layers = [layer() for _ in range(copies)]
    return lambda i: layers[i](x)

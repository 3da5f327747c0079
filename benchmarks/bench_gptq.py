"""GPTQ of one layer's matrices against a plain column loop with three factorisations, the way published code does it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common import Result, interleave
from core.quant.affine import Grid
from core.quant.gptq import quantize_weight

SHAPES = {"q, k, v of SmolLM2-135M": (960, 576, 32), "gate and up": (3072, 576, 32), "down": (576, 1536, 32)}


def column_loop(weight: Tensor, hessian: Tensor, offsets: Tensor, bits: int) -> Tensor:
    """GPTQ one column at a time: Cholesky, inverse, Cholesky of the inverse, blocks of 128."""
    weight, width = weight.clone(), weight.shape[1]
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    result = torch.zeros_like(weight)
    groups = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    low = torch.stack([weight[:, groups == g].amin(1).clamp_max(0) for g in range(len(offsets) - 1)], 1)
    high = torch.stack([weight[:, groups == g].amax(1).clamp_min(0) for g in range(len(offsets) - 1)], 1)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    for start in range(0, width, 128):
        stop = min(start + 128, width)
        errors = torch.zeros(weight.shape[0], stop - start)
        for i in range(start, stop):
            s, z = scale[:, groups[i]], zero[:, groups[i]]
            result[:, i] = (((weight[:, i] / s).round() + z).clamp(0, 2**bits - 1) - z) * s
            error = (weight[:, i] - result[:, i]) / factor[i, i]
            weight[:, i:stop] -= error[:, None] * factor[i, i:stop][None]
            errors[:, i - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return result


def run(model: str) -> list[Result]:
    """Speed of `quantize_weight` over the column loop on random weights and correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for name, (rows, width, clusters) in SHAPES.items():
        weight = torch.randn(rows, width, generator=generator) * 0.05
        inputs = torch.randn(4 * width, width, generator=generator) @ (
            torch.randn(width, width, generator=generator) / width**0.5
        )
        hessian = inputs.t() @ inputs
        offsets = torch.linspace(0, width, clusters + 1).round().to(torch.int64)
        slow, fast = interleave(
            lambda w=weight, h=hessian, o=offsets: column_loop(w, h, o, 4),
            lambda w=weight, h=hessian, o=offsets: quantize_weight(w, h, o, bits=4, grid=Grid.EXACT),
            rounds=3,
        )
        results.append(Result(f"GPTQ {name} {rows}×{width}", slow / fast, "column loop, float32", seconds=fast))
    return results

"""C6: products with ternary weights and int8 inputs, input quantisation included, against float32."""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.common import Result, interleave, limits
from core.quant.linear.ternary import TernaryLinear

SHAPES = [(512, 2560, 2560), (512, 2560, 6912), (512, 576, 1536), (1, 2560, 6912)]


def run(model: str) -> list[Result]:
    """Time `TernaryLinear` on the shapes of a 2B model's layers and of SmolLM2-135M's (the model itself is not needed)."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for rows, width, outputs in SHAPES:
        weight = torch.randn(outputs, width, generator=generator)
        layer = TernaryLinear.from_weights([weight], kind="int8")
        x = torch.randn(rows, width, generator=generator)
        with torch.inference_mode():
            plain, ours = interleave(lambda x=x, w=weight: functional.linear(x, w), lambda x=x, f=layer: f(x), rounds=9)
        operations = 2 * rows * width * outputs
        results.append(
            Result(
                f"C6 ternary {rows}×{width}→{outputs}",
                plain / ours,
                "float32 linear",
                "≥ 2.5×" if rows > 1 else "",
                ours,
                note=f"{operations / ours / 1e9:.0f} GOP/s, {layer.choice.backend}",
                limit_fraction=operations / limits().int8 / ours if rows > 1 else width * outputs / limits().copy / ours,
            )
        )
    return results

"""Time the two CPU backends against float32 and torch's int8 layer, by rows and clusters, for AUTO's rule."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from benchmarks.common import Result, interleave
from core.quant.affine import Grid, choose_qparams
from core.quant.gptq import round_to_nearest
from core.quant.linear.quant import QuantLinear
from core.quant.static import ActivationQuantizer
from kernels import Backend

CASES = [(512, 576, 1536), (512, 1536, 576), (512, 4096, 4096), (1, 4096, 4096)]


def run(model: str) -> list[Result]:
    """Measure the speed of REFERENCE and INT8 (activation quantisation included) over `F.linear` in float32."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for rows, width, outputs in CASES:
        x, weight = torch.randn(rows, width, generator=generator), torch.randn(outputs, width, generator=generator) * 0.05
        for clusters in (1, 4, 8, 32):
            offsets = torch.linspace(0, width, clusters + 1).round().to(torch.int64)
            bound = torch.full((clusters,), 4.0)
            quantizer = ActivationQuantizer(8, choose_qparams(-bound, bound, bits=8, grid=Grid.EXACT), offsets)
            layers = []
            for backend in (Backend.REFERENCE, Backend.INT8):
                layer = QuantLinear.from_weight(
                    round_to_nearest(weight, offsets, bits=4, grid=Grid.EXACT).weight, None, quantizer
                )
                layer.set_backend(backend)
                layers.append(layer)
            calls = [functools.partial(functional.linear, x, weight), *(functools.partial(layer, x) for layer in layers)]
            if clusters == 1:
                calls.append(functools.partial(torch.ops.quantized.linear_dynamic, x, _torch_int8(weight)))
            with torch.inference_mode():
                plain, reference, int8, *peer = interleave(*calls, rounds=3 if rows * width > 2**20 else 7)
            auto = QuantLinear.from_weight(round_to_nearest(weight, offsets, bits=4, grid=Grid.EXACT).weight, None, quantizer)
            name = f"W4A8 linear {rows}×{width}→{outputs}, {clusters} cluster{'s' if clusters > 1 else ''}"
            for label, seconds in (("reference", reference), ("int8", int8)):
                note = "AUTO" if auto.choice.backend == label else ""
                results.append(Result(f"{name}, {label}", plain / seconds, "float32 linear", seconds=seconds, note=note))
            results += [Result(f"{name}, int8", s / int8, f"torch's dynamic int8 linear, {s * 1e3:.2f} ms") for s in peer]
    return results


def _torch_int8(weight: torch.Tensor) -> object:
    """Prepare a weight [N, K] for torch's own linear layer with int8 weights and dynamically quantised inputs."""
    scale = weight.abs().amax(1) / 127
    codes = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(codes, None)

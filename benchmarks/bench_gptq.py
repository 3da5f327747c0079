"""C2: time GPTQ of a layer's matrices against a plain column loop, on the same grid.

The baseline is written from the algorithm's description (arXiv:2210.17323, algorithm 1): Cholesky of H, its inverse, the upper
Cholesky factor of that; columns one by one, a block of 128 at a time.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.common import Result, interleave, limits
from core.quant.affine import Grid
from core.quant.gptq import quantize_weight, round_to_nearest
from core.quant.linear.quant import QuantizedWeight

LAYER = {"q, k, v": ((576, 192, 192), 576), "o": ((576,), 576), "gate, up": ((1536, 1536), 576), "down": ((576,), 1536)}
"""Matrices of a SmolLM2-135M layer by shared input: the published loop takes them one by one, ours fused."""

CLUSTERS = 32


def column_loop(weight: Tensor, hessian: Tensor, grid: QuantizedWeight) -> Tensor:
    """Compute codes [N, K] of GPTQ column by column, on the scales and zero points of `grid`, computed in the weight's type."""
    weight, width = weight.clone(), weight.shape[1]
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes = torch.zeros_like(weight)
    groups = torch.repeat_interleave(torch.arange(len(grid.offsets) - 1, device=weight.device), grid.offsets.diff())
    scale, zero = grid.scale.to(weight.dtype), grid.zero_point.to(weight.dtype) + 2 ** (grid.bits - 1)
    for start in range(0, width, 128):
        stop = min(start + 128, width)
        errors = torch.zeros(weight.shape[0], stop - start, dtype=weight.dtype, device=weight.device)
        for i in range(start, stop):
            s, z = scale[:, groups[i]], zero[:, groups[i]]
            codes[:, i] = ((weight[:, i] / s).round() + z).clamp(0, 2**grid.bits - 1)
            error = (weight[:, i] - (codes[:, i] - z) * s) / factor[i, i]
            weight[:, i:stop] -= error[:, None] * factor[i, i:stop][None]
            errors[:, i - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def problem(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, QuantizedWeight]:
    """Make a random weight, the Hessian of correlated inputs, and the weight rounded to nearest (whose grid both sides use)."""
    weight = torch.randn(rows, width, generator=generator) * 0.05
    inputs = torch.randn(2 * width, width, generator=generator) @ (torch.randn(width, width, generator=generator) / width**0.5)
    offsets = torch.linspace(0, width, CLUSTERS + 1).round().to(torch.int64)
    return weight, inputs.t() @ inputs, round_to_nearest(weight, offsets, bits=4, grid=Grid.EXACT).weight


def rows_of(grid: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Return the same grid for some rows."""
    return replace(grid, codes=grid.codes[rows], scale=grid.scale[rows], zero_point=grid.zero_point[rows])


def compare(name: str, problems: list[tuple[Tensor, Tensor, QuantizedWeight]], parts: list[tuple[int, ...]]) -> Result:
    """Compare in one line: ours on all `problems`, fused, and the loop on their `parts` (row counts), one by one."""
    found: dict[str, list[Tensor]] = {}

    def slow(name: str = "loop", dtype: torch.dtype = torch.float32) -> None:
        found[name] = [
            torch.cat([column_loop(w.to(dtype), hessian.to(dtype), rows_of(grid, s)) for w, s in _parts(weight, sizes)])
            for (weight, hessian, grid), sizes in zip(problems, parts, strict=True)
        ]

    def fast() -> None:
        found["ours"] = [
            quantize_weight(weight, hessian, grid.offsets, bits=4, grid=Grid.EXACT).weight.codes
            for weight, hessian, grid in problems
        ]

    large = problems[0][0].shape[1] > 2000
    loop, ours = interleave(slow, fast, rounds=1 if large else 5, warm_up=not large)
    notes = []
    if not large:
        slow("exact", torch.float64)
        for who in ("ours", "loop"):
            same = [(a == b).flatten() for a, b in zip(found["exact"], found[who], strict=True)]
            notes.append(f"{who} {float(torch.cat(same).float().mean()):.4%}")
    shapes = [weight.shape for weight, _, _ in problems]
    operations = sum(2 * k**3 / 3 + n * k**2 for n, k in shapes)  # a factorisation, a triangular inverse, the updates
    return Result(
        f"C2 GPTQ {name}",
        loop / ours,
        "column loop, three factorisations",
        "≥ 2.5×, 99.99 % equal codes",
        ours,
        note=f"codes equal to the loop in float64: {', '.join(notes)}" if notes else "",
        limit_fraction=operations / limits().float32 / ours,
    )


def _parts(weight: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, slice]]:
    slices = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    return list(zip(weight.split(sizes), slices, strict=True))


def run(model: str) -> list[Result]:
    """Compare a layer of SmolLM2-135M, its groups apart, and one matrix of a 7B model, on random weights."""
    generator = torch.Generator().manual_seed(0)
    made = {name: problem(sum(sizes), width, generator) for name, (sizes, width) in LAYER.items()}
    results = [compare("a layer of SmolLM2-135M, 7 matrices", list(made.values()), [sizes for sizes, _ in LAYER.values()])]
    for name, (sizes, width) in LAYER.items():
        results.append(compare(f"{name} {sum(sizes)}×{width}", [made[name]], [sizes]))
    return [*results, compare("4096×4096", [problem(4096, 4096, generator)], [(4096,)])]

"""P1 to P3: predicted divergence against measured, of single swaps and of random recipes.

A swap is one site or one linear layer quantised, everything else in float. `ratio` is the rank correlation (Spearman) of
predicted and measured KLD, `median_ratio` the median of predicted over measured.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import quantiles

import torch

from benchmarks.common import Result
from benchmarks.instrument import EMBEDDED, Tool
from core import Bits, Clusters
from core.probe.measure import measure, swap
from core.probe.plans import cell_name
from core.probe.predict import predict
from core.recipe import INPUT_SITE, SITES

SWAP_BITS, SWAP_CLUSTERS, MIXES = (3, 4, 6), (1, 32), 20


def run(model: str) -> Iterator[Result]:
    """Compare on every layer of the embedded Llama, and on every seventh of `model`."""
    for job, name, every in (("P1 swaps embedded", EMBEDDED, 1), (f"P2 swaps {model.split('-')[0]}", model, 7)):
        tool = Tool.of(name)
        yield from _swaps(tool, job, range(0, len(tool.loaded.model.blocks), every))
        yield _mixes(tool, job.split()[-1])


def _swaps(tool: Tool, job: str, layers: Iterable[int]) -> list[Result]:
    """Compare predicted and measured swaps of sites and of weights."""
    pairs: dict[str, list[tuple[float, float]]] = {"activations and KV cache": [], "weights": []}
    for count in SWAP_CLUSTERS:
        for bits in SWAP_BITS:
            recipe = replace(
                tool.recipe,
                scheme="custom",
                bits=Bits(*[bits] * 9),
                clusters=Clusters.uniform(count),
            )
            cells = predict(*tool.arguments, recipe).cells
            for layer in layers:
                for cell in (*SITES, *INPUT_SITE):
                    kind = "weights" if cell in INPUT_SITE else "activations and KV cache"
                    found = swap(*tool.arguments, recipe, layer, cell).kld
                    pairs[kind].append((cells[cell_name(layer, cell)], found))
    targets = {"activations and KV cache": "≥ 0.98, median 0.9 … 1.1", "weights": "≥ 0.95, median 0.8 … 1.2"}
    return [_agreement(f"{job}, {kind}", found, targets[kind]) for kind, found in pairs.items()]


def _mixes(tool: Tool, job: str) -> Result:
    """Compare predicted and measured divergence of random recipes."""
    draw, pairs = random.Random(0), []
    for _ in range(MIXES):
        bits = Bits(*(draw.choice((3, 4, 5, 6, 8, 16)) for _ in range(9)))
        clusters = Clusters(*(draw.choice((1, 4, 16, 32)) for _ in range(5)))
        recipe = replace(tool.recipe, scheme="custom", bits=bits, clusters=clusters)
        pairs.append((predict(*tool.arguments, recipe).total, measure(*tool.arguments, recipe).kld))
    return _agreement(f"P3 mixes, {job}", pairs, "≥ 0.95")


def _agreement(job: str, pairs: Sequence[tuple[float, float]], target: str) -> Result:
    """Make the line of a comparison: rank correlation, median ratio, quartiles."""
    ratios = [predicted / found for predicted, found in pairs]
    low, middle, high = quantiles(ratios, n=4)
    note = f"predicted / measured {middle:.3f} ({low:.2f} – {high:.2f}), KLD {min(m for _, m in pairs):.2g} … "
    note += f"{max(m for _, m in pairs):.2g} nats"
    return Result(job, spearman(pairs), f"{len(pairs)} measured", target, note=note, median_ratio=middle)


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Compute the rank correlation of pairs without ties."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in zip(*pairs, strict=True)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])

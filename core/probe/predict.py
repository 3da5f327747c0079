"""Predict the divergence that each cell of a recipe causes, without a forward pass.

For a site with δ = quantised - float, and u[s, b, t, c] = g[s, b, t, c] δ[b, t, c] for S draws of labels, B windows, T tokens, N
= B T:

    KLD ≈ 1 / (2 N S) · Σ_sb [ Σ_t (Σ_c u)²  +  Σ_c (Σ_t u)²  -  Σ_tc u² ]          nats per token

The exact quadratic form is Σ_sb (Σ_tc u)² / (2 N S), one squared number per draw and window: unbiased, but far too noisy. Its
terms between different tokens *and* different channels average to nothing; kept are those of equal tokens (first sum) and of
equal channels (second sum), each of which has hundreds of independent parts. The second sum holds what is the same at many
tokens: channels that always round the same way, and rounded weights, whose error is one matrix for all tokens.

Weights are rounded to nearest. The error of o and down is taken at their outputs, that of qkv at q, k and v, that of up at
down_in, by running the block up to there; that of a quantised softmax at o_in. The costs of cells add up (`Prediction.total`);
where they are large, cells interact and the sum reads low. docs/predict.md has the measurements. Source: docs/predict.md, "The
estimator".
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from core.methods import method
from core.methods.base import Fake, SiteKey
from core.models.decoder import CausalModel
from core.probe.layers import see
from core.probe.plans import CELLS, Layer, cell_key, cell_name
from core.probe.probe import Half, Probe, Table
from core.probe.report import Prediction
from core.probe.statistics import Statistics
from core.progress import Progress, silent
from core.recipe import FLOAT_BITS, INPUT_SITE, QuantRecipe
from kernels.threads import in_threads

AHEAD = {"qkv": ("q", "k", "v"), "up": ("down_in",), "softmax": ("o_in",)}
"""Where the error of a cell that is no site is seen."""


def fisher(gradients: Half, error: Tensor) -> float:
    """Compute the predicted KLD of an error, nats per token.

    Args:
        gradients: [S, B, T, C]. error: [B, T, C], quantised minus float.
    """
    total = 0.0
    for draw in gradients.values:
        for g, part in zip(draw, error, strict=True):  # [T, C] stay in a core's cache
            u = g * part
            by_token, by_channel = u.sum(1), u.sum(0)
            total += float(by_token @ by_token + by_channel @ by_channel - u.flatten() @ u.flatten())
    draws, windows, tokens, _ = gradients.values.shape
    return max(0.0, total) * gradients.scale**2 / (2 * windows * tokens * draws)


def predict(
    probe: Probe,
    model: CausalModel,
    statistics: Statistics,
    recipe: QuantRecipe,
    *,
    cells: Collection[str] | None = None,
    seconds: float = math.inf,
    progress: Progress = silent,
) -> Prediction:
    """Predict the divergence of every cell of a recipe. What was computed once is kept in the probe.

    Args:
        statistics: of the recipe's calibration (`collect_statistics`).
        cells: names of the only cells to predict; None for all.
        seconds: begin no cell that would end after these; cells not known then are estimated from other bits and clusters.
    """
    start = time.perf_counter()
    every = _tables(probe, model, statistics, recipe)
    changed = [entry for entry in every if cells is None or cell_name(*entry[:2]) in cells]
    missing: dict[int, list[str]] = {}
    for layer, cell, table, key in changed:
        if (key.bits, key.clusters) not in table:
            missing.setdefault(layer, []).append(cell)
    late = start + seconds

    @torch.no_grad()
    def compute(layer: int) -> dict[str, float]:
        looked_at, values = Layer.of(model, layer, statistics, recipe), {}
        for cell in sorted(missing[layer], key=lambda cell: probe.took.get(cell, 0.0)):  # the most cells before it is late
            begun = time.perf_counter()
            if begun + probe.took.get(cell, 0.0) < late:
                values[cell] = _predict_cell(probe, looked_at, layer, cell)
                probe.took[cell] = time.perf_counter() - begun
        return values

    found: dict[tuple[int, str], float] = {}
    for done, (layer, values) in enumerate(zip(missing, in_threads(compute, missing), strict=True)):
        found |= {(layer, cell): value for cell, value in values.items()}
        progress("Predicting", done / len(missing))
    costs: dict[str, float] = {}
    estimated, unknown = [], []
    for layer, cell, table, key in changed:
        name, place = cell_name(layer, cell), (key.bits, key.clusters)
        if (layer, cell) in found:
            table[place] = found[layer, cell]
        if place in table:
            costs[name] = table[place]
        elif (guess := _neighbours(table, *place)) is not None:
            costs[name] = guess
            estimated.append(name)
        else:
            unknown.append(name)
    total = math.fsum(costs.values())
    return Prediction(costs, total, tuple(estimated), tuple(unknown), probe.noise_floor, time.perf_counter() - start)


def _tables(
    probe: Probe, model: CausalModel, statistics: Statistics, recipe: QuantRecipe
) -> Iterator[tuple[int, str, Table, SiteKey]]:
    """Yield every cell that a recipe changes: layer, cell, what is known of it by (bits, clusters), and the recipe's key."""
    planner = method(recipe.method)

    @functools.cache
    def look_up(own: QuantRecipe) -> dict[str, tuple[SiteKey, dict[int, Table]]]:
        context = (own.method, planner.sink_tokens(own), statistics.digest)
        keys = {cell: cell_key(own, cell) for cell in CELLS}
        return {cell: (key, probe.cells.setdefault((cell, key.rest, context), {})) for cell, key in keys.items()}

    for layer, block in enumerate(model.blocks):
        for cell, (key, table) in look_up(recipe.for_layer(layer)).items():
            if key.bits < FLOAT_BITS or not (block.is_float or cell == "softmax"):
                yield layer, cell, table.setdefault(layer, {}), key


def _predict_cell(probe: Probe, layer: Layer, index: int, cell: str) -> float:
    """Compute one cell of `predict`."""
    kept, change = probe.layers[index], layer.change(cell)
    if cell in INPUT_SITE and cell not in change.weights:
        return 0.0
    if cell in AHEAD:
        start = "mlp_in" if cell == "up" else "attn_in"
        seen = see(layer.block, {start: kept.values[start].get()}, probe.rotary, change, AHEAD[cell])
        return math.fsum(fisher(kept.gradients[site], x - kept.values[site].get()) for site, x in seen.items())
    if cell not in INPUT_SITE:
        return site_cost(probe, layer, index, cell, change.sites.get(cell))
    error = change.weights[cell] - layer.block.linears()[cell].dequantized_weight()
    x = kept.values[INPUT_SITE[cell]].get()
    return fisher(kept.gradients[cell], torch.nn.functional.linear(layer.own_site(INPUT_SITE[cell], x), error))


def site_cost(probe: Probe, layer: Layer, index: int, site: str, fake: Fake | None) -> float:
    """Predict the divergence that rounding one site of layer `index` by `fake` causes, nats per token; None rounds nothing."""
    kept = probe.layers[index]
    x = kept.values[site].get()
    return fisher(kept.gradients[site], (x if fake is None else fake(x)) - layer.own_site(site, x))


def _neighbours(table: Table, bits: int, clusters: int) -> float | None:
    """Estimate a cell from what is known of it: along log(clusters) between known counts, 6 dB for a bit; None if nothing is."""
    if not table:
        return None
    nearest = min({b for b, _ in table}, key=lambda b: abs(b - bits))
    known = sorted((math.log(count), math.log(max(value, 1e-30))) for (b, count), value in table.items() if b == nearest)
    at = math.log(clusters)
    below, above = [k for k in known if k[0] <= at], [k for k in known if k[0] >= at]
    (x, y), (x2, y2) = (below or above)[-1 if below else 0], (above or below)[0 if above else -1]
    value = y if x2 == x else y + (y2 - y) * (at - x) / (x2 - x)
    return math.exp(value) * 4.0 ** (nearest - bits)

"""Measure recipes on the probe: one fake-quantised pass, weights rounded to nearest.

A single cell is measured from its layer on: what enters that layer is kept. Changing nothing repeats the kept pass, so its
divergence is exactly 0: the control of every measurement.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from core.evaluation.paired import mean_and_error
from core.models.decoder import CausalModel
from core.probe.layers import float_twin, run
from core.probe.plans import Layer, require_cell
from core.probe.probe import Probe, compare, head_logits
from core.probe.report import Measurement
from core.probe.statistics import Statistics
from core.progress import Progress, silent
from core.recipe import QuantRecipe


@torch.no_grad()
def measure(
    probe: Probe, model: CausalModel, statistics: Statistics, recipe: QuantRecipe, *, progress: Progress = silent
) -> Measurement:
    """Measure a recipe on the probe's tokens, all layers quantised at once.

    Args: statistics: of the recipe's calibration (`collect_statistics`).
    """
    start, h, count = time.perf_counter(), probe.hidden[0], len(model.blocks)
    for index in range(count):
        progress(f"Measuring on the probe: layer {index + 1} of {count}", index / count)
        layer = Layer.of(model, index, statistics, recipe)
        h = run(layer.block, h, probe.rotary, layer.whole_change())
    return _measurement(probe, model, h, start)


@torch.no_grad()
def swap(
    probe: Probe, model: CausalModel, statistics: Statistics, recipe: QuantRecipe, layer: int, cell: str | None
) -> Measurement:
    """Measure one cell of a recipe alone, everything else as in the model.

    Args: cell: one of `core.probe.plans.CELLS`; None changes nothing, which must give exactly 0.
    Raises: InputError E-PARAM-SITE for a cell that does not exist.
    """
    start = time.perf_counter()
    require_cell(model, layer, cell or "k")
    looked = Layer.of(model, layer, statistics, recipe)
    h = run(looked.block, probe.hidden[layer], probe.rotary, looked.own if cell is None else looked.change(cell))
    for block in model.blocks[layer + 1 :]:
        twin, own = float_twin(block)
        h = run(twin, h, probe.rotary, own)
    return _measurement(probe, model, h, start)


def _measurement(probe: Probe, model: CausalModel, h: Tensor, start: float) -> Measurement:
    """Compare what leaves the last block, [B, T, D], with the probe's own."""
    divergences, same = compare(model, probe, head_logits(model, h.flatten(0, 1)))
    kld, error = mean_and_error(divergences.mean(1).tolist())
    return Measurement(kld, error, float(same.double().mean()), probe.noise_floor, time.perf_counter() - start)

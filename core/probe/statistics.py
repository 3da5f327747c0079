"""Calibration statistics of every layer of a model, as methods plan on them.

They are those that `core.methods.sequential` gives a method, with one difference: there a layer is observed behind the
*quantised* layers before it, here behind the model's own, because no recipe is chosen yet. So the first layer's plan is that of
the real run, and a later layer's is wherever its inputs are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.calibration.observe import Recorder, embed
from core.methods.base import FLOAT_FIRST_TOKENS, LayerStatistics, Method
from core.methods.sequential import layer_statistics, run_layer, watch_layer
from core.models.decoder import CausalModel
from core.progress import Progress, silent
from core.recipe import FLOAT_BITS, Calibration, QuantRecipe


@dataclass(frozen=True)
class Observed:
    """All of a recipe that a pass of observation depends on: text and tokens, seed, softmax, and whether weights are ternary."""

    calibration: Calibration
    seed: int
    softmax_bits: int
    ternary: bool

    @classmethod
    def by(cls, method: Method, recipe: QuantRecipe) -> Observed:
        """Read it off a recipe."""
        return cls(recipe.calibration, recipe.seed, method.calibration_softmax_bits(recipe), method.keeps_ternary)


Statistics = dict[int, list[LayerStatistics]]
"""By the number of first tokens that are left out of the ranges, 0 or FLOAT_FIRST_TOKENS: one for each layer."""


@torch.inference_mode()
def collect_statistics(model: CausalModel, windows: Tensor, what: Observed, *, progress: Progress = silent) -> Statistics:
    """Observe every layer on calibration windows [S, T] int64.

    Raises: NumericError if a site has NaN or infinity.
    """
    inputs = embed(model, windows)
    hidden = [item.hidden for item in inputs]
    found: Statistics = {0: [], FLOAT_FIRST_TOKENS: []}
    for index, own in enumerate(model.blocks):
        progress(f"Calibration: layer {index + 1} of {len(model.blocks)}", index / len(model.blocks))
        block = own if own.is_float or what.ternary else own.dequantized()
        recorders = {skip: [_recorder(index, windows, skip, what.seed)] for skip in found}
        outputs = watch_layer(block, hidden, inputs, [part for parts in recorders.values() for part in parts])
        if what.softmax_bits < FLOAT_BITS:
            for skip, parts in recorders.items():
                parts.append(_recorder(index, windows, skip, what.seed))
            watch_layer(block, hidden, inputs, [parts[1] for parts in recorders.values()], softmax_bits=what.softmax_bits)
        for skip, parts in recorders.items():
            found[skip].append(layer_statistics(block, parts[0], parts[-1]))
        hidden = outputs if block is own else run_layer(own, hidden, inputs)
    return found


def _recorder(layer: int, windows: Tensor, skip: int, seed: int) -> Recorder:
    return Recorder(layer, len(windows), hessians_wanted=False, skip_first=skip, seed=seed)


def nbytes(statistics: Statistics) -> int:
    """Count the bytes of all ranges and rows."""
    ranges = (r for layers in statistics.values() for stats in layers for r in _distinct(stats))
    return sum(t.nbytes for r in ranges for t in vars(r).values())


def _distinct(stats: LayerStatistics) -> list:
    same = stats.calibrated is stats.ranges
    return [*stats.ranges.values(), *(() if same else stats.calibrated.values())]

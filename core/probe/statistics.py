"""Calibration statistics of every layer of a model, as methods plan on them.

They are those that `core.methods.sequential` gives a method, with one difference: there a layer is observed behind the
*quantised* layers before it, here behind the model's own, because no recipe is chosen yet. So the first layer's plan is that of
the real run, and a later layer's is wherever its inputs are the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.calibration.observe import Recorder, embed
from core.methods.base import FLOAT_FIRST_TOKENS, LayerStatistics, Method
from core.methods.sequential import layer_statistics, run_layer, watch_layer
from core.models.decoder import CausalModel
from core.progress import Progress, silent
from core.recipe import FLOAT_BITS, QuantRecipe


@dataclass(frozen=True)
class Observed:
    """All of a recipe that a pass over calibration windows depends on.

    Attributes: softmax_bits: of each layer, while scales are calibrated.
    """

    seed: int
    softmax_bits: tuple[int, ...]
    keeps_ternary: bool

    @classmethod
    def by(cls, method: Method, recipe: QuantRecipe, layers: int) -> Observed:
        """Read it off a recipe for a model of `layers` layers."""
        softmax = tuple(method.calibration_softmax_bits(recipe.for_layer(layer)) for layer in range(layers))
        return cls(recipe.seed, softmax, method.keeps_ternary)


@dataclass(frozen=True)
class Statistics:
    """Statistics of all layers.

    Attributes:
        digest: stands for the windows and for how they were observed.
        layers: one for each layer, by the number of first tokens left out of the ranges: 0 or FLOAT_FIRST_TOKENS.
    """

    digest: str
    layers: dict[int, list[LayerStatistics]]

    def of_layer(self, method: Method, index: int, recipe: QuantRecipe) -> LayerStatistics:
        """Return a layer's statistics as a recipe's method plans on them, with the order that all layers share."""
        kept = self.layers[FLOAT_FIRST_TOKENS]
        key = ("residual", recipe.method, recipe.order, recipe.seed)
        order = kept[0].once(key, lambda: method.residual_order([stats.ranges for stats in kept], recipe))
        return replace(self.layers[method.sink_tokens(recipe.for_layer(index))][index], residual=order)

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges and sampled rows; scales and clusters that were made of them are a few per cent more."""
        stats = [stats for layers in self.layers.values() for stats in layers]
        ranges = {id(r): r for s in stats for r in (*s.ranges.values(), *s.calibrated.values())}
        return sum(t.nbytes for r in ranges.values() for t in vars(r).values())


def digest_of(windows: Tensor, *what: object) -> str:
    """Return 16 hexadecimal digits that stand for windows [S, T] int64 and for what was done with them."""
    return hashlib.sha256(f"{tuple(windows.shape)}{what}".encode() + windows.cpu().numpy().tobytes()).hexdigest()[:16]


@torch.inference_mode()
def collect_statistics(model: CausalModel, windows: Tensor, what: Observed, *, progress: Progress = silent) -> Statistics:
    """Observe every layer on calibration windows [S, T] int64.

    Raises: NumericError if a site has NaN or infinity.
    """
    inputs = embed(model, windows)
    hidden = [item.hidden for item in inputs]
    found: dict[int, list[LayerStatistics]] = {0: [], FLOAT_FIRST_TOKENS: []}
    for index, own in enumerate(model.blocks):
        progress(f"Calibration: layer {index + 1} of {len(model.blocks)}", index / len(model.blocks))
        block = own if own.is_float or what.keeps_ternary else own.dequantized()
        recorders = {skip: [_recorder(index, windows, skip, what.seed)] for skip in found}
        outputs = watch_layer(block, hidden, inputs, [part for parts in recorders.values() for part in parts])
        if what.softmax_bits[index] < FLOAT_BITS:
            for skip, parts in recorders.items():
                parts.append(_recorder(index, windows, skip, what.seed))
            watch_layer(block, hidden, inputs, [parts[1] for parts in recorders.values()], softmax_bits=what.softmax_bits[index])
        for skip, parts in recorders.items():
            found[skip].append(layer_statistics(block, parts[0], parts[-1]))
        hidden = outputs if block is own else run_layer(own, hidden, inputs)
    return Statistics(digest_of(windows, what), found)


def _recorder(layer: int, windows: Tensor, skip: int, seed: int) -> Recorder:
    return Recorder(layer, len(windows), hessians_wanted=False, skip_first=skip, seed=seed)

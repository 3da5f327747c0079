"""The fake workbench's answers about costs: a prediction, and measurements that are twice as high."""

from __future__ import annotations

import math

from core.probe.report import Measurement, Prediction, ProbeInfo
from core.recipe import QuantRecipe
from tests.app.fake_behaviour import Progress, misbehave


class FakeProbe:
    """Answers what bits and clusters cost."""

    def probe(self, recipe: QuantRecipe, *, owner: str, progress: Progress) -> ProbeInfo:
        """Made-up facts."""
        misbehave(recipe.model, progress)
        return ProbeInfo(recipe.model, "sotu", 512, 256, 4, 0.0001, 0.1, 1000)

    def predict(self, recipe: QuantRecipe, *, seconds: float = math.inf, owner: str, progress: Progress) -> Prediction:
        """A cost that falls with clusters and bits, all of it in two parts of layers 1 and 3."""
        one, three = recipe.for_layer(1), recipe.for_layer(3)
        cells = {
            "layers.1.down_in": 1.2 / one.clusters.R5 / 4.0 ** (one.tensor_bits.down_in - 4),
            "layers.3.k": 0.4 / three.clusters.R5 / 4.0 ** (three.tensor_bits.down_in - 4),
        }
        return Prediction(cells, math.fsum(cells.values()), (), (), 0.0001, 0.01)

    def measure(self, recipe: QuantRecipe, *, owner: str, progress: Progress) -> Measurement:
        """Twice what is predicted."""
        return Measurement(2 * self.predict(recipe, owner=owner, progress=progress).total, 0.001, 0.9, 0.0001, 0.1)

    def swap(self, recipe: QuantRecipe, layer: int, cell: str | None, *, owner: str, progress: Progress) -> Measurement:
        """What is predicted; nothing for the control."""
        cells = self.predict(recipe, owner=owner, progress=progress).cells
        return Measurement(cells[f"layers.{layer}.{cell}"] if cell else 0.0, None, 0.9, 0.0001, 0.1)

"""A probe of a model with the statistics that recipes plan on, for the jobs that predict and measure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from core import Calibration, QuantRecipe
from core.calibration.data import calibration_tokens
from core.evaluation.windows import evaluation_windows
from core.methods import method
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from core.probe.probe import Probe, build_probe
from core.probe.statistics import Observed, Statistics, collect_statistics

EMBEDDED, TEXT, TOKENS, WINDOW = "quantscope-llama-6m", "sotu", 512, 256
CALIBRATION = Calibration(TEXT, 2048, 512)


@dataclass
class Tool:
    """A probe of a model, its statistics, and what they took."""

    loaded: LoadedModel
    windows: torch.Tensor
    calibration: torch.Tensor
    recipe: QuantRecipe

    @classmethod
    def of(cls, name: str) -> Tool:
        """Load a model by name and cut the texts."""
        return cls.around(load_model(name))

    @classmethod
    def around(cls, loaded: LoadedModel) -> Tool:
        """Cut the texts for a loaded model."""
        recipe = QuantRecipe(loaded.name, calibration=CALIBRATION, weights="rtn")
        windows, _ = evaluation_windows(loaded, TEXT, tokens=TOKENS, window=WINDOW)
        calibration, _ = calibration_tokens(loaded, recipe.calibration, recipe.seed, True)
        return cls(loaded, windows, calibration, recipe)

    @cached_property
    def probe(self) -> Probe:
        """The probe."""
        return build_probe(self.loaded.model, self.windows)

    @cached_property
    def statistics(self) -> Statistics:
        """What recipes plan on."""
        observed = Observed.by(method(self.recipe.method), self.recipe, len(self.loaded.model.blocks))
        return collect_statistics(self.loaded.model, self.calibration, observed)

    @property
    def arguments(self) -> tuple:
        """What predictions and measurements begin with."""
        return self.probe, self.loaded.model, self.statistics

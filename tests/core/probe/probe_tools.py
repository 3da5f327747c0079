"""What the tests of the probe share: probes of tiny models, and the plans and statistics of recipes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from core.methods import method
from core.models.decoder import CausalModel
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model
from core.probe.probe import Probe, build_probe
from core.probe.statistics import Observed, Statistics, collect_statistics
from core.recipe import Bits, Calibration, Clusters, QuantRecipe
from tests.core.tools import tokens

READ = tokens(2, 24, seed=5)
"""Windows that probes read."""
SEEN = tokens(8, 32)
"""Windows that plans are calibrated on."""


def recipe_of(name: str = "m", **options) -> QuantRecipe:
    """A recipe of few clusters whose weights are rounded to nearest."""
    few = Clusters(5, 3, 3, 5, 5)
    return QuantRecipe(name, **{"clusters": few, "weights": "rtn", "calibration": Calibration(tokens=256, window=32), **options})


def bits_of(cell: str, bits: int) -> Bits:
    """Bits of one cell, everything else in float."""
    return Bits(**{"weights" if cell in ("qkv", "o", "up", "down") else cell: bits})


@lru_cache
def probed(architecture: str, draws: int = 4, layers: int = 2) -> tuple[LoadedModel, Probe]:
    """A tiny model and its probe, made once."""
    loaded = tiny_model(architecture, layers=layers)
    return loaded, build_probe(loaded.model, READ, draws=draws)


def statistics_of(model: CausalModel, recipe: QuantRecipe, windows: Tensor = SEEN) -> Statistics:
    return collect_statistics(model, windows, Observed.by(method(recipe.method), recipe, len(model.blocks)))


@torch.no_grad()
def divergence(reference: CausalModel, other: CausalModel, ids: Tensor) -> float:
    """KLD(reference || other), nats per token, by its definition."""
    log_p, log_q = (m(ids).logits.double().log_softmax(-1) for m in (reference, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

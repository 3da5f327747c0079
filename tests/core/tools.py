"""Shared by the tests of core: tiny models quantised without a text, and comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from core.methods import method
from core.methods.sequential import LayerOutcome, quantize_layers
from core.models.architectures import BlockSpec
from core.models.block import DecoderBlock
from core.models.io.load import LoadedModel
from core.models.tiny import tiny_architectures, tiny_model
from core.recipe import Calibration, QuantRecipe

ARCHITECTURES = tiny_architectures()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, or the largest integer: what is read before it is written shows. (The public switch imports
    a compiler, two seconds.)"""
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)


@lru_cache
def tiny(architecture: str) -> LoadedModel:
    """`tiny_model(architecture)`, made once: for tests that leave it as it is."""
    return tiny_model(architecture)


def tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Random byte tokens [rows, length]."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def spec_of(loaded: LoadedModel) -> BlockSpec:
    return loaded.adapter.spec(loaded.model.config)


def float_blocks(loaded: LoadedModel) -> list[DecoderBlock]:
    """The model's layers as float blocks."""
    layers = loaded.adapter.decoder_layers(loaded.model)
    return [DecoderBlock.from_layer(layer, loaded.adapter, spec_of(loaded), i) for i, layer in enumerate(layers)]


@dataclass(frozen=True)
class Quantised:
    """A tiny model before and after, and what the pass reported."""

    base: LoadedModel
    loaded: LoadedModel
    outcomes: list[LayerOutcome]
    recipe: QuantRecipe

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.loaded.adapter.decoder_layers(self.loaded.model)


def quantised(
    architecture: str,
    *,
    base: LoadedModel | None = None,
    windows: Tensor | None = None,
    progress: Any = None,
    layers: int = 2,
    **recipe: Any,
) -> Quantised:
    """Quantise a tiny model on random tokens by a recipe's fields."""
    base = base or tiny_model(architecture, layers=layers)
    made = QuantRecipe(base.name, calibration=Calibration(tokens=256, window=32), **recipe)
    options = {} if progress is None else {"progress": progress}
    windows = tokens(8, 32) if windows is None else windows
    model, outcomes, _ = quantize_layers(base.model, base.adapter, method(made.method), made, windows, **options)
    return Quantised(base, replace(base, model=model), outcomes, made)


@torch.inference_mode()
def in_steps(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None, steps: tuple[int, ...] = (7, 3)) -> Tensor:
    """Logits [B, T, V] with a cache: first `steps` tokens at a time, the rest one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out, start = [], 0
    sizes = [*steps, *[1] * (ids.shape[1] - sum(steps))]
    for size in sizes:
        out.append(model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    return torch.cat(out, dim=1)

"""Shared by the tests of core: tiny models quantised without a text, and comparisons."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from core.calibration.observe import BlockInputs
from core.methods import method
from core.methods.sequential import LayerOutcome, quantize_layers
from core.models.adapter import BlockSpec
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model, tiny_transformers
from core.quant.kv_cache import KVCache
from core.recipe import Calibration, QuantRecipe

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "bitnet", "smollm", "opt")
"""What most tests run on; `tests/core/models/variants.py` has every architecture and its variants."""


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


@contextlib.contextmanager
def few_calls(most: int) -> Iterator[None]:
    """Fail when the block calls more than `most` functions, Python's own included: a count of work, on every machine the same."""
    made = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert made <= most


@lru_cache
def tiny(architecture: str) -> LoadedModel:
    """`tiny_model(architecture)`, made once: for tests that leave it as it is."""
    return tiny_model(architecture)


def tiny_source(architecture: str, **options: Any) -> LoadedModel:
    """`tiny_model` with transformers' own model in it: what a training hands over, and what files are written from."""
    return replace(tiny_model(architecture, **options), model=tiny_transformers(architecture, **options))


def tokens(rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Random byte tokens [rows, length]."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def spec_of(loaded: LoadedModel) -> BlockSpec:
    return loaded.adapter.spec(loaded.model.config)


def float_blocks(loaded: LoadedModel) -> list[DecoderBlock]:
    """Copies of a float model's blocks, to be changed."""
    return list(copy.deepcopy(loaded.model.blocks))


def block_inputs(model: CausalModel, ids: Tensor) -> BlockInputs:
    """What enters the first block for the tokens [B, T]."""
    places = torch.arange(ids.shape[1], device=model.device)[None]
    return BlockInputs(*model.decoder.enter(ids.to(model.device), places))


def watched(block: DecoderBlock, hidden: Tensor, rotary: Rotary, see: Any) -> Tensor:
    """Output of a block that shows its seven sites to `see`."""
    with block.slots.watch(see):
        return block(hidden, rotary)


@dataclass(frozen=True)
class Quantised:
    """A tiny model before and after, and what the pass reported."""

    base: LoadedModel
    loaded: LoadedModel
    outcomes: list[LayerOutcome]
    recipe: QuantRecipe

    @property
    def model(self) -> CausalModel:
        return self.loaded.model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.loaded.model.blocks


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
    model, outcomes, _ = quantize_layers(base.model, method(made.method), made, windows, **options)
    return Quantised(base, replace(base, model=model), outcomes, made)


@torch.inference_mode()
def in_steps(model: CausalModel, ids: Tensor, cache: KVCache | None = None, steps: tuple[int, ...] = (7, 3)) -> Tensor:
    """Logits [B, T, V] with a cache: first `steps` tokens at a time, the rest one by one."""
    decoder = model.decoder
    cache = decoder.new_cache() if cache is None else cache
    out, start = [], 0
    for size in [*steps, *[1] * (ids.shape[1] - sum(steps))]:
        out.append(decoder.head(decoder(ids[:, start : start + size], cache)))
        start += size
        assert cache.get_seq_length() == start and cache.nbytes > 0
    return torch.cat(out, dim=1)

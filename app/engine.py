"""The light functions of core that the page process calls itself, on plain arrays.

They are imported at their first call or by `warm`, so that the page can be built before any numerical library is loaded.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.shared import Derived
from core import catalogue, embedded_cards
from core.errors import QuantscopeError
from core.folders import state_of
from core.recipe import FLOAT_BITS, SCHEMES, Clusters, Overrides, QuantRecipe

ABLATIONS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "bitnet-ablations.json"
"""File of loss curves that `benchmarks/ablations.py` writes."""

log = logging.getLogger("quantscope.engine")
derived = Derived()


def warm() -> None:
    """Import what clustering channels needs and find the backends, so that the first visitor does not wait for either."""
    from core import recluster  # noqa: F401 - only the import is wanted

    examined()


def recluster(report: Any, site: str, clusters: Clusters, *, bits: int = 4) -> Any:
    """Cluster the channels of one observed site; recent clusterings are kept."""
    from core import recluster as compute

    return derived.get(report, ("clusters", site, clusters, bits), lambda: compute(report, site, clusters, bits=bits))


def error_curve(report: Any, site: str, *, bits: int = 4) -> Any:
    """Predict the error by cluster count; recent curves are kept."""
    from core import error_curve as compute

    return derived.get(report, ("curve", site, bits), lambda: compute(report, site, bits=bits))


def grid_noise(report: Any, view: Any) -> Any:
    """Predict the rounding noise of a clustering beside the power of the median token."""
    from core import grid_noise as compute

    return compute(report, view)


def channel_grid(name: str, detail: Any, ranges: dict[str, tuple[float, float]]) -> Any:
    """Return the levels of a grid over the values of a channel (ChannelDetail)."""
    from core.quant.levels import channel_grid as compute

    return compute(name, detail.low, detail.high, detail.mean_size, ranges)


def shape_of(name: str, *, allow_local: bool) -> Any:
    """Find the sizes of a model by name or numbers (`core.evaluation.shapes.model_shape`); recent ones are kept."""
    return _shape_of(name, allow_local, state_of(name) if allow_local else None)


@functools.lru_cache(maxsize=64)
def _shape_of(name: str, allow_local: bool, state: str | None) -> Any:
    from core.evaluation.shapes import model_shape

    return model_shape(name, allow_local=allow_local)


def shape_of_loaded(info: Any) -> Any:
    """Return the sizes of a loaded model, given its facts."""
    from core.evaluation.shapes import shape_of_loaded as read

    return read(info)


def decoder_bytes(info: Any, recipe: QuantRecipe) -> float:
    """Return the bytes of all layers' weight matrices at a recipe's bits, without scales."""
    from core.evaluation.memory import decoder_bytes as compute

    return compute(shape_of_loaded(info), recipe)


def budgets(info: Any, recipe: QuantRecipe, context: int) -> dict[str, int]:
    """Return what uniform schemes take with the cache of `context` tokens, and as "least" and "most" what 2 and 8 bits take."""
    from core.evaluation.memory import total_bytes

    shape, bits = shape_of_loaded(info), recipe.tensor_bits
    cached = ("k", "v") if max(bits.k, bits.v) < FLOAT_BITS else ()
    free = [*(("weights",) if bits.weights < FLOAT_BITS else ()), *cached]
    made = {name: replace(recipe, scheme=name, bits=None, overrides=Overrides()) for name in SCHEMES}
    made |= {end: recipe.with_bits(dict.fromkeys(free, own)) for end, own in (("least", 2), ("most", 8))}
    return {name: total_bytes(shape, own, context) for name, own in made.items()}


def recipe_bytes(info: Any, recipe: QuantRecipe) -> tuple[float, float]:
    """Return the bytes of a quantised model and those of its keys and values per token, by formula."""
    from core.evaluation.memory import recipe_bytes as compute

    return compute(shape_of_loaded(info), recipe)


def model_names() -> list[str]:
    """List the names of the catalogue."""
    return [entry.name for entry in catalogue()]


def first_model() -> str:
    """Return the model that the page opens with: an embedded one, in full precision if any; else the catalogue's last."""
    cards = embedded_cards()
    return next((name for name, card in cards.items() if card.get("mode") == "fp"), None) or next(iter(cards), model_names()[-1])


@functools.cache
def is_embedded(model: str) -> bool:
    """Say whether a model is part of the installation."""
    return model in embedded_cards()


def larger_model(model: str) -> str:
    """Return a larger model of the catalogue to try after an embedded one; "" for a model that is not embedded."""
    return next((name for name in reversed(model_names()) if not is_embedded(name)), "") if is_embedded(model) else ""


def download_bytes(model: str) -> int:
    """Return the bytes of a catalogue model's download; 0 for any other."""
    return next((entry.size_bytes for entry in catalogue() if entry.name == model), 0)


def ternary_model() -> str:
    """Return the name of an embedded BitNet model, a4.8 if there is one; "" if there is none."""
    modes = {name: card.get("mode", "fp") for name, card in embedded_cards().items()}
    ternary = [name for name, mode in modes.items() if mode != "fp"]
    return next((name for name in ternary if modes[name] == "a4.8"), next(iter(ternary), ""))


@functools.cache
def versions() -> str:
    """Say in one line which versions run and whether they are tested."""
    from core.doctor import summary

    try:
        return summary()
    except QuantscopeError as error:
        return str(error)


@functools.cache
def examined() -> Any:
    """Return the report of `python -m app.cli doctor` on this process; None where no tested range is known. Imports torch."""
    from core.doctor import examine

    try:
        return examine()
    except QuantscopeError as error:
        log.warning("the versions are not examined: %s", error)
        return None


def training_runs() -> list[dict[str, Any]]:
    """Return the cards of embedded models that hold their training: name, mode, curve, config."""
    return [card for card in embedded_cards().values() if card.get("curve") and isinstance(card.get("config"), dict)]


def ablation_runs(path: Path = ABLATIONS) -> list[dict[str, Any]]:
    """Return the training runs of the ablation charts; none if the file is missing or unreadable."""
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the ablation curves are not shown: %s", error)
        return []

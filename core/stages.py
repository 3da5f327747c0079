"""The stages as functions of a loaded model: observe, quantise, distil, evaluate. Nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from core.bits import kind_of
from core.calibration.data import TextSource, calibration_tokens, fit_window
from core.calibration.observe import observe_layers
from core.calibration.report import RangesReport, SiteRanges, TokenPeaks
from core.calibration.states import KeptStates
from core.distill.loop import distill_model, distill_seconds
from core.distill.texts import DistillTexts, distill_texts
from core.errors import ModelError
from core.evaluation.describe import LayerRecord, model_info, quantize_report, set_backend
from core.evaluation.eval_report import counted_windows, eval_report, footprint_of
from core.evaluation.memory import module_bytes
from core.evaluation.perplexity import Reference, score
from core.evaluation.run_estimate import Timing, estimate_run, time_layer
from core.evaluation.run_report import RunEstimate
from core.evaluation.shapes import shape_of_loaded
from core.methods import method
from core.methods.rotation.bases import observe_bases, token_peaks
from core.methods.sequential import quantize_layers
from core.models.decoder import CausalModel
from core.models.export.fit import loads_in
from core.models.io.quantized import already_quantized
from core.models.loaded import LoadedModel
from core.options import BASES
from core.privacy import text_record
from core.progress import Progress, part, silent
from core.quant.ranges import ChannelRanges, channel_ema
from core.recipe import SITES, Calibration, QuantRecipe
from core.report import EvalReport, QuantizeReport

DISTILL_TIME = 0.7
"""Share of a run's time that its distillation is expected to take."""


def observe(
    loaded: LoadedModel,
    calibration: Calibration,
    *,
    seed: int = 0,
    allow_local: bool = True,
    states: KeptStates | None = None,
    progress: Progress = silent,
) -> RangesReport:
    """Measure the exact range of every channel of every site, and its moving average; original order, q scaled by E**-0.5.

    Args:
        states: where the hidden states that enter the layers are kept, for `channel_detail`.
    Raises: NumericError naming a site with NaN or infinity; TextError for an unusable text; ModelError for a quantised model.
    """
    require_float(loaded, "inspect")
    start = time.perf_counter()
    tokens, source = calibration_tokens(loaded, calibration, seed, allow_local)
    sites: dict[str, SiteRanges] = {}
    for layer, ranges in enumerate(observe_layers(loaded.model, tokens, states=states, progress=progress)):
        sites |= _site_ranges(loaded, layer, ranges)
    return _ranges_report(loaded, calibration, tokens, source, sites, time.perf_counter() - start)


def observe_in_bases(
    loaded: LoadedModel,
    calibration: Calibration,
    *,
    seed: int = 0,
    allow_local: bool = True,
    progress: Progress = silent,
) -> dict[str, RangesReport]:
    """Measure ranges as `observe` does, and the size of tokens, in every basis of `core.options.BASES`. Raises: as `observe`."""
    require_float(loaded, "inspect")
    loaded.require_dense("shown in other bases")
    start = time.perf_counter()
    tokens, source = calibration_tokens(loaded, calibration, seed, allow_local)
    sites: dict[str, dict[str, SiteRanges]] = {name: {} for name in BASES}
    peaks: dict[str, dict[str, TokenPeaks]] = {name: {} for name in BASES}
    for layer, recorders in enumerate(observe_bases(loaded.model, tokens, progress=progress)):
        for name, seen in recorders.items():
            sites[name] |= _site_ranges(loaded, layer, seen.recorder.ranges())
            peaks[name] |= {f"layers.{layer}.{kind}": token_peaks(loaded, tokens, seen, kind) for kind in SITES}
    seconds = time.perf_counter() - start
    plain = {name: _ranges_report(loaded, calibration, tokens, source, found, seconds) for name, found in sites.items()}
    return {name: replace(report, basis=name, peaks=peaks[name]) for name, report in plain.items()}


def _site_ranges(loaded: LoadedModel, layer: int, ranges: Mapping[str, ChannelRanges]) -> dict[str, SiteRanges]:
    """Return the ranges of a layer's sites by name, without the sampled rows, which are large; experts stand side by side."""
    spec, sites = loaded.model.blocks[layer].spec, {}
    for kind in SITES:
        block = spec.head_dim if kind in ("q", "k", "v", "o_in") else spec.width(kind)
        own = [ranges.get(site) for site in spec.sites if kind_of(site) == kind]
        none = [torch.zeros(spec.width(kind))] * 4  # an expert that no token was sent to
        bounds = [none if found is None else (found.low, found.high, *channel_ema(found)) for found in own]
        name = f"layers.{layer}.{kind}"
        arrays = [torch.cat(parts).numpy() for parts in zip(*bounds, strict=True)]
        sites[name] = SiteRanges(name, layer, kind, *arrays[:2], block, *arrays[2:])
    return sites


def _ranges_report(
    loaded: LoadedModel,
    calibration: Calibration,
    tokens: Tensor,
    source: TextSource,
    sites: dict[str, SiteRanges],
    seconds: float,
) -> RangesReport:
    return RangesReport(
        loaded.name,
        loaded.revision,
        asdict(calibration) | {"text": text_record(calibration.text)},
        source.name,
        tokens.numel(),
        tokens.shape[1],
        seconds,
        str(loaded.model.device),
        loaded.adapter.spec(loaded.model.config).groups,
        sites,
    )


def estimate(
    base: LoadedModel, recipe: QuantRecipe, *, tokens: int = 2048, window: int = 512, allow_local: bool = True
) -> RunEstimate:
    """Estimate what `quantize` takes on this machine, and measuring its result on so many tokens; one layer is timed."""
    require_float(base, "quantise")
    recipe.overrides.require_layers(len(base.model.blocks))
    windows, _ = calibration_tokens(base, recipe.calibration, recipe.seed, allow_local)
    return run_estimate(base, recipe, time_layer(base.model, recipe, windows), windows, tokens=tokens, window=window)


def run_estimate(
    base: LoadedModel, recipe: QuantRecipe, timing: Timing, windows: Tensor, *, tokens: int, window: int
) -> RunEstimate:
    """Estimate a run from what one layer took. Args: windows: [S, T] of the calibration. Others: as `estimate`."""
    window, shape = fit_window(base, window), shape_of_loaded(model_info(base, 0.0))
    found = estimate_run(shape, recipe, timing, tuple(windows.shape), (max(1, tokens // window), window))
    if recipe.distill is None:
        return found
    seconds = distill_seconds(recipe.distill, timing, shape.layers, windows.shape[1])
    return replace(found, stages=found.stages | {"distil": seconds}, seconds=found.seconds + seconds)


def quantize(
    base: LoadedModel,
    recipe: QuantRecipe,
    *,
    allow_local: bool = True,
    state: Path | None = None,
    progress: Progress = silent,
) -> tuple[LoadedModel, QuantizeReport]:
    """Quantise a float model by recipe; `base` is not changed and shares its embeddings with the result.

    Args: state: as in `distill_model`, where the recipe asks for a distillation.
    """
    require_float(base, "quantise")
    recipe.overrides.require_layers(len(base.model.blocks))
    if recipe.distill is not None:
        texts = distill_texts(base, recipe, allow_local)  # an unusable text is refused before the work
        first = part(progress, 0.0, 1 - DISTILL_TIME)
        made, report = quantize(base, replace(recipe, distill=None), allow_local=allow_local, progress=first)
        return distill(base, made, report, recipe, texts, state=state, progress=part(progress, 1 - DISTILL_TIME, 1.0))
    start = time.perf_counter()
    tokens, source = calibration_tokens(base, recipe.calibration, recipe.seed, allow_local)
    model, outcomes, stages = quantize_layers(base.model, method(recipe.method), recipe, tokens, progress=progress)
    layers = list(map(LayerRecord.of, map(module_bytes, base.model.blocks), model.blocks, outcomes))
    calibration, seconds = described_windows(tokens, source, recipe.seed), time.perf_counter() - start
    report = quantize_report(base, recipe, layers, calibration=calibration, stages=stages, seconds=seconds)
    made = made_from(base, model, report.label)
    return made, replace(report, loads=loads_in(made))


def made_from(base: LoadedModel, model: CausalModel, label: str) -> LoadedModel:
    """Label a quantised model, and name the model it was made from."""
    return replace(base, model=model, source=f"Quantised by Quantscope from {base.name}. {base.source}", path=None, label=label)


def distill(
    base: LoadedModel,
    quantized: LoadedModel,
    report: QuantizeReport,
    recipe: QuantRecipe,
    texts: DistillTexts,
    *,
    state: Path | None = None,
    progress: Progress = silent,
) -> tuple[LoadedModel, QuantizeReport]:
    """Train a quantised model towards the float one as a recipe's distillation says, and describe the result.

    Args:
        quantized, report: what `quantize` gives for the recipe without its distillation; not changed.
        texts: of `distill_texts`. state: as in `distill_model`.
    Returns: the model and its report. Where the training was stopped, their recipe has as many steps as were judged, or no
        distillation where none was.
    """
    model, found = distill_model(base.model, quantized.model, recipe.distill, texts, state=state, progress=progress)
    if not found.steps:
        return quantized, report
    recipe = replace(recipe, distill=replace(recipe.distill, steps=found.steps))
    loaded = replace(quantized, model=model, label=recipe.label())
    return loaded, replace(
        report,
        key=recipe.hash,
        recipe=recipe.to_record(),
        label=recipe.label(),
        seconds=report.seconds + found.seconds,
        stages=report.stages | {"distil": found.seconds},
        folder="",
        distilled=found,
    )


def evaluate(
    loaded: LoadedModel,
    parts: Tensor,
    source: TextSource,
    *,
    reference: Reference | None = None,
    backend: str = "auto",
    progress: Progress = silent,
    key: str | None = None,
) -> EvalReport:
    """Measure a model on windows [S, T] of a text (`evaluation_windows`): scores, bytes, speed.

    Args:
        source: the text that `parts` were cut from.
        reference: a model that ran on the same windows, to compare with.
        backend: implementation of the quantised linear layers, "auto" or a name of `kernels.Backend`.
        key: name of the model in the report; None for its own.
    Raises: NumericError if the loss is not finite; BackendError for a backend that cannot run here.
    """
    set_backend(loaded, backend)
    scores = score(loaded.model, parts, reference=reference, progress=progress)
    return eval_report(loaded, parts, source, scores, footprint_of(loaded), reference=reference, key=key)


def require_float(loaded: LoadedModel, verb: str) -> None:
    """Check that a model is not quantised yet. Raises: ModelError E-MODEL-QUANTIZED, whose remedy opens with `verb`."""
    if already_quantized(loaded.model):
        raise ModelError(f"This model is already quantised: {verb} the float model it came from.", code="E-MODEL-QUANTIZED")


def described_windows(tokens: Tensor, source: TextSource, seed: int) -> str:
    """Describe calibration windows [S, T] that were drawn from a text by a seed."""
    count, window = tokens.shape
    return f"{tokens.numel():,} tokens of {source.name} in {counted_windows(count)} of {window}, seed {seed}"

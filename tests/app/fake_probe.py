"""The fake workbench's answers about costs: a prediction, and measurements that are twice as high."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from core.calibration.report import RangesReport, SiteRanges, TokenExtreme, TokenPeaks
from core.evaluation.run_report import RunEstimate
from core.probe.report import (
    Allocation,
    CalibrationPair,
    CostCurve,
    GroupCount,
    Measurement,
    MovedReport,
    Prediction,
    ProbeInfo,
    ProbeText,
    SiteMove,
    SiteShift,
    Uniform,
)
from core.recipe import SITES, Calibration, Overrides, QuantRecipe
from tests.app.fake_behaviour import Progress, check_text, misbehave


class FakeProbe:
    """Answers what bits and clusters cost."""

    def bases(
        self, model: str, calibration: Calibration, *, revision: str | None = None, owner: str | None = None, progress: Progress
    ) -> dict[str, RangesReport]:
        """Scaled: half the decades between channels; rotated: none. In MLP hidden of layer 1 the first token stays massive."""
        plain = self.observe(model, calibration, revision=revision, progress=progress)
        found = {}
        for name, power in (("original", 1.0), ("scaled", 0.5), ("rotated", 0.05)):
            sites = {
                key: replace(site, **{end: (np.sign(x) * np.abs(x) ** power).astype(np.float32) for end, x in vars(site).items()
                                      if end in ("low", "high", "ema_low", "ema_high")})
                for key, site in plain.sites.items()
            }  # fmt: skip
            peaks = {key: self.peaks(site, calibration.tokens, key == "layers.1.down_in") for key, site in sites.items()}
            found[name] = replace(plain, sites=sites, basis=name, peaks=peaks)
        return found

    def peaks(self, site: SiteRanges, tokens: int, massive: bool) -> TokenPeaks:
        """Five tokens, the first of them 300 times as large as the median one where it is massive, else twice."""
        sizes = [300.0 if massive else 2.0, *(1.5 - 0.1 * i for i in range(4))]
        shown = [TokenExtreme(size, f" <b>{i}", "the state", " of it", 7 * i) for i, size in enumerate(sizes)]
        return TokenPeaks(tokens, 1.0, 0.1, int(massive), shown)

    def moved(
        self, key: str, recipe: QuantRecipe, *, text: str, tokens: int, place: int, owner: str | None = None, progress: Progress
    ) -> MovedReport:
        """MLP hidden of layer 1 moved most, by as many hundredths as the token's place; a rotated run knows what came in only."""
        misbehave(recipe.model, progress)
        for step in range(20 if recipe.model == "fake-slow" else 1):
            progress(f"Layer {step + 1} of 20", step / 20)
            time.sleep(0.1 if recipe.model == "fake-slow" else 0)
        known = recipe.method != "rotation"
        places = [(1, "down_in"), *((layer, site) for layer in (2, 3) for site in SITES)]
        channels = ((344, 12.3, 9.1), (7, 1.0, -2.0))
        sites = [
            SiteMove(layer, site, 0.01 * place / (1 + i) if known else None, 0.002, 0.001 * (i == 3), channels)
            for i, (layer, site) in enumerate(places)
        ]
        return MovedReport(key, recipe.model, text, place, f"<i>{place} ", f"<i>{place - 1} ", tuple(sites))

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

    def estimate(self, recipe: QuantRecipe, *, tokens: int, window: int, owner: str, progress: Progress) -> RunEstimate:
        """Twelve seconds and a gigabyte; more memory than is free at two bits."""
        misbehave(recipe.model, progress)
        stages = {"observe": 4.0, "cluster and plan": 1.0, "weights": 5.0, "propagate": 2.0}
        return RunEstimate(
            stages=stages,
            seconds=12.0,
            compare_seconds=3.0,
            original_seconds=1.0,
            tokens=recipe.calibration.tokens,
            compared=tokens,
            memory_bytes=700_000_000,
            added_bytes=200_000_000,
            measuring_bytes=300_000_000,
            free_bytes=100_000_000 if recipe.tensor_bits.weights == 2 else 8_000_000_000,
            model_bytes=int(538_060_032 * recipe.tensor_bits.weights / 32),
            packed_bytes=53_000_000,
            kv_bytes_per_token=1152,
            timing_seconds=0.3,
        )

    def swap(self, recipe: QuantRecipe, layer: int, cell: str | None, *, owner: str, progress: Progress) -> Measurement:
        """What is predicted; nothing for the control."""
        cells = self.predict(recipe, owner=owner, progress=progress).cells
        return Measurement(cells[f"layers.{layer}.{cell}"] if cell else 0.0, None, 0.9, 0.0001, 0.1)

    def allocate(
        self,
        recipe: QuantRecipe,
        *,
        budget: float | None = None,
        bound: float | None = None,
        context: int,
        activations: bool,
        owner: str,
        progress: Progress,
    ) -> Allocation:
        """Three to five bits by layer; with `activations`, 8 bits for the part that costs most."""
        misbehave(recipe.model, progress)
        bits = {f"layers.{i}.{cell}": 3 + i % 3 for i in range(6) for cell in ("qkv", "o", "up", "down", "k", "v")}
        own = ",".join(f"layers.{i}.weights={3 + i % 3},layers.{i}.k={3 + i % 3},layers.{i}.v={3 + i % 3}" for i in range(6))
        own += ",layers.1.down_in=8" if activations else ""
        overrides = replace(recipe, overrides=Overrides.parse(own)).overrides.to_dict()
        rival, size = Uniform(4, 4, 240_000_000, 0.05), int(budget or 200_000_000)
        return Allocation(overrides, bits, 0.04, size, context, budget, bound, (rival,), rival)

    def smallest_g(self, recipe: QuantRecipe, *, within: float, owner: str, progress: Progress) -> GroupCount:
        """Eleven, whatever is asked."""
        return GroupCount(11, 0.0525, 0.05, within)

    def curve(
        self, recipe: QuantRecipe, site: str, layer: int | None, *, owner: str | None = None, progress: Progress
    ) -> CostCurve:
        """A cost that halves with every doubling up to g = 8, six times as high in all layers; equal groups cost twice that."""
        misbehave(recipe.model, progress)
        layers, bits = (layer,) if layer is not None else tuple(range(6)), recipe.tensor_bits.site(site)
        counts = tuple(2**i for i in range(7 if site in ("q", "k", "v", "o_in") else 9))
        kmeans = tuple(len(layers) * 4.0 ** (4 - bits) * (0.08 / min(g, 8) + 0.001) for g in counts)
        equal = tuple(2 * cost for cost in kmeans)
        return CostCurve(site, layers, bits, counts, kmeans, equal, 2 * kmeans[0], kmeans[-1], 8, 0.0001)

    def calibrations(
        self, recipe: QuantRecipe, other: Calibration, *, text: ProbeText, owner: str, progress: Progress
    ) -> CalibrationPair:
        """Ranges twice as wide in one channel of eight, and a cost of half as much again; layer 2 differs most."""
        check_text(other)
        sites = {}
        for layer in range(6):
            for kind in SITES:
                widths = np.random.default_rng(layer).lognormal(0, 1, (2, 64)).astype(np.float32)
                widths[1] = widths[0] * np.where(np.arange(64) % 8 == 0, 2, 1)
                sites[f"layers.{layer}.{kind}"] = SiteShift(widths, 32 if layer == 2 else 8, 0.2 if layer == 2 else 0.7)
        a = self.predict(recipe, owner=owner, progress=progress)
        b = Prediction(a.cells, 1.5 * a.total, (), (), 0.0001, 0.01)
        measured = tuple(Measurement(2 * found.total, 0.001, 0.9, 0.0001, 0.1) for found in (a, b))
        names = tuple("pasted text" if c.text.startswith("text:") else c.text for c in (recipe.calibration, other))
        tokens = (recipe.calibration.tokens, other.tokens)
        return CalibrationPair(names, tokens, text.text, text.tokens, sites, (a, b), measured)

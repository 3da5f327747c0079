"""A stand-in for core's workbench: same calls, made-up reports, no model. Drives the page and its tests in seconds.

Model names decide how it behaves: "fake" works at once; "fake-slow" takes a tenth of a second per layer, 1.5 s to quantise it;
"fake-endless" never ends and ignores Stop; "fake-memory", "fake-exit", "fake-killed", "fake-bug" fail in their way;
"fake-says …" writes what is no message to the page;
"fake-wide" has 4096 channels; "fake-single" has one layer; a folder that `quantize` wrote is a quantised model;
"fake-ternary" is a BitNet model of another vocabulary; anything else is not found.
"""

from __future__ import annotations

import math
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from core.cache import cache_root
from core.calibration.report import ChannelDetail, RangesReport, SiteRanges, TokenExtreme
from core.errors import ModelError
from core.evaluation.token_report import ConfidenceGroup, TokenDivergence, TokensReport
from core.models.io.bundle import unpack
from core.recipe import SITES, Calibration, QuantRecipe
from core.report import (
    BackendUse,
    EvalReport,
    GenerationReport,
    LayerReport,
    ModelInfo,
    QuantizeReport,
    SiteError,
    SpeedLimit,
    WeightError,
)
from core.storage import atomic_dir
from tests.app.fake_behaviour import NAMES, SAYINGS, TERNARY, Progress, check_text, fidelity_of, is_saved, misbehave
from tests.app.fake_probe import FakeProbe
from tests.app.fake_ternary import FakeTernary


class FakeWorkbench(FakeProbe, FakeTernary):
    """Answers every call of the workbench with plausible numbers."""

    def __init__(self, *, allow_local: bool = True, max_bytes: int = 0, device: str = "cpu") -> None:
        self.recipes: dict[str, QuantRecipe] = {}
        self.owners: dict[str, str | None] = {}
        self.rested = False

    def load(self, model: str, *, revision: str | None = None, owner: str | None = None, progress: Progress) -> ModelInfo:
        """Shape of a small Llama."""
        if model not in NAMES and not is_saved(model) and model.removeprefix("fake-says ") not in SAYINGS:
            raise ModelError(
                f"No model is called {model[:60]!r}. Use a name from the list or a Hub id such as owner/name.",
                code="E-MODEL-NAME",
            )
        misbehave(model, progress)
        wide = model == "fake-wide"
        hidden, ffn = (4096, 11008) if wide else (576, 1536)
        return ModelInfo(
            model,
            None,
            "made up for tests",
            "llama",
            134_515_008,
            1 if model == "fake-single" else 6,
            hidden,
            9,
            3,
            64,
            ffn,
            4096 if model == TERNARY else 49152,
            2048,
            538_060_032,
            "float32",
            0.2,
            "trained a4.8" if model == TERNARY else None,
        )

    def observe(
        self, model: str, calibration: Calibration, *, revision: str | None = None, owner: str | None = None, progress: Progress
    ) -> RangesReport:
        """Ranges with a few outlier channels, the same for the same arguments."""
        info = self.load(model, revision=revision, progress=progress)
        check_text(calibration)
        if is_saved(model):
            raise ModelError("This model is already quantised: inspect the float model it came from.", code="E-MODEL-QUANTIZED")
        sites = {}
        for layer in range(info.layers):
            progress(f"Layer {layer + 1} of {info.layers}: observing", layer / info.layers)
            time.sleep(0.1 if model == "fake-slow" else 0.005)
            for kind in SITES:
                sites[f"layers.{layer}.{kind}"] = site_ranges(info, layer, kind)
        name = "your text" if calibration.text.startswith("text:") else calibration.text
        return RangesReport(
            model, revision, asdict(calibration), name, calibration.tokens, calibration.window, 0.7, "cpu", 3, sites
        )

    def channel(
        self,
        model: str,
        calibration: Calibration,
        site: str,
        channel: int,
        *,
        basis: str = "original",
        revision: str | None = None,
        owner: str | None = None,
        progress: Progress,
    ) -> ChannelDetail:
        """A bell-shaped histogram and five tokens per side."""
        progress("Looking for the tokens behind the extremes", 0.5)
        ranges = self.bases(model, calibration, progress=lambda *_: None)[basis].sites[site]
        low, high = float(ranges.low[channel]), float(ranges.high[channel])
        edges = np.linspace(low, high, 41)
        middle = (edges[:-1] + edges[1:]) / 2
        counts = 1000 * np.exp(-0.5 * ((middle - middle.mean()) / (high - low) * 8) ** 2)
        extremes = [
            TokenExtreme(high * (1 - 0.1 * i), " <b>nation</b>", "the state of the", " and of its", 17 * i) for i in range(5)
        ]
        extremes += [TokenExtreme(low * (1 - 0.1 * i), ",", "Mr. Speaker", " fellow citizens", 31 * i) for i in range(5)]
        return ChannelDetail(
            site,
            channel,
            low,
            high,
            (low + high) / 2,
            (high - low) / 8,
            (high - low) / 10,
            [int(c) for c in counts],
            [float(e) for e in edges],
            extremes,
        )

    def quantize(self, recipe: QuantRecipe, *, owner: str | None = None, progress: Progress) -> QuantizeReport:
        """Numbers that get worse with fewer bits."""
        info = self.load(recipe.model, progress=progress)
        check_text(recipe.calibration)
        for layer in range(info.layers):
            progress(f"Layer {layer + 1} of {info.layers}: {recipe.weights.upper()}", layer / info.layers)
            time.sleep(1.5 if recipe.model == "fake-slow" else 0.03)
        self.recipes[recipe.hash], self.owners[recipe.hash] = recipe, owner
        bits = recipe.tensor_bits
        layers = [
            LayerReport(
                i,
                math.inf if recipe.model == TERNARY else 6.0 * bits.weights - i * 0.4,
                {k: SiteError(bits.site(k), 32, 6.0 * min(bits.site(k), 12) - i * 0.3) for k in SITES if bits.site(k) < 16},
                {
                    "down_proj": WeightError(
                        bits.weights,
                        recipe.weights,
                        20.0,
                        "The Hessian was singular: rounded to nearest instead." if i == 2 else None,
                        bits.weights + 0.13,
                    )
                },
            )
            for i in range(info.layers)
        ]
        report = QuantizeReport(
            recipe.hash,
            recipe.to_dict(),
            recipe.label() + fidelity_of(recipe),
            recipe.describe_bits(),
            4.2,
            {"calibration": 1.2, "weights": 2.5, "activations": 0.5},
            "made up",
            bits.weights + 0.13,
            int(538_060_032 * bits.weights / 32),
            538_060_032,
            layers,
            [BackendUse("reference", "no CUDA device", 42)],
            str(Path(new_folder()) / recipe.hash),
            loads={"vLLM": "no, because it is made up", "transformers": "yes, as transformers"},
        )
        with atomic_dir(report.folder) as stage:
            (stage / "weights.bin").write_bytes(bytes(100_000))
            (stage / "report.pickle").write_bytes(pickle.dumps(report))
        return report

    def forget(self, owner: str, *, progress: Progress) -> None:
        """Forget what was made from the owner's pasted texts."""
        for key in [key for key, other in self.owners.items() if other == owner]:
            if self.recipes[key].calibration.text.startswith("text:"):
                del self.owners[key], self.recipes[key]

    def rest(self) -> None:
        """Say that memory is given back."""
        self.rested = True

    def open_saved(
        self, *, folder: str = "", archive: str = "", owner: str | None = None, progress: Progress
    ) -> QuantizeReport:
        """The report of a folder that `quantize` wrote, or of a zip file of one."""
        if archive:
            folder = new_folder()
            unpack(archive, folder)
        if not is_saved(folder):
            raise ModelError("No quantised model is there: name a folder that Quantise saved.", code="E-MODEL-NAME")
        report = pickle.loads((Path(folder) / "report.pickle").read_bytes())
        self.recipes[report.key] = self.recipes[folder] = QuantRecipe.from_dict(report.recipe)
        return replace(report, key=report.key if archive else folder, folder=folder)

    def evaluate(
        self,
        key: str,
        *,
        text: str = "sotu",
        tokens: int = 2048,
        window: int = 512,
        reference: str | None = None,
        revision: str | None = None,
        reference_revision: str | None = None,
        owner: str | None = None,
        progress: Progress,
    ) -> EvalReport:
        """Perplexity 17.6 for the base model, more for the others."""
        recipe = self.recipes.get(key)
        for i in range(4):
            progress(f"Window {i + 1} of 4", i / 4)
            time.sleep(0.02)
        bits = recipe.tensor_bits.weights if recipe else 16
        ppl = 17.6 * (1 + (16 - bits) ** 2 / 2000)
        parts = (
            {
                "packed weights": 53_000_000 * bits // 4,
                "scales and zero points": 1_700_000,
                "embeddings and head (float)": 113_000_000,
                "norms, biases and orders": 141_000,
            }
            if recipe
            else {
                "decoder weights (float)": 424_000_000,
                "embeddings and head (float)": 113_000_000,
                "norms, biases and orders": 141_000,
            }
        )
        return EvalReport(
            key=key,
            label=recipe.label() if recipe else key,
            text_name=text,
            perplexity=ppl * (0.9 if tokens > 2048 else 1),
            perplexity_stderr=0.4,
            nll=float(np.log(ppl)),
            window_nll=[float(np.log(ppl)) + d for d in (-0.05, 0.02, 0.03)],
            windows_id=f"{text[:20]}-{tokens}-{window}",
            reference=reference,
            ln_ratio=math.log(1 + (16 - bits) ** 2 / 2000) if reference else None,
            ln_ratio_stderr=0.004 if reference else None,
            kld_stderr=0.001 if reference else None,
            kld_quantiles={"50": 0.01, "99": 0.3, "99.9": 0.7, "100": 1.2} if reference else None,
            delta_p_mean=-0.012 if reference else None,
            delta_p_stderr=0.0021 if reference else None,
            delta_p_rms=0.054 if reference else None,
            delta_p_rms_stderr=0.0013 if reference else None,
            same_top_stderr=0.003 if reference else None,
            tokens=tokens,
            window=window,
            kld_mean=0.003 * (16 - bits) if reference else None,
            same_top_token=1 - 0.01 * (16 - bits) if reference else None,
            weight_bytes=sum(parts.values()),
            weight_parts=parts,
            working_bytes=0,
            kv_bytes_per_token=int(2 * 6 * 192 * (bits / 8 if recipe else 4)),
            tokens_per_second=210.0,
            seconds=1.9,
            device="cpu",
            dtype="float32",
            backend="reference",
            protocol=f"{tokens // window} non-overlapping windows of {window} tokens of {text}; mean next-token loss over "
            f"{window - 1} targets each, exponentiated; ± is the standard error over windows; "
            "float32 on cpu, one window at a time",
        )

    def generate(
        self,
        key: str,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool = False,
        on_text: Callable[[str], None],
        owner: str | None = None,
        progress: Progress,
    ) -> GenerationReport:
        """Counts aloud."""
        words = tuple(f" {key[:4]}-{i}" for i in range(max_new_tokens))
        for i, word in enumerate(words):
            on_text(word)
            progress(f"Token {i + 1}", (i + 1) / max_new_tokens)
            time.sleep(0.01)
        sizes = (55_296, 221_184)
        return GenerationReport(
            key, "".join(words), 7, max_new_tokens, 0.01 * max_new_tokens, 100.0, "length", *sizes, pieces=words
        )

    def speed_limit(self, key: str, *, owner: str | None = None, progress: Progress) -> SpeedLimit:
        """A quarter of the measured speed is reached."""
        return SpeedLimit(key, 100_000_000, 40.0e9 + 400 * 55_296, 2)

    def tokens(
        self, key: str, reference: str, *, reference_revision: None = None, text: str, tokens: int, owner: str, progress: Progress
    ) -> TokensReport:
        """Two words over and over, each predicted a little worse than the one before; every fifth flips; HTML among them."""
        best = (("yes", 0.6), ("<b>no</b>", 0.2))
        shown = [
            TokenDivergence(f"<i>{i} ", 0.01 * i if i else None, 0.5, 0.6, best[:: -1 if i % 5 == 0 else 1], best, i % 5 == 0)
            for i in range(tokens)
        ]
        return TokensReport(key, reference, text, tuple(shown), (ConfidenceGroup(0.6, 0.8, tokens - 1, 0.3, 0.2),), 0.3)



def new_folder() -> str:
    """An empty folder in the cache, which the tests' fixture removes."""
    cache_root().mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(dir=cache_root())


def site_ranges(info: ModelInfo, layer: int, kind: str) -> SiteRanges:
    """Log-normal widths, one channel in two hundred an outlier."""
    attention = info.heads * info.head_dim
    widths = {"q": attention, "k": 192, "v": 192, "o_in": attention, "down_in": info.ffn}
    width = widths.get(kind, info.hidden)
    draw = np.random.default_rng(layer * 10 + SITES.index(kind))
    scale = np.exp(draw.normal(0, 0.6, width)) * (1 + 0.2 * layer)
    scale[draw.random(width) < 0.005] *= 25
    high = (scale * draw.uniform(0.5, 1.0, width)).astype(np.float32)
    low = (-scale * draw.uniform(0.3, 1.0, width)).astype(np.float32)
    block = info.head_dim if kind in ("q", "k", "v", "o_in") else width
    return SiteRanges(f"layers.{layer}.{kind}", layer, kind, low, high, block, 0.7 * low, 0.8 * high)

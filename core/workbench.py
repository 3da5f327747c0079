"""The order of the stages, in one place: load, observe, quantise, evaluate, generate.

The page's worker, the CLI and `run` call it. A `Workbench` keeps models under an LRU by bytes and hands out plain reports.
Quantised models are also saved in the cache folder under their recipe's hash, so a worker that was killed finds them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from core.calibration.channel import channel_detail
from core.calibration.data import TextSource, calibration_tokens, resolve_text
from core.calibration.report import ChannelDetail, RangesReport
from core.checks import require_int
from core.errors import ArtifactError, InputError, ResourceError
from core.evaluation import sparsity
from core.evaluation.describe import model_info, report_from_dict, set_backend
from core.evaluation.generate import generate
from core.evaluation.memory import measured_parts, working_bytes
from core.evaluation.perplexity import hidden_windows
from core.evaluation.speed import speed_limit
from core.evaluation.windows import MAX_TOKENS, evaluation_windows
from core.models.io.load import LoadedModel, context_of, load_model, prefix_ids
from core.models.io.quantized import find_saved, load_quantized, read_description, save_quantized, weights_id
from core.progress import Progress, silent
from core.provenance import provenance
from core.recipe import Calibration, QuantRecipe
from core.report import EvalReport, GenerationReport, ModelInfo, QuantizeReport, Row, SpeedLimit
from core.stages import evaluate, observe, quantize, require_float
from core.storage import MANIFEST, cache_root

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = 3 * 2**30
REFERENCE_SHARE = 1 / 4
"""Hidden states of reference models may take this share of the models' bytes beside them."""


class Workbench:
    """Models by key, and every stage as a method that returns a report.

    A key is a model name as `load_model` takes it, or the hash of a recipe that `quantize` returned.

    Args:
        max_bytes: models beyond this are dropped, least recently used first (the one in use stays); what is kept of
            reference models comes on top (`REFERENCE_SHARE`).
        allow_local: whether local paths may be typed as models and texts; off on a public server.
        device: where models run, "cpu" or "cuda" ("cuda:1").
    """

    def __init__(self, *, max_bytes: int = DEFAULT_BUDGET, allow_local: bool = True, device: str = "cpu") -> None:
        self.max_bytes, self.allow_local, self.device = max_bytes, allow_local, device
        self._models: OrderedDict[tuple[str, str | None], LoadedModel] = OrderedDict()
        self._stamps: dict[tuple[str, str | None], int | None] = {}
        self._references: OrderedDict[tuple[Any, ...], list[Tensor]] = OrderedDict()

    def load(self, model: str, *, revision: str | None = None, progress: Progress = silent) -> ModelInfo:
        """Load a model, or say what is already loaded."""
        start = time.perf_counter()
        return model_info(self._get(model, revision, progress), time.perf_counter() - start)

    def observe(
        self, model: str, calibration: Calibration, *, revision: str | None = None, seed: int = 0, progress: Progress = silent
    ) -> RangesReport:
        """Exact per-channel ranges of the seven sites of every layer."""
        loaded = self._get(model, revision, progress)
        return observe(loaded, calibration, seed=seed, allow_local=self.allow_local, progress=progress)

    def channel(
        self,
        model: str,
        calibration: Calibration,
        site: str,
        channel: int,
        *,
        revision: str | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> ChannelDetail:
        """Histogram and extreme tokens of one channel."""
        loaded = self._get(model, revision, progress)
        require_float(loaded, "inspect")
        tokens, _ = calibration_tokens(loaded, calibration, seed, self.allow_local)
        return channel_detail(loaded, tokens, site, channel, progress=progress)

    def quantize(self, recipe: QuantRecipe, *, progress: Progress = silent) -> QuantizeReport:
        """Quantise by recipe, keep and save the result, and describe it. An equal recipe already saved is only loaded."""
        base = self._get(recipe.model, recipe.revision, progress)
        source = resolve_text(recipe.calibration.text, split="calibration", allow_local=self.allow_local)
        folder = cache_root() / "quantized" / f"{recipe.hash}-{source.sha256[:8]}-{weights_id(base)}"
        if (folder / MANIFEST).exists():
            try:
                report = report_from_dict(read_description(folder)["report"])
                self._remember((recipe.hash, None), replace(self._load_saved(folder, progress), name=recipe.hash))
                with contextlib.suppress(OSError):
                    os.utime(folder / MANIFEST)  # of several folders of this recipe, this is the one `find_saved` means now
                return report
            except (ArtifactError, KeyError, TypeError):
                logger.warning("the saved model %s is damaged or of another version: quantising again", folder.name)
        quantized, report = quantize(base, recipe, allow_local=self.allow_local, progress=progress)
        progress("Saving the quantised model", None)
        self._remember((recipe.hash, None), replace(quantized, name=recipe.hash))
        saved = replace(report, folder=str(folder))
        try:
            save_quantized(folder, quantized, {"recipe": recipe.to_dict(), "report": saved.to_dict()}, replace=True)
        except ResourceError as error:
            logger.warning("the quantised model stays in memory only: %s", error)
            return report
        return saved

    def evaluate(
        self,
        key: str,
        *,
        revision: str | None = None,
        text: str = "sotu",
        tokens: int = 2048,
        window: int = 512,
        reference: str | None = None,
        reference_revision: str | None = None,
        backend: str = "auto",
        progress: Progress = silent,
    ) -> EvalReport:
        """Perplexity and, against `reference` (another key), divergence and agreement."""
        loaded, parts, source = self._windows(key, revision, text, tokens, window, progress)
        head = hidden = None
        if reference is not None:
            other = self._get(reference, reference_revision, progress)
            if other.model.config.vocab_size != loaded.model.config.vocab_size:
                raise InputError("The reference has another vocabulary: compare models of one family.", code="E-PARAM-REFERENCE")
            head = other.model.get_output_embeddings()
            hidden = self._reference((reference, reference_revision), other, parts, progress)
        return evaluate(loaded, parts, source, reference=hidden, reference_head=head, backend=backend, progress=progress, key=key)

    def generate(
        self,
        key: str,
        prompt: str,
        *,
        revision: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        chat: bool = False,
        backend: str = "auto",
        on_text: Callable[[str], None] | None = None,
        progress: Progress = silent,
    ) -> GenerationReport:
        """Continue a prompt, streaming pieces to `on_text`."""
        loaded = self._get(key, revision, progress)
        set_backend(loaded, backend)
        made = generate(
            loaded.model,
            loaded.tokenizer,
            loaded.adapter,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            on_text=on_text,
            prefix=prefix_ids(loaded),
        )
        return GenerationReport(
            key,
            made.text,
            made.prompt_tokens,
            made.new_tokens,
            made.prefill_seconds + made.decode_seconds,
            made.tokens_per_second,
            made.stopped,
            made.kv_bytes,
            made.kv_bytes_float,
            made.decoding,
        )

    def sparsity(
        self, key: str, *, text: str = "sotu", tokens: int = 512, progress: Progress = silent
    ) -> sparsity.SparsityReport:
        """Zero codes and active parameters of a BitNet model on a text."""
        loaded, parts, source = self._short_windows(key, text, tokens, progress)
        return sparsity.measure_sparsity(loaded, parts, source.name, progress=progress)

    def weight_histogram(self, key: str, *, progress: Progress = silent) -> sparsity.WeightHistogram:
        """Shares of -1, 0 and 1 in every projection of a BitNet model."""
        return sparsity.weight_histogram(self._get(key, None, progress))

    def input_histogram(
        self, key: str, site: str, layer: int, *, text: str = "sotu", tokens: int = 512, progress: Progress = silent
    ) -> sparsity.InputHistogram:
        """Distribution of one site (a name of `SITES`) of one layer on a text."""
        loaded, parts, source = self._short_windows(key, text, tokens, progress)
        return sparsity.input_histogram(loaded, parts, source.name, site, layer, progress=progress)

    def speed_limit(self, key: str, *, progress: Progress = silent) -> SpeedLimit:
        """Bytes a token reads and the measured memory bandwidth: call it after `generate`."""
        loaded = self._get(key, None, progress)
        return speed_limit(loaded.model, loaded.adapter, key)

    def model(self, key: str, *, revision: str | None = None, progress: Progress = silent) -> LoadedModel:
        """The loaded model of a key."""
        return self._get(key, revision, progress)

    def _windows(
        self, key: str, revision: str | None, text: str, tokens: int, window: int, progress: Progress
    ) -> tuple[LoadedModel, Tensor, TextSource]:
        loaded = self._get(key, revision, progress)
        return loaded, *evaluation_windows(loaded, text, tokens=tokens, window=window, allow_local=self.allow_local)

    def _short_windows(self, key: str, text: str, tokens: int, progress: Progress) -> tuple[LoadedModel, Tensor, TextSource]:
        """Windows of 256 tokens, shorter where tokens or the model's context are."""
        tokens = require_int("tokens", tokens, 8, MAX_TOKENS, f"use 8 to {MAX_TOKENS}")
        window = min(tokens, 256, context_of(self._get(key, None, progress).model) or 256)
        return self._windows(key, None, text, tokens, window, progress)

    def _get(self, key: str, revision: str | None, progress: Progress) -> LoadedModel:
        stamp = _stamp(key)
        if (key, revision) in self._models and self._stamps[key, revision] == stamp:
            self._models.move_to_end((key, revision))
            return self._models[key, revision]
        folder = find_saved(key)
        loaded = (
            replace(self._load_saved(folder, progress), name=key)
            if folder is not None
            else load_model(key, revision=revision, device=self.device, progress=progress, allow_local=self.allow_local)
        )
        self._remember((key, revision), loaded, stamp)
        return loaded

    def _load_saved(self, folder: Path, progress: Progress) -> LoadedModel:
        loaded = load_quantized(folder, progress=progress)
        loaded.model.to(self.device)
        return loaded

    def _remember(self, key: tuple[str, str | None], loaded: LoadedModel, stamp: int | None = None) -> None:
        self._models[key], self._stamps[key] = loaded, stamp
        self._models.move_to_end(key)
        for name in [name for name in self._references if name[:2] == key]:
            del self._references[name]  # the key may mean another model now
        while len(self._models) > 1 and sum(_held_bytes(m) for m in self._models.values()) > self.max_bytes:
            name, _ = self._models.popitem(last=False)
            logger.info("dropped model %s from memory", name[0])

    def _reference(self, key: tuple[str, str | None], loaded: LoadedModel, parts: Tensor, progress: Progress) -> list[Tensor]:
        """Hidden states of the reference on these windows, kept for the next comparison where they fit."""
        name = (*key, parts.shape, hashlib.sha256(parts.numpy().tobytes()).digest())
        hidden = self._references.pop(name, None)
        if hidden is None:
            hidden = hidden_windows(loaded.model, parts, progress=progress, title="Reference model")
        self._references[name] = hidden
        while sum(t.nbytes for kept in self._references.values() for t in kept) > REFERENCE_SHARE * self.max_bytes:
            self._references.popitem(last=False)
        return hidden


def run(recipe: QuantRecipe, *, text: str = "sotu", tokens: int = 4096, window: int = 512, progress: Progress = silent) -> Row:
    """Quantise by recipe, evaluate against the float model, and return one row with its provenance. Pure and picklable."""
    bench = Workbench()
    quantized = bench.quantize(recipe, progress=progress)
    report = bench.evaluate(
        quantized.key,
        text=text,
        tokens=tokens,
        window=window,
        reference=recipe.model,
        reference_revision=recipe.revision,
        progress=progress,
    )
    return Row(recipe.to_dict(), recipe.hash, report.to_dict(), quantized.to_dict(), provenance())


def _stamp(name: str) -> int | None:
    """What changes when the local model of that name is written again; None for names of other kinds."""
    for place in (os.path.join(name, MANIFEST), os.path.join(name, "config.json"), name):
        with contextlib.suppress(OSError, ValueError):
            return os.stat(place).st_mtime_ns
    return None


def _held_bytes(loaded: LoadedModel) -> int:
    return sum(measured_parts(loaded.model, loaded.adapter).values()) + working_bytes(loaded.model)

"""The order of the stages, in one place: load, observe, quantise, evaluate, generate.

The page's worker, the command line and `core.run` call it. A `Workbench` keeps models in memory, the least recently used go
first, and returns reports of plain numbers. Quantised models are saved in the cache too, where a new worker finds them.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from core.baselines.apply import with_baseline
from core.baselines.registry import split_key
from core.cache import cache_limit, in_use
from core.calibration.channel import channel_detail
from core.calibration.data import TextSource, calibration_tokens, resolve_text
from core.calibration.report import ChannelDetail, RangesReport
from core.calibration.states import KEPT_BYTES, KeptStates
from core.checks import require_int
from core.distill.texts import distill_texts
from core.errors import ArtifactError, InputError, ResourceError
from core.evaluation import sparsity
from core.evaluation.describe import caution_of, model_info, report_from_dict, set_backend
from core.evaluation.generate import generate
from core.evaluation.memory import held_bytes
from core.evaluation.perplexity import Reference, hidden_windows
from core.evaluation.speed import speed_limit
from core.evaluation.token_report import TokensReport
from core.evaluation.tokens import token_divergences
from core.evaluation.windows import MAX_TOKENS, evaluation_windows
from core.folders import state_of
from core.methods.rotation.bases import basis_change
from core.models.io import saved
from core.models.io.load import load_model
from core.models.io.quantized import load_quantized, read_description, save_quantized, weights_id
from core.models.loaded import LoadedModel, prefix_ids
from core.privacy import is_public_text, owner_tag
from core.probe.bench import ProbeBench
from core.progress import Progress, part, silent
from core.recipe import Calibration, QuantRecipe
from core.report import EvalReport, GenerationReport, ModelInfo, QuantizeReport, SpeedLimit
from core.stages import DISTILL_TIME, distill, evaluate, observe, quantize, require_float
from core.storage import MANIFEST

logger = logging.getLogger(__name__)

REFERENCE_TIME = 0.3
"""Share of a comparison's time that its reference takes: one float pass, beside a quantised pass and the divergences."""
DEFAULT_BUDGET = 3 * 2**30
REFERENCE_SHARE = 1 / 4
"""Share of the models' bytes that hidden states of reference models may take in addition."""

_Name = tuple[str, str | None, str | None]
"""(key, revision, tag of the owner) of a model in memory; the tag is None for a model that everybody may use."""


class Workbench(ProbeBench):
    """Models by key, and every stage as a method that returns a report.

    A key is a model name as `load_model` takes it, the hash of a recipe that `quantize` returned, or a baseline's (`split_key`).
    Every method takes the `owner` who asks: a session's secret key on the page, None for the local user. A model made from a
    private text (`core.privacy`) is found by its owner alone; to everybody else its hash is an unknown name.

    Args:
        max_bytes: models beyond this are dropped, least recently used first (the one in use stays); what is kept of
            reference models comes on top (`REFERENCE_SHARE`).
        allow_local: whether local paths may be given as models and texts; off on a public server.
        device: where models run, "cpu" or "cuda" ("cuda:1").
    Raises: InputError E-PARAM-CACHE-GB when the limit of the cache is no number.
    """

    def __init__(self, *, max_bytes: int = DEFAULT_BUDGET, allow_local: bool = True, device: str = "cpu") -> None:
        cache_limit()
        saved.remove_pasted()
        self.max_bytes, self.allow_local, self.device = max_bytes, allow_local, device
        self._models: OrderedDict[_Name, LoadedModel] = OrderedDict()
        self._states: dict[_Name, str | None] = {}
        self._aliases: dict[_Name, _Name] = {}
        self._unsaved: set[_Name] = set()
        self._references: OrderedDict[tuple[Any, ...], list[Tensor]] = OrderedDict()
        self._passed, self._passed_private = KeptStates(), KeptStates(KEPT_BYTES // 2)
        super().__init__()

    def load(
        self, model: str, *, revision: str | None = None, owner: str | None = None, progress: Progress = silent
    ) -> ModelInfo:
        """Load a model, or describe the one that is loaded already."""
        start = time.perf_counter()
        return model_info(self._get(model, revision, owner, progress), time.perf_counter() - start)

    def observe(
        self,
        model: str,
        calibration: Calibration,
        *,
        revision: str | None = None,
        seed: int = 0,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> RangesReport:
        """Measure the exact range of every channel of the seven sites of every layer."""
        loaded = self._get(model, revision, owner, progress)
        states = self._kept_states(calibration.text)
        return observe(loaded, calibration, seed=seed, allow_local=self.allow_local, states=states, progress=progress)

    def channel(
        self,
        model: str,
        calibration: Calibration,
        site: str,
        channel: int,
        *,
        basis: str = "original",
        revision: str | None = None,
        seed: int = 0,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> ChannelDetail:
        """Measure the histogram of one channel in a basis of `BASES`, and find the tokens at its extreme values."""
        loaded = self._get(model, revision, owner, progress)
        require_float(loaded, "inspect")
        tokens, _ = calibration_tokens(loaded, calibration, seed, self.allow_local)
        states, change = self._kept_states(calibration.text), basis_change(basis)
        return channel_detail(loaded, tokens, site, channel, change=change, states=states, progress=progress)

    def quantize(self, recipe: QuantRecipe, *, owner: str | None = None, progress: Progress = silent) -> QuantizeReport:
        """Quantise by recipe, keep the result in memory and in the cache, and describe it; a saved result is only loaded.

        A result that cannot be saved is kept in memory, and the report's `unsaved` says why.
        """
        base = self._get(recipe.model, recipe.revision, owner, progress)
        text = recipe.calibration.text
        source = resolve_text(text, split="calibration", allow_local=self.allow_local)
        folder = saved.saved_folder(recipe.hash, text, source.sha256, weights_id(base), owner)
        name = (recipe.hash, None, None if is_public_text(text) else owner_tag(owner))
        if (folder / MANIFEST).exists():
            try:
                report = report_from_dict(read_description(folder)["report"])
                self._remember(name, replace(self._load_saved(folder, progress), name=recipe.hash))
                return report
            except (ArtifactError, KeyError, TypeError):
                logger.warning("the saved model %s is damaged or of another version: quantising again", folder.name)
        if recipe.distill is None:
            quantized, report = quantize(base, recipe, allow_local=self.allow_local, progress=progress)
            progress("Saving the quantised model", None)
        else:
            texts = distill_texts(base, recipe, self.allow_local)
            first, second = part(progress, 0.0, 1 - DISTILL_TIME), part(progress, 1 - DISTILL_TIME, 1.0)
            plain = self.quantize(replace(recipe, distill=None), owner=owner, progress=first)
            start, state = self._get(plain.key, None, owner, first), saved.state_folder(folder)
            quantized, report = distill(base, start, plain, recipe, texts, state=state, progress=second)
            if report.key == plain.key:  # stopped before a step was judged
                return plain
            folder = saved.saved_folder(report.key, text, source.sha256, weights_id(base), owner)  # of the steps taken
        name = (report.key, None, name[2])
        self._remember(name, replace(quantized, name=report.key))
        kept = replace(report, folder=str(folder))
        facts = {"recipe": report.recipe, "report": kept.to_dict()}
        try:
            save_quantized(folder, quantized, facts, replace=True, private=not is_public_text(text))
        except ResourceError as error:
            logger.warning("the quantised model stays in memory only: %s", error)
            self._unsaved.add(name)
            return replace(report, unsaved=f"The model is usable until this program ends, but it is not saved. {error}")
        return kept

    def open_saved(
        self, *, folder: str = "", archive: str = "", owner: str | None = None, progress: Progress = silent
    ) -> QuantizeReport:
        """Load a quantised model from its folder, or from a zip file of one, and return the report that was saved with it.

        A folder's key is its path; a zip file's model becomes the owner's own, under its recipe's hash.
        Raises: ArtifactError for what is damaged or was not saved by Quantscope; ModelError where no folder may be named.
        """
        key, place = saved.receive(archive, owner) if archive else (folder, saved.find_saved(folder, owner) or Path(folder))
        self._get(key, None, owner, progress)
        try:
            report = report_from_dict(read_description(place)["report"])
            recipe = QuantRecipe.from_dict(report.recipe)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError("The saved model has no readable report: quantise the model again.", code="E-CKPT-BAD") from error
        return replace(report, key=key, label=str(report.label)[:300], recipe=recipe.to_record(), folder=str(place))

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
        owner: str | None = None,
        progress: Progress = silent,
    ) -> EvalReport:
        """Measure perplexity and, against `reference` (another key), divergence and agreement."""
        loaded, parts, source = self._windows(key, revision, owner, text, tokens, window, progress)
        against = None
        if reference is not None:
            name = self._load(reference, reference_revision, owner, progress)
            other = self._models[name]
            if other.model.config.vocab_size != loaded.model.config.vocab_size:
                raise InputError("The reference has another vocabulary: compare models of one family.", code="E-PARAM-REFERENCE")
            private = None if is_public_text(text) else owner_tag(owner)
            hidden = self._reference(name, private, parts, part(progress, 0.0, REFERENCE_TIME))
            progress = part(progress, REFERENCE_TIME, 1.0)
            against = Reference(reference, other.model.get_output_embeddings(), hidden)
        report = evaluate(loaded, parts, source, reference=against, backend=backend, progress=progress, key=key)
        return report if reference is None else replace(report, caution=caution_of(loaded, other))

    def tokens(
        self,
        key: str,
        reference: str,
        *,
        reference_revision: str | None = None,
        text: str = "sotu",
        tokens: int = 128,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> TokensReport:
        """Compare a model with `reference` (another key) token by token on the start of a text."""
        other = self._get(reference, reference_revision, owner, progress)
        loaded = self._get(key, None, owner, progress)
        return token_divergences(loaded, other, text, tokens=tokens, key=key, allow_local=self.allow_local, progress=progress)

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
        owner: str | None = None,
        progress: Progress = silent,
    ) -> GenerationReport:
        """Continue a prompt, handing each piece of text to `on_text` when it is made."""
        loaded = self._get(key, revision, owner, progress)
        set_backend(loaded, backend)
        made = generate(
            loaded.model,
            loaded.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            on_text=on_text,
            prefix=prefix_ids(loaded),
            key=key,
        )
        return replace(made, unformatted=chat and not getattr(loaded.tokenizer, "chat_template", None))

    def sparsity(
        self, key: str, *, text: str = "sotu", tokens: int = 512, owner: str | None = None, progress: Progress = silent
    ) -> sparsity.SparsityReport:
        """Count the zero codes and the active parameters of a BitNet model on a text."""
        loaded, parts, source = self._short_windows(key, owner, text, tokens, progress)
        return sparsity.measure_sparsity(loaded, parts, source.name, progress=progress)

    def weight_histogram(self, key: str, *, owner: str | None = None, progress: Progress = silent) -> sparsity.WeightHistogram:
        """Count the shares of -1, 0 and 1 in every projection of a BitNet model."""
        return sparsity.weight_histogram(self._get(key, None, owner, progress))

    def input_histogram(
        self,
        key: str,
        site: str,
        layer: int,
        *,
        text: str = "sotu",
        tokens: int = 512,
        owner: str | None = None,
        progress: Progress = silent,
    ) -> sparsity.InputHistogram:
        """Measure the distribution of one site (a name of `SITES`) of one layer on a text."""
        loaded, parts, source = self._short_windows(key, owner, text, tokens, progress)
        return sparsity.input_histogram(loaded, parts, source.name, site, layer, progress=progress)

    def speed_limit(self, key: str, *, owner: str | None = None, progress: Progress = silent) -> SpeedLimit:
        """Measure the memory's bandwidth beside the bytes that a token reads: call it after `generate`."""
        return speed_limit(self._get(key, None, owner, progress).model, key)

    def model(
        self, key: str, *, revision: str | None = None, owner: str | None = None, progress: Progress = silent
    ) -> LoadedModel:
        """Return the loaded model of a key."""
        return self._get(key, revision, owner, progress)

    def forget(self, owner: str, *, progress: Progress = silent) -> None:
        """Remove what was made from the private texts of `owner`, in memory and in the cache: call it when a session ends.

        Hidden states of other owners' private texts go too: they are computed again when a channel is read.
        """
        tag = owner_tag(owner)
        for name in [name for name in self._models if name[2] == tag]:
            del self._models[name]
        for kept in [kept for kept in self._references if tag in (kept[0][2], kept[1])]:
            del self._references[kept]
        self._passed_private = KeptStates(KEPT_BYTES // 2)
        self._probes.forget(tag)
        saved.forget(owner)

    def rest(self) -> None:
        """Drop from memory what can be loaded or computed again: call it after some time without a job.

        The unquantised model that was used last stays, and so does what could not be saved.
        """
        last = [name for name, loaded in self._models.items() if loaded.label is None][-1:]
        for name in [name for name in self._models if name not in self._unsaved and name not in last]:
            del self._models[name]
        self._references.clear()
        self._probes.clear()
        self._passed, self._passed_private = KeptStates(), KeptStates(KEPT_BYTES // 2)

    def _kept_states(self, text: str) -> KeptStates:
        """Return the store of hidden states for a text: those of private texts are kept apart."""
        return self._passed if is_public_text(text) else self._passed_private

    def _windows(
        self, key: str, revision: str | None, owner: str | None, text: str, tokens: int, window: int, progress: Progress
    ) -> tuple[LoadedModel, Tensor, TextSource]:
        loaded = self._get(key, revision, owner, progress)
        return loaded, *evaluation_windows(loaded, text, tokens=tokens, window=window, allow_local=self.allow_local)

    def _short_windows(
        self, key: str, owner: str | None, text: str, tokens: int, progress: Progress
    ) -> tuple[LoadedModel, Tensor, TextSource]:
        """Cut windows of 256 tokens, shorter where tokens or the model's context are."""
        tokens = require_int("tokens", tokens, 8, MAX_TOKENS, f"use 8 to {MAX_TOKENS}")
        return self._windows(key, None, owner, text, tokens, min(tokens, 256), progress)

    def _get(self, key: str, revision: str | None, owner: str | None, progress: Progress) -> LoadedModel:
        return self._models[self._load(key, revision, owner, progress)]

    def _load(self, key: str, revision: str | None, owner: str | None, progress: Progress) -> _Name:
        """Load the model of a key that `owner` may use, from memory, from the cache, or by name; return its name in memory."""
        model, baseline = split_key(key)
        state = state_of(model)
        for tag in (owner_tag(owner), None):
            name = self._aliases.get((key, revision, tag), (key, revision, tag))
            if name in self._models and self._states[name] == state:
                self._models.move_to_end(name)
                return name
        if baseline is not None:
            base = self._load(model, revision, owner, progress)
            loaded, name = with_baseline(self._models[base], baseline, progress=progress), (key, *base[1:])
        elif (folder := saved.find_saved(key, owner)) is not None:
            loaded = replace(self._load_saved(folder, progress), name=key)
            name = (key, revision, None if saved.is_public_folder(folder) else owner_tag(owner))
        else:
            loaded = load_model(key, revision=revision, device=self.device, progress=progress, allow_local=self.allow_local)
            name = (key, loaded.revision, None)
        self._aliases[key, revision, name[2]] = name  # reports name this revision: asking for it finds the model loaded now
        self._remember(name, loaded, state)
        return name

    def _load_saved(self, folder: Path, progress: Progress) -> LoadedModel:
        with in_use(folder):  # if several folders hold one recipe, its hash names the one used last
            loaded = load_quantized(folder, progress=progress)
        loaded.model.to(self.device)
        return loaded

    def _remember(self, name: _Name, loaded: LoadedModel, state: str | None = None) -> None:
        self._models[name], self._states[name] = loaded, state
        self._models.move_to_end(name)
        for known in [known for known in self._references if known[0] == name]:
            del self._references[known]  # the name may mean another model now
        while len(self._models) > 1 and sum(held_bytes(m.model) for m in self._models.values()) > self.max_bytes:
            dropped, _ = self._models.popitem(last=False)
            logger.info("dropped model %s from memory", dropped[0])

    def _reference(self, name: _Name, private: str | None, parts: Tensor, progress: Progress) -> list[Tensor]:
        """Return the hidden states of the reference on these windows, and keep them for the next comparison where they fit.

        `private`: tag of the owner of a private text; None for a public one.
        """
        kept = (name, private, parts.shape, hashlib.sha256(parts.numpy().tobytes()).digest())
        hidden = self._references.pop(kept, None)
        if hidden is None:
            hidden = hidden_windows(self._models[name].model, parts, progress=progress, title="Reference model")
        self._references[kept] = hidden
        while sum(t.nbytes for states in self._references.values() for t in states) > REFERENCE_SHARE * self.max_bytes:
            self._references.popitem(last=False)
        return hidden

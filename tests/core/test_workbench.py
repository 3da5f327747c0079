"""The workbench on a tiny model: every stage's report, what is kept and found again, and what a stop leaves behind."""

from __future__ import annotations

import errno
import itertools
import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.calibration.observe import observe_layers
from core.errors import BackendError, Cancelled, InputError, ModelError, QuantscopeError
from core.evaluation.windows import evaluation_windows
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from core.models.tiny import save_tiny
from core.recipe import SITES, Bits, Calibration, QuantRecipe
from core.stages import evaluate, quantize
from core.storage import atomic_dir
from core.workbench import Workbench, run
from tests.core.tools import tokens

TEXT = "text:" + " ".join(f"number {i} comes after number {i - 1}." for i in range(1, 400))
CALIBRATION = Calibration(TEXT, 256, 32)
SEEN = {"text": TEXT, "tokens": 128, "window": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama", seed=2))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def bench(cache) -> Workbench:
    return Workbench()


def recipe_of(folder: str, **options) -> QuantRecipe:
    return QuantRecipe(folder, **({"calibration": CALIBRATION, "weights": "rtn"} | options))


def plain(report) -> None:
    """Reports are picklable and JSON."""
    assert pickle.loads(pickle.dumps(report)) == report
    json.dumps(report.to_dict(), allow_nan=False)


def test_quantise_reports_saves_and_finds_again(bench, cache, folder):
    recipe, stages = recipe_of(folder, weights="gptq"), []
    report = bench.quantize(recipe, progress=lambda s, f: stages.append(s))
    plain(report)
    assert report.key == recipe.hash and report.label == recipe.label() and report.recipe == recipe.to_record()
    assert (
        [entry.layer for entry in report.layers] == [0, 1]
        and set(report.layers[0].sites) == set(SITES)
        and report.fallbacks == []
    )
    assert (
        4 < report.effective_weight_bits < 16 and report.weight_bytes < report.float_bytes and "256 tokens" in report.calibration
    )
    assert (
        sum(b.layers for b in report.backends) == 8
        and all(b.reason for b in report.backends)
        and any("Layer 2" in s for s in stages)
    )
    assert [p.name for p in cache.iterdir()] == [Path(report.folder).name] and Path(report.folder).parent == cache
    logits = bench.model(report.key).model(tokens(1, 20)).logits

    stages.clear()
    again = Workbench()
    assert again.quantize(recipe, progress=lambda s, f: stages.append(s)) == report and not any("Layer" in s for s in stages)
    other = Workbench()  # by key alone, as after a restart
    assert torch.equal(other.model(report.key).model(tokens(1, 20)).logits, logits)
    assert other.model(report.key).name == report.key, "no path of this machine in a name"


def test_cancelling_leaves_no_trace(bench, cache, folder):
    recipe, calls = recipe_of(folder, weights="gptq"), []
    bench.model(folder)
    other = Workbench()
    other.model(folder)
    expected = other.quantize(recipe, progress=lambda *c: calls.append(c))
    shutil.rmtree(cache)
    base = bench.model(folder).model.state_dict()
    before = {k: v.clone() for k, v in base.items()}
    for place in (0, len(calls) // 2, len(calls) - 1):
        count = itertools.count(-place)

        def stop(stage: str, fraction: float | None, count=count) -> None:
            if next(count) == 0:
                raise Cancelled

        with pytest.raises(Cancelled):
            bench.quantize(recipe, progress=stop)
        assert not cache.exists() or not list(cache.iterdir())
        with pytest.raises(QuantscopeError):
            bench.model(recipe.hash)
    assert all(torch.equal(v, base[k]) for k, v in before.items())
    report = bench.quantize(recipe)
    assert report.layers == expected.layers and report.weight_bytes == expected.weight_bytes


@pytest.mark.parametrize("damage", ("a byte", "other format", "no report", "missing file"))
def test_a_damaged_saved_model_is_made_again(bench, cache, folder, damage):
    """The cache may be deleted or damaged at any time: quantising must not be stuck on it."""
    recipe = recipe_of(folder)
    report = bench.quantize(recipe)
    weights, facts = Path(report.folder) / "model.safetensors", Path(report.folder) / "quantscope.json"
    if damage == "a byte":
        content = bytearray(weights.read_bytes())
        content[-10] ^= 255
        weights.write_bytes(content)
    elif damage == "missing file":
        weights.unlink()
    else:
        files = {p.name: p.read_bytes() for p in Path(report.folder).iterdir() if p.name != "manifest.json"}
        changed = json.loads(files[facts.name])
        changed.update({"format": 99} if damage == "other format" else {"report": {}})
        with atomic_dir(report.folder, replace=True) as stage:
            for name, content in (files | {facts.name: json.dumps(changed).encode()}).items():
                (stage / name).write_bytes(content)
    again = Workbench()
    assert again.quantize(recipe).layers == report.layers
    assert torch.equal(again.model(recipe.hash).model(tokens(1, 9)).logits, bench.model(recipe.hash).model(tokens(1, 9)).logits)


def test_another_checkpoint_in_the_same_folder_is_not_mistaken(bench, cache, tmp_path):
    """Weights retrained in place keep name and recipe: the saved model of the old ones must not be handed out."""
    place = save_tiny(tmp_path / "m", "llama", seed=2)
    recipe = recipe_of(str(place))
    first = bench.quantize(recipe)
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2
    (place / "manifest.json").unlink()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    other = Workbench()
    second = other.quantize(recipe)
    assert second.folder != first.folder and second.layers != first.layers
    found = Workbench().model(recipe.hash).model(tokens(1, 9)).logits
    assert torch.equal(found, other.model(recipe.hash).model(tokens(1, 9)).logits), "the newest is the one a key means"


def test_the_text_quantised_on_last_is_what_a_key_means_after_a_restart(cache, folder, tmp_path):
    """A recipe names its text by a file: text A, then B, then A again, which is only loaded."""
    text = tmp_path / "c.txt"
    recipe = recipe_of(folder, scheme="W4A8", method="rtn", calibration=Calibration(str(text), 256, 32))
    for content in ("The quick brown fox jumps. ", "lorem IPSUM 123 dolor? ", "The quick brown fox jumps. "):
        text.write_text(content * 60)
        last = Workbench()
        last.quantize(recipe)
    found, expected = (bench.model(recipe.hash).model(tokens(1, 9)).logits for bench in (Workbench(), last))
    assert len(list(cache.iterdir())) == 2 and torch.equal(found, expected)


def test_a_model_that_cannot_be_saved_is_kept_in_memory(bench, cache, folder, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("core.models.io.quantized.save_file", full)
    report = bench.quantize(recipe_of(folder))
    assert report.folder == "" and report.layers and list(cache.iterdir()) == []
    assert math.isfinite(bench.evaluate(report.key, **SEEN).nll)


def test_unfinished_folders_are_not_found(bench, cache, folder):
    recipe = recipe_of(folder)
    (cache / f"{recipe.hash}-00000000-00000000.part-abc").mkdir(parents=True)
    (cache / f"{recipe.hash}-00000000-00000001").mkdir()
    with pytest.raises(ModelError):
        bench.model(recipe.hash)


def test_observe_is_exact_and_json(bench, folder):
    report = bench.observe(folder, CALIBRATION)
    listed = json.loads(json.dumps(report.to_dict(), allow_nan=False))["sites"]["layers.1.down_in"]
    assert list(listed) == ["min", "max", "ema_min", "ema_max"]
    assert list(report.sites) == [f"layers.{i}.{s}" for i in range(2) for s in SITES]
    assert (report.tokens, report.window, report.groups) == (256, 32, 4)
    loaded = load_model(folder)
    from core.calibration.data import calibration_windows, resolve_text

    windows = calibration_windows(resolve_text(TEXT, split="calibration"), loaded.tokenizer, tokens=256, window=32, seed=0)
    for layer, ranges in enumerate(observe_layers(loaded.model, windows)):
        for kind, found in ranges.items():
            entry = report.sites[f"layers.{layer}.{kind}"]
            assert entry.low.tolist() == found.low.tolist() and entry.high.tolist() == found.high.tolist()
            averages = found.sample_high[0]
            for sample in found.sample_high[1:]:
                averages = 0.99 * averages + 0.01 * sample
            assert entry.ema_high.tolist() == pytest.approx(averages.tolist(), rel=1e-6, abs=1e-6)
            assert (entry.ema_low >= entry.low).all() and (entry.ema_low != entry.low).any()
            assert entry.block == (16 if kind in ("q", "k", "v", "o_in") else len(entry.low))
    assert not (report.sites["layers.0.q"].low == bench.observe(folder, CALIBRATION, seed=1).sites["layers.0.q"].low).all()


def test_a_quantised_model_is_not_observed_or_quantised_again(bench, folder):
    key = bench.quantize(recipe_of(folder)).key
    for call in (
        lambda: bench.observe(key, CALIBRATION),
        lambda: bench.channel(key, CALIBRATION, "layers.1.attn_in", 0),
        lambda: bench.quantize(recipe_of(key)),
    ):
        with pytest.raises(ModelError) as caught:
            call()
        assert caught.value.code == "E-MODEL-QUANTIZED"


def test_evaluate_against_itself_and_against_the_base(bench, folder):
    same = bench.evaluate(folder, reference=folder, **SEEN)
    plain(same)
    assert same.kld_mean == pytest.approx(0, abs=1e-7) and same.same_top_token == 1 and same.tokens == 128 and same.window == 32
    assert same.perplexity == pytest.approx(math.exp(same.nll)) and "4 non-overlapping windows of 32" in same.protocol
    key = bench.quantize(recipe_of(folder, scheme="W4A4KV")).key
    found = bench.evaluate(key, reference=folder, **SEEN)
    assert found.kld_mean > 0 and found.same_top_token < 1 and found.weight_bytes < same.weight_bytes
    assert found.kv_bytes_per_token * 8 == same.kv_bytes_per_token and found.label == recipe_of(folder, scheme="W4A4KV").label()
    assert bench.evaluate(key, **SEEN).kld_mean is None and bench.evaluate(key, **SEEN).perplexity == found.perplexity
    assert Workbench().evaluate(key, reference=folder, **SEEN).kld_mean == pytest.approx(found.kld_mean, rel=1e-6)


def test_references_are_compared_on_the_tokens_of_the_model(bench, folder, tmp_path):
    """Two models of one vocabulary size, one reference, one text, other token ids."""
    other = save_tiny(tmp_path / "o", "llama", seed=2)
    words = json.loads((other / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    words["model"]["vocab"] = dict(zip(ids, [*list(ids.values())[1:], 0], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(words))
    bench.evaluate(folder, reference=folder, **SEEN)
    found, expected = (b.evaluate(str(other), reference=folder, **SEEN) for b in (bench, Workbench()))
    assert (
        (found.kld_mean, found.same_top_token) == (expected.kld_mean, expected.same_top_token) == (pytest.approx(0, abs=1e-6), 1)
    )


def test_references_are_kept_within_their_share_and_while_they_are_the_same_model(cache, folder):
    bench, passes = Workbench(), []
    for _ in range(2):
        bench.evaluate(folder, reference=folder, progress=lambda s, f: passes.append(s), **SEEN)
    assert sum("Reference" in s for s in passes) == 4, "the second comparison finds the first one's states"
    (states,) = bench._references.values()
    bench.max_bytes = 4 * sum(t.nbytes for t in states)
    bench.evaluate(folder, reference=folder, text=TEXT, tokens=96, window=32)
    assert [len(kept) for kept in bench._references.values()] == [3], "the older states went"
    bench.max_bytes = 1
    assert bench.evaluate(folder, reference=folder, **SEEN).same_top_token == 1 and not bench._references
    bench = Workbench()
    key = bench.quantize(recipe_of(folder)).key
    bench.evaluate(folder, reference=key, **SEEN)
    bench.quantize(recipe_of(folder))
    assert not bench._references, "a key that was quantised again may mean another model"


def test_a_reference_of_another_vocabulary_is_refused(bench, folder, tmp_path):
    other = save_tiny(tmp_path / "o", "llama", vocab_size=300)
    with pytest.raises(InputError) as caught:
        bench.evaluate(folder, reference=str(other), **SEEN)
    assert caught.value.code == "E-PARAM-REFERENCE"


def test_backends_by_name(bench, folder):
    wide = bench.quantize(recipe_of(folder, scheme="W4A8", method="rtn")).key
    reports = {b: bench.evaluate(wide, backend=b, **SEEN) for b in ("reference", "int8", "auto")}
    assert reports["int8"].backend.startswith("int8 × 8") and reports["reference"].backend.startswith("reference × 8")
    assert reports["int8"].nll == pytest.approx(reports["reference"].nll, rel=1e-3)
    floats = bench.quantize(recipe_of(folder, scheme="W4A16")).key
    with pytest.raises(BackendError, match="use reference"):
        bench.evaluate(floats, backend="int8", **SEEN)
    with pytest.raises(InputError) as caught:
        bench.evaluate(floats, backend="cuda", **SEEN)
    assert caught.value.code == "E-PARAM-BACKEND"
    assert math.isfinite(bench.evaluate(floats, **SEEN).nll), "a refusal does not stick"


def test_generate_reports_the_cache(bench, folder):
    pieces: list[str] = []
    key = bench.quantize(recipe_of(folder, scheme="W4A4KV", variant="official")).key
    made = bench.generate(key, "hello", max_new_tokens=6, on_text=pieces.append)
    plain(made)
    assert "".join(pieces) == made.text and made.kv_bytes * 8 == made.kv_bytes_float and made.prompt_tokens == 5


def test_models_are_dropped_least_recently_used_first(cache, folder):
    bench = Workbench(max_bytes=1)
    key = bench.quantize(recipe_of(folder)).key
    assert [k for k, *_ in bench._models] == [key]
    bench.model(folder)
    assert [k for k, *_ in bench._models] == [folder]
    large = Workbench()
    large.model(folder)
    large.model(key)
    large.model(folder)
    assert [k for k, *_ in large._models] == [key, folder]


def test_a_model_asked_for_by_the_revision_of_its_report_is_not_loaded_again(cache, folder, monkeypatch):
    """The page asks for a channel by the name and revision of a report; each load of the default model takes seconds."""
    loads: list[str | None] = []

    def load(key: str, *, revision: str | None = None, **options: object) -> LoadedModel:
        loads.append(revision)
        return replace(load_model(key), revision=revision or "commit")

    monkeypatch.setattr("core.workbench.load_model", load)
    bench = Workbench()
    ranges = bench.observe(folder, CALIBRATION)
    assert ranges.revision == "commit"
    bench.channel(folder, CALIBRATION, "layers.0.k", 1, revision=ranges.revision)
    bench.load(folder)
    assert loads == [None] and len(bench._models) == 1
    bench.load(folder, revision="other")
    assert loads == [None, "other"] and len(bench._models) == 2


def test_local_names_can_be_switched_off(cache, folder):
    bench = Workbench(allow_local=False)
    with pytest.raises(QuantscopeError):
        bench.load(folder)


@pytest.mark.parametrize(
    "options, code",
    [
        ({"window": 8193, "tokens": 8193}, "E-PARAM-WINDOW"),
        ({"window": 4}, "E-PARAM-WINDOW"),
        ({"tokens": -5}, "E-PARAM-TOKENS"),
        ({"text": " "}, "E-PARAM-TEXT"),
        ({"tokens": 0, "window": 0}, None),
        ({"text": "text:"}, None),
        ({"text": "nowhere.txt"}, "E-TEXT-NOTFOUND"),
        ({"text": "text:short", "window": 512}, "E-TEXT-SHORT"),
    ],
    ids=str,
)
def test_bad_evaluations_are_one_sentence(bench, folder, options, code):
    with pytest.raises(QuantscopeError) as caught:
        bench.evaluate(folder, **(SEEN | options))
    assert 20 < len(str(caught.value)) <= 240 and (code is None or caught.value.code == code)
    assert "alibration" not in str(caught.value)


def test_run_compares_with_the_revision_it_quantised(cache, folder, monkeypatch):
    seen: list[tuple[str, str | None]] = []
    real = Workbench._load

    def load(self: Workbench, key: str, revision: str | None, *rest: object) -> tuple:
        seen.append((key, revision))
        return real(self, key, None, *rest)

    monkeypatch.setattr(Workbench, "_load", load)
    recipe = replace(recipe_of(folder), revision="abc")
    row = run(recipe, text=TEXT, tokens=64, window=32)
    plain(row)
    assert row.hash == recipe.hash and row.report["kld_mean"] > 0 and row.provenance["versions"]["torch"]
    assert {r for k, r in seen if k == folder} == {"abc"}


def test_channel_of_the_workbench(bench, folder):
    found = bench.channel(folder, CALIBRATION, "layers.1.down_in", 7)
    assert sum(found.counts) == 256 and json.dumps(found.__dict__, default=vars)


def test_a_quantised_model_says_once_what_it_is(bench, folder):
    loaded, recipe = load_model(folder), recipe_of(folder)
    made, report = quantize(loaded, recipe)
    parts, source = evaluation_windows(made, **SEEN)
    assert evaluate(made, parts, source).label == report.label == recipe.label()
    key = bench.quantize(recipe).key
    for found in (bench, Workbench()):
        assert found.load(key).source == made.source and made.source.count("Quantised by Quantscope") == 1
        assert found.evaluate(key, **SEEN).label == recipe.label()


def test_a_folder_that_was_written_again_is_loaded_again(bench, tmp_path):
    folder, seen = tmp_path / "model", []
    for seed in (1, 2):
        shutil.rmtree(folder, ignore_errors=True)
        save_tiny(folder, "llama", seed=seed)
        seen.append([bench.evaluate(str(folder), **SEEN).nll for _ in range(2)])
    assert seen[0][0] == seen[0][1] != seen[1][0] == seen[1][1] == Workbench().evaluate(str(folder), **SEEN).nll


def test_own_bits_end_to_end(bench, folder):
    report = bench.quantize(recipe_of(folder, scheme="custom", bits=Bits(weights=8, v=2, k=2)))
    plain(report)
    assert (
        report.layers[0].sites["v"].bits == 2
        and report.layers[0].sites["q"].sqnr_db is None
        and report.label.startswith("RPTQ · custom")
    )

"""The workbench on a tiny model: every stage's report, what is kept and found again, and what a stop leaves behind."""

from __future__ import annotations

import errno
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.calibration.observe import observe_layers
from core.errors import Cancelled, ModelError, QuantscopeError
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from core.models.tiny import save_tiny
from core.recipe import SITES, Bits, Calibration
from core.storage import atomic_dir
from core.workbench import Workbench
from tests.core.tools import tokens
from tests.core.workbench_tools import CALIBRATION, SEEN, TEXT, plain, recipe_of


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
    weights, facts = Path(report.folder) / "quantscope.safetensors", Path(report.folder) / "quantscope.json"
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


def test_channel_of_the_workbench(bench, folder):
    found = bench.channel(folder, CALIBRATION, "layers.1.down_in", 7)
    assert sum(found.counts) == 256 and json.dumps(found.__dict__, default=vars)


def test_own_bits_end_to_end(bench, folder):
    report = bench.quantize(recipe_of(folder, scheme="custom", bits=Bits(weights=8, v=2, k=2)))
    plain(report)
    assert (
        report.layers[0].sites["v"].bits == 2
        and report.layers[0].sites["q"].sqnr_db is None
        and report.label.startswith("RPTQ · custom")
    )

"""Evaluating in the workbench: references, backends, generated text, bad requests, and `run`."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest

from core.errors import BackendError, InputError, QuantscopeError
from core.evaluation.windows import evaluation_windows
from core.models.io.load import load_model
from core.models.tiny import save_tiny
from core.run import run
from core.stages import evaluate, quantize
from core.workbench import Workbench
from tests.core.workbench_tools import SEEN, TEXT, plain, recipe_of


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


def test_what_moved_at_a_token_is_found_again_by_another_workbench(bench, folder):
    recipe = recipe_of(folder, scheme="W4A4KV")
    key = bench.quantize(recipe).key
    read = bench.tokens(key, folder, text=TEXT, tokens=24)
    found = bench.moved(key, recipe, text=TEXT, tokens=24, place=5)
    plain(found)
    assert (found.token, found.after) == (read.tokens[5].text, read.tokens[4].text) and len(found.sites) == 14
    assert found.sites[0].moved > 0 and Workbench().moved(key, recipe, text=TEXT, tokens=24, place=5) == found
    for place in (0, 24, "many"):
        with pytest.raises(InputError, match="use 1 to 23"):
            bench.moved(key, recipe, text=TEXT, tokens=24, place=place)

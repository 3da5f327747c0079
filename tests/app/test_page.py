"""The whole page: what is drawn when, links in a tab that has a session, quantised models named as models."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from app.worker.job import Step
from core.recipe import Calibration, QuantRecipe
from tests.app.tools import collect

TEXT = Calibration("sotu", 1024)


@pytest.fixture
def ctx(page):
    """What the tabs of the file's page share."""
    return page.ctx


@pytest.fixture
def drawn(page, monkeypatch):
    """Names of the tabs in the order in which they were drawn."""
    names = []
    for name in ("explore", "reorder", "quantize"):
        tab = getattr(page, name)
        render = tab.render
        monkeypatch.setattr(tab, "render", lambda *a, render=render, name=name: names.append(name) or render(*a))
    return names


def observe(page, session, model="fake"):
    return collect(page.observe(session, model, None, TEXT))


@pytest.mark.parametrize("tab", ["explore", "reorder", "quantize", "compare", "bitnet"])
def test_new_ranges_are_drawn_on_the_open_tab_alone(page, ctx, wait, drawn, tab):
    session = ctx.sessions.open()
    session.tab = tab
    updates = wait(observe(page, session))
    assert set(drawn) == {tab} & {"explore", "reorder"}
    assert (session.channel is not None) == (tab == "explore"), "its values are read where they are seen"
    assert (session.curve[1] is not None) == (tab == "reorder"), "its cost is predicted where it is seen"
    assert any(page.compare.runs in update for update in updates)
    explored = wait(collect(page.explore.opened({ctx.key: session.key})))
    for view, shown in ((page.explore, explored[0]), (page.reorder, page.reorder.opened({ctx.key: session.key}))):
        assert json.loads(shown[view.scatter])["data"] and shown[view.layer]["value"] == session.selection.layer
    assert session.channel is not None and "<mark>" in explored[-1][page.explore.tokens]


def test_g_moved_elsewhere_draws_reorder_only_where_it_is_open(page, ctx, wait, drawn):
    session = ctx.sessions.open()
    wait(observe(page, session))
    drawn.clear()
    moved = page.reorder.moved_at_side({ctx.key: session.key, page.side.clusters: 8})
    assert drawn == [] and moved[page.reorder.clusters]["value"] == 8 and session.selection.clusters.R1 == 8
    page.reorder.typed({ctx.key: session.key, **dict.fromkeys(page.quantize.clusters.values(), 4)})
    assert drawn == []
    session.tab = "reorder"
    moved = page.reorder.moved_at_side({ctx.key: session.key, page.side.clusters: 9})
    assert drawn == ["reorder"] and json.loads(moved[page.reorder.strips])["data"]


def test_a_model_of_one_layer_has_no_slider_of_layers(page, ctx, wait):
    session = ctx.sessions.open()
    updates = wait(observe(page, session, "fake-single"))
    slider = next(update[page.explore.layer] for update in updates if page.explore.layer in update)
    assert slider["visible"] is False and slider["value"] == 0 < slider["maximum"]
    assert page.reorder.opened({ctx.key: session.key})[page.reorder.layer]["visible"] is False
    assert page.explore.moved({ctx.key: session.key, page.explore.layer: 0, page.explore.kind: "q", **switches(page)})
    wait(observe(page, session))
    assert wait(collect(page.explore.opened({ctx.key: session.key})))[0][page.explore.layer]["visible"] is True


def switches(page):
    return dict.fromkeys((page.explore.linear, page.explore.same_axes, page.explore.averaged), False)


def test_a_quantised_folder_named_as_a_model_is_opened_as_a_run(page, ctx, wait):
    session, recipe = ctx.sessions.open(), QuantRecipe("fake", scheme="W4A8", calibration=TEXT)
    views = wait(collect(ctx.follow(session, "quantize", [Step("quantize", {"recipe": recipe})])))
    folder = views[-1].results[0].folder
    updates = wait(observe(page, session, folder))
    assert session.run(folder).recipe == recipe and session.info.name == "fake" and session.ranges.model == "fake"
    said = updates[-1][ctx.status]
    assert "quantised already" in said and "W4A8 g32" in said and "4 · Compare" in said
    filled = next(update for update in updates if page.side.scheme in update)
    assert filled[page.side.model] == "fake" and filled[page.side.scheme] == "W4A8"


def test_a_link_opened_in_a_tab_that_has_a_session_is_followed_and_a_reload_is_not(page, ctx, wait):
    async def opened(key, hash, **query):
        answer = await page.opened(key, SimpleNamespace(session_hash=hash, query_params=query))
        session = ctx.sessions.get(answer[ctx.key])
        while session.handlers:
            await asyncio.sleep(0.01)
        return session, answer

    async def scenario():
        first, _ = await opened(None, "a", model="fake", scheme="W4A8")
        first.recipe = QuantRecipe("fake", scheme="W3A3KV", calibration=TEXT)
        again, answer = await opened(first.key, "b", model="fake", scheme="W4A8", __theme="dark")
        assert again is first and answer[page.side.scheme] == "W3A3KV", "a reload shows what was there"
        other, answer = await opened(first.key, "c", model="fake-wide", scheme="W4A16")
        assert other is first and answer[page.side.scheme] == "W4A16" and other.info.name == "fake-wide"

    wait(scenario())

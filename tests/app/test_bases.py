"""The switch of bases: what the page says and draws of scaled and rotated channels, when it observes them, and for whom."""

from __future__ import annotations

from dataclasses import replace

import gradio as gr
import pytest

from app.page import Page
from app.tabs.bases import basis_of, channel_at, heatmaps_of, noise_of, panels_of, shown_ranges
from app.tabs.link import go_to, place_of
from app.view import bases, plots_bases
from app.view import texts_bases as words
from core.errors import InputError, QuantscopeError
from core.options import BASES
from core.recipe import Calibration
from tests.app.tools import collect, quiet, valid

TEXT = Calibration("sotu", 1024)
SITE = "layers.1.down_in"


@pytest.fixture
def page(ctx):
    with gr.Blocks() as demo:
        page = Page(ctx)
        page.wire(demo)
    return page


@pytest.fixture
def session(ctx, page, wait):
    """A session with ranges, at a site with a massive token."""
    session = ctx.sessions.open()
    wait(collect(page.observe(session, "fake", None, TEXT)))
    session.selection.layer, session.selection.kind = 1, "down_in"
    return session


@pytest.fixture
def everywhere(session, bench):
    """The same with the ranges of all bases."""
    session.bases = bench.bases("fake", TEXT, progress=quiet)
    return session


def switch(page, session, view, tab="explore"):
    part = getattr(page, tab)
    return part.switched({page.ctx.key: session.key, part.bases.view: view})


@pytest.mark.parametrize("tab", ["explore", "reorder"])
def test_other_bases_are_observed_once_when_they_are_asked_for(page, session, wait, tab):
    assert session.bases is None
    assert not any(page.ctx.shared._kept.get("bases", ())), "opening observes nothing more"
    wait(collect(switch(page, session, "reordered", tab)))
    assert session.bases is None, "an order needs no other ranges"
    part = getattr(page, tab)
    updates = wait(collect(switch(page, session, "rotated", tab)))
    assert "other bases" in updates[0][part.bases.card]["value"], "it is said at once"
    assert list(session.bases) == list(BASES) and shown_ranges(session).basis == "rotated"
    drawn = [update[part.scatter] for update in updates if part.scatter in update]
    assert len(drawn) == 2 and drawn[0] != drawn[1]
    assert "massive" in updates[-1].get(part.bases.card, updates[-2].get(part.bases.card, {})).get("value", "").lower() or any(
        "Massive tokens" in str(update.get(part.bases.card)) for update in updates
    )
    found = session.bases
    wait(collect(switch(page, session, "scaled", tab)))
    assert session.bases is found, "observed once"
    wait(collect(page.observe(session, "fake-wide", None, TEXT)))
    assert session.bases is None or session.bases["rotated"].model == "fake-wide"

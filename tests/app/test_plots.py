"""Figures are valid for plotly in both themes, small, and show what the reports say."""

from __future__ import annotations

import base64
import json
import math
from array import array

import pytest

from app import engine
from app.view import cards, plots_clusters, plots_runs
from app.view import plots_ranges as plots
from app.view.chart import Chart
from app.view.figure import THEMES, Scale, axis_name, bytes_text, log_axis, note, number, seconds_text
from core.recipe import SITES, Clusters, QuantRecipe
from tests.app.tools import quiet, valid


@pytest.mark.parametrize("low, high", [(0.002, 0.014), (0.0168, 1.0), (3e-5, 9.0), (0.5, 0.5), (0.0, 1.0)])
def test_every_tick_of_a_logarithmic_axis_can_be_read_alone(low, high):
    axis = log_axis([high, low], "nats")
    inside = [tick for tick in axis["tickvals"] if (low or high) * 0.999 <= tick <= high * 1.001]
    assert len(axis["tickvals"]) >= 3 and (len(inside) >= 2 or low == high or low == 0)
    for tick, text in zip(axis["tickvals"], axis["ticktext"], strict=True):
        plain = text.replace("·10⁻⁵", "e-5").replace("⁻", "-").replace(",", "")
        assert float(plain) == pytest.approx(tick)
    assert log_axis([], "nats")["ticktext"]


def unpack(packed):
    """The numbers of a typed array."""
    return array("f", base64.b64decode(packed["bdata"])).tolist()


def view_of(ranges, site, count):
    return engine.recluster(ranges, site, Clusters.uniform(count))


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("clusters", [None, 1, 8, 64])
def test_scatter_shows_every_channel_once(ranges, kind, linear, clusters):
    site = ranges.sites[f"layers.1.{kind}"]
    view = view_of(ranges, site.site, clusters) if clusters else None
    figure = valid(
        plots.range_scatter(
            site, scale=plots.scale_of([site], linear=linear), limits=plots.limits_of([site]), view=view, outliers=[3]
        )
    )
    points = [t for t in figure["data"] if t["mode"] == "markers" and t.get("hoverinfo") != "skip"]
    channels = [c for t in points for c in unpack(t["customdata"])[:: 3 if view is None else 5]]
    assert sorted(channels) == list(range(len(site.low)))


def test_scatter_marks_the_chosen_channel_and_keeps_zoom_by_revision(ranges):
    site = ranges.sites["layers.0.down_in"]
    figure = valid(plots.range_scatter(site, scale=Scale(None), limits=plots.limits_of([site]), selected=7, revision="here"))
    assert unpack(figure["data"][-1]["x"]) == [pytest.approx(float(site.low[7]))]
    assert figure["layout"]["uirevision"] == "here"


def test_symmetric_log_is_odd_increasing_and_linear_near_zero():
    scale = Scale(0.01)
    values = [-1000.0, -1.0, -0.01, -1e-6, 0.0, 1e-6, 0.01, 1.0, 1000.0]
    shown = scale.map(values)
    assert shown == sorted(shown) and shown[4] == 0
    assert all(a == pytest.approx(-b) for a, b in zip(shown, reversed(shown), strict=True))
    assert scale(1000.0) - scale(100.0) == pytest.approx(1.0, abs=1e-6)
    assert scale(2e-6) == pytest.approx(2 * scale(1e-6), rel=1e-6)


@pytest.mark.parametrize("limits", [(-1e5, 1e5), (0.001, 40.0), (-3.0, -0.2), (0.0, 0.0), (-1e-12, 1e12)])
def test_ticks_are_few_and_inside_or_near_the_axis(limits):
    scale = Scale.fit([v for v in limits if v] or [1.0])
    axis = scale.axis(*limits, title="x")
    assert len(axis["tickvals"]) <= 11 and len(axis["tickvals"]) == len(axis["ticktext"])
    assert axis["range"][0] < axis["range"][1]
    assert all(math.isfinite(v) for v in axis["range"])


def test_an_axis_within_a_decade_has_ticks():
    for low, high in ((-17.6, -0.3), (-9.5, -0.9), (0.4, 8.0)):
        scale = Scale.fit([low, high])
        assert sum(low <= t <= high for t in scale.ticks(low, high)) >= 3


def test_scale_of_constant_and_empty_values_is_linear():
    assert Scale.fit([0.0, 0.0]).threshold is None
    assert Scale.fit([]).threshold is None


def test_heatmap_bins_wide_sites_by_their_maximum(wide_ranges):
    matrix = wide_ranges.heatmap("down_in")
    figure = valid(plots.heatmap(matrix, kind_label="MLP hidden", layer=2, channel=5))
    trace = figure["data"][0]
    assert trace["dx"] == 15 and max(unpack(trace["z"])) == pytest.approx(float(matrix.max()))


def test_channel_histogram(bench):
    from core.recipe import Calibration

    detail = bench.channel("fake", Calibration("sotu", 1024), "layers.1.v", 5, progress=quiet)
    figure = valid(plots.channel_histogram(detail))
    assert figure["layout"]["yaxis"]["type"] == "log" and len(figure["data"]) == 1
    step = detail.high - detail.low
    figure = valid(plots.channel_histogram(detail, [detail.low - step, detail.low, detail.high], "two levels"))
    assert figure["data"][1]["x"] == [detail.low, detail.low, None, detail.high, detail.high, None]
    assert figure["layout"]["title"]["text"] == "two levels"


@pytest.mark.parametrize("kind", ["v", "down_in"])
@pytest.mark.parametrize("clusters", [4, 64])
def test_strips_cover_all_positions_before_and_after(ranges, kind, clusters):
    site = ranges.sites[f"layers.1.{kind}"]
    view = view_of(ranges, site.site, clusters)
    figure = valid(plots_clusters.reorder_strips(view, scale=plots.scale_of([site], linear=False)))
    before, after, top, bottom = figure["data"]
    assert before["width"] * len(unpack(before["x"])) >= len(site.low)
    assert len(unpack(before["x"])) == len(unpack(after["x"])) <= plots_clusters.STRIP_COLUMNS
    assert len(unpack(top["x"])) == len(unpack(bottom["x"])) == 2 * len(view.clusters)


def test_labels_of_per_head_sites_are_shared_between_heads(ranges):
    view = view_of(ranges, "layers.1.v", 32)
    assert plots_clusters.label_count(view) == 4 and len(view.clusters) == 12
    assert sorted(c for _, _, channels in plots_clusters.groups_of(view) for c in channels) == list(range(192))


def test_error_curve_marks_the_chosen_count(ranges):
    curve = engine.error_curve(ranges, "layers.1.down_in")
    assert engine.error_curve(ranges, "layers.1.down_in") is curve
    figure = valid(plots_clusters.error_curve(curve, current=8, error=0.1))
    assert figure["data"][-1]["x"] == [8] and figure["data"][-1]["y"] == [0.1]


def run_reports(bench):
    """A quantised run's reports."""
    recipe = QuantRecipe("fake", clusters=Clusters.uniform(8))
    report = bench.quantize(recipe, progress=quiet)
    return report, bench.evaluate(report.key, reference="fake", progress=quiet), bench.evaluate("fake", progress=quiet)


def test_run_charts(bench):
    report, quantized, base = run_reports(bench)
    figure = valid(plots_runs.layer_sqnr([(1, "run", report), (2, "other", report)]))
    assert figure["data"][0]["line"]["color"] == "@run1" and figure["data"][2]["line"]["color"] == "@run2"
    assert figure["data"][1]["x"] == [2]  # the layer that fell back
    valid(plots_runs.site_sqnr(report, [(k, k) for k in SITES]))
    bars = valid(plots_runs.bytes_bars([("base", base.weight_parts, None), ("run", quantized.weight_parts, 7e7)]))
    total = sum(x for t in bars["data"] if t["type"] == "bar" for x in t["x"][1:])
    assert total == pytest.approx(quantized.weight_bytes / 1e6)
    assert bars["data"][-1]["name"] == "formula's estimate"
    alone = valid(plots_runs.bytes_bars([("run", quantized.weight_parts, None)]))
    colours = {t["name"]: t["marker"]["color"] for t in bars["data"]}
    assert all(colours[t["name"]] == t["marker"]["color"] for t in alone["data"]) and len(set(colours.values())) == len(colours)
    assert set(quantized.weight_parts) | set(base.weight_parts) == set(plots_runs.PARTS)


def test_a_fallback_is_named_once_and_long_names_are_cut_but_shown_to_the_pointer(bench):
    report, _, _ = run_reports(bench)
    figure = valid(plots_runs.layer_sqnr([(place, "a name " * 12, report) for place in (1, 2, 3)]))
    named = [t["name"] for t in figure["data"] if t.get("showlegend", True)]
    assert named.count("fell back to round-to-nearest") == 1 and all(len(name) <= 32 for name in named)
    shown = [t["meta"] for t in figure["data"] if t["mode"] != "markers"]
    assert shown == 3 * [axis_name(report.label)]


def luminance(colour):
    """Relative luminance of "#rrggbb"."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", THEMES)
def test_twelve_runs_have_colours_that_differ_from_each_other_and_from_the_panel(theme):
    colours = [THEMES[theme][plots_runs.run_colour(place)[1:]] for place in range(13)]
    assert len(set(colours)) == 13
    for colour in colours:
        low, high = sorted((luminance(colour), luminance(THEMES[theme]["panel"])))
        assert (high + 0.05) / (low + 0.05) > 2.8
    channels = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours]
    near = [math.dist(a, b) for i, a in enumerate(channels) for b in channels[:i]]
    assert min(near) > 35


def test_moving_averages_say_so_in_title_and_axes(ranges):
    site = ranges.sites["layers.1.down_in"]
    for shown, words in ((site, "channel minimum"), (site.averaged(), "average channel minimum")):
        layout = valid(plots.range_scatter(shown, scale=Scale(None), limits=plots.limits_of([shown])))["layout"]
        assert layout["xaxis"]["title"]["text"] == words and ("averaged" in layout["title"]["text"]) == shown.is_average
        facts = cards.channel_facts(shown, 3, 1.0)
        assert ("average range" in facts) == shown.is_average and number(float(shown.high[3])) in facts


def test_bars_of_many_clusters_are_coloured_by_names_of_colours(ranges):
    site = ranges.sites["layers.1.down_in"]
    figure = plots_clusters.reorder_strips(view_of(ranges, site.site, 64), scale=Scale(None))
    for strip in figure["data"][:2]:
        colours = strip["marker"]["color"]
        assert len(colours) == len(unpack(strip["x"])) and all(c.startswith("@ordered:") for c in colours)
        assert "colorscale" not in strip["marker"]
    widest = [c for *_, c in zip(*[iter(unpack(figure["data"][1]["customdata"]))] * 4, strict=True)]
    assert figure["data"][1]["marker"]["color"] == [f"@ordered:{c / 63:.4f}" for c in widest]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (-1.5, "−1.50"),
        (1234.5, "1,234"),
        (1.5e-7, "1.50·10⁻⁷"),
        (float("inf"), "∞"),
        (100.0, "100"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3e-6, "3.00 µs"), (0.0125, "12.5 ms"), (2.5, "2.5 s"), (30, "30 s"), (200, "3 min 20 s"), (1200, "20 min")],
)
def test_durations_for_people(seconds, text):
    assert seconds_text(seconds) == text


def test_bytes_for_people():
    assert [bytes_text(v) for v in (12, 1500, 538_060_032, 2.6e10)] == ["12 B", "1.50 kB", "538 MB", "26.0 GB"]


def test_the_chart_carries_json_and_never_not_a_number():
    chart = Chart(note("hello"), label="x")
    assert json.loads(chart.postprocess(note("hello")))["layout"]["annotations"][0]["text"] == "hello"
    with pytest.raises(ValueError, match="JSON"):
        chart.postprocess({"data": [{"y": [float("nan")]}]})


def test_a_slider_move_on_4096_channels_writes_packed_numbers_alone(wide_ranges):
    """What a move costs grows with what is written: arrays go as packed bytes, and Python counts clusters, never channels."""
    site = wide_ranges.sites["layers.1.attn_in"]
    assert len(site.low) == 4096
    scale = plots.scale_of([site], linear=False)
    for count in (8, 64):
        view = view_of(wide_ranges, site.site, count)
        figure = plots.range_scatter(site, scale=scale, limits=plots.limits_of([site]), view=view)
        strips = plots_clusters.reorder_strips(view, scale=scale)
        assert scalars(figure) < 1500 and scalars(strips) < 1500
        assert len(json.dumps(figure)) < 220_000 and len(json.dumps(strips)) < 80_000


def scalars(node):
    """Numbers and texts of a figure that are written one by one."""
    if isinstance(node, dict):
        return sum(map(scalars, node.values()))
    return sum(map(scalars, node)) if isinstance(node, (list, tuple)) else 1

"""Bytes against divergence: the frontier, which runs are drawn, and the files of the numbers."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import gradio as gr
import pytest

from app.session import Protocol, Run
from app.tabs.pareto import Pareto
from app.view import cards, tables
from app.view.plots_pareto import frontier, pareto
from app.view.tables import Measured
from core.errors import InputError
from core.recipe import QuantRecipe
from tests.app.tools import quiet, valid

PROTOCOL, OTHER = Protocol("sotu", 2048, 512), Protocol("sotu", 8192, 512)


@pytest.fixture
def report(bench):
    return bench.evaluate("fake", reference="fake", progress=quiet)


@pytest.fixture
def rows(report):
    """Three runs, of which the second is larger and worse than the first; the last is of another model."""
    facts = [("a", 20e6, 0.2, "fake"), ("b", 30e6, 0.4, "fake"), ("c", 40e6, 0.1, "fake"), ("d", 50e6, 0.5, "other")]
    fields = ("weight_bytes", "kld_mean", "reference")
    reports = [replace(report, kld_stderr=0.01, **dict(zip(fields, fact[1:], strict=True))) for fact in facts]
    return [Measured(name, f"{name} in full", one, place=i) for i, (name, one) in enumerate(zip("abcd", reports, strict=True))]


@pytest.fixture
def view(ctx):
    with gr.Blocks():
        return Pareto(ctx)


@pytest.fixture
def session(ctx, report):
    """The float model and three quantised runs, the last of which was measured in another way."""
    session = ctx.sessions.open()
    session.protocol = PROTOCOL
    session.add_run(Run("fake", "fake")).measure(PROTOCOL, replace(report, kld_mean=None, kld_stderr=None, reference=None))
    for seed, protocol in enumerate((PROTOCOL, PROTOCOL, OTHER)):
        recipe = QuantRecipe("fake", method="rtn", seed=seed)
        session.add_run(Run(recipe.hash, recipe.label(), recipe)).measure(protocol, replace(report, kld_mean=0.1 + seed))
    return session


@pytest.mark.parametrize(
    "points, best",
    [
        ([], []),
        ([(2, 0.4), (1, 0.5), (3, 0.1)], [(1, 0.5), (2, 0.4), (3, 0.1)]),
        ([(1, 0.2), (2, 0.3), (3, 0.1)], [(1, 0.2), (3, 0.1)]),
        ([(1, 0.2), (1, 0.1), (2, 0.1)], [(1, 0.1)]),
    ],
)
def test_the_frontier_has_no_run_that_another_beats(points, best):
    assert frontier(points) == best


def test_the_chart_shows_every_run_with_its_error_and_a_line_for_each_float_model(rows):
    first, second, points = valid(pareto(rows, "weight_bytes"))["data"]
    assert (first["x"], first["y"]) == ([20, 40], [0.2, 0.1]) and (second["x"], second["y"]) == ([50], [0.5])
    assert sorted(points["x"]) == [20, 30, 40, 50] and points["error_y"]["array"] == [0.01] * 4
    (told,) = (text for text, x in zip(points["text"], points["x"], strict=True) if x == 30)
    assert "<b>b</b>" in told and "0.400 ± 0.010 nats" in told and "30.0 MB" in told
    by_cache = valid(pareto(rows, "kv_bytes_per_token"))["data"][-1]
    assert set(by_cache["x"]) == {rows[0].report.kv_bytes_per_token / 1e3}


def test_an_exact_run_is_drawn_on_a_linear_axis(rows):
    exact = [replace(rows[0], report=replace(rows[0].report, kld_mean=0.0)), *rows[1:]]
    assert pareto(rows, "weight_bytes")["layout"]["yaxis"]["type"] == "log"
    assert pareto(exact, "weight_bytes")["layout"]["yaxis"]["type"] == "linear"


def test_runs_measured_in_another_way_are_not_drawn(view, session):
    shown = view.render(session)
    assert shown[view.chart]["visible"] and len(shown[view.chart]["value"]["data"][-1]["x"]) == 2
    session.protocol = OTHER
    assert not view.render(session)[view.chart]["visible"] and view.render(session)[view.row]["visible"]


def test_the_bytes_of_the_chart_can_be_chosen(view, session):
    turned = view.turned({"key": session.key, view.size: "kv_bytes_per_token"})
    assert "KV" in turned[view.chart]["value"]["layout"]["xaxis"]["title"]["text"]
    assert view.render(session)[view.size] == "kv_bytes_per_token"
    with pytest.raises(InputError, match="weight_bytes"):
        view.turned({"key": session.key, view.size: "bytes"})


def test_files_hold_every_measurement_in_full_precision(view, session):
    values = {"key": session.key}
    listed = json.loads(view.json_file(values)[view.saved]["text"])
    assert [entry["kld_mean"] for entry in listed] == [None, 0.1, 1.1, 2.1]
    assert {"delta_p_mean", "delta_p_rms_stderr", "kld_50", "kld_99.9"} <= listed[1].keys()
    assert listed[1]["run"] == session.title(session.runs[1]) and listed[1]["windows_id"] != ""
    table = list(csv.DictReader(io.StringIO(view.csv_file(values)[view.saved]["text"])))
    assert [row["kld_mean"] for row in table] == ["", "0.1", "1.1", "2.1"] and list(table[0]) == list(listed[0])
    session.runs[1].name = "=1+1"
    assert "'=1+1" in view.csv_file(values)[view.saved]["text"]
    session.runs.clear()
    with pytest.raises(InputError, match="Measure"):
        view.csv_file(values)


def test_cells_carry_the_values_that_sort_them(rows):
    headers, cells = tables.number_rows(rows)
    page = cards.table(headers, cells, keys=tables.number_keys(rows))
    assert page.count("aria-sort='none'") == len(headers) and 'data-key="0.4"' in page and 'data-key="30000000.0"' in page
    assert page.count('<td data-key="">') == 4  # by formula
    assert "aria-sort" not in cards.table(headers, cells) and "data-key" not in cards.table(headers, cells)

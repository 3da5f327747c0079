"""Tables say what was measured and what was not; files are safe to open; foreign text never becomes markup."""

from __future__ import annotations

import csv
import io
import json

import pytest

from app.session import Run
from app.view import cards, tables
from app.view.tables import Estimate
from app.worker.job import JobView
from core.errors import Cancelled, InputError, ModelError
from core.recipe import QuantRecipe

EVIL = "<img src=x onerror=alert(1)>"


def quiet(*_):
    """No progress."""


def job(state="running", **more):
    base = {
        "stage": "Layer 2 of 6",
        "fraction": 0.5,
        "elapsed_s": 4.0,
        "remaining_s": 4.0,
        "ahead": 0,
        "results": (),
        "texts": ("",),
    }
    return JobView(state, **(base | more))


@pytest.fixture
def run(bench):
    recipe = QuantRecipe("fake")
    report = bench.quantize(recipe, progress=quiet)
    return Run(report.key, report.label, recipe, report, bench.evaluate(report.key, reference="fake", progress=quiet))


def test_numbers_carry_units_and_estimates_are_marked(run):
    rows = tables.number_rows([(run.label, run.evaluation, 7e7)])
    assert len(rows[0]) == len(tables.NUMBER_HEADERS)
    assert "±" in rows[0][1] and rows[0][2].endswith("nats") and rows[0][3].endswith("%") and rows[0][-1].endswith("tokens/s")
    assert rows[0][5] == Estimate("70.0 MB")
    page = cards.table(tables.NUMBER_HEADERS, rows, colours=[1])
    assert '<span class="qs-estimate" title="by formula, not measured">≈ 70.0 MB</span>' in page


def test_missing_comparisons_are_dashes(bench):
    row = tables.number_rows([("base", bench.evaluate("fake", progress=quiet), None)])[0]
    assert row[2] == row[3] == row[5] == "–"


def test_a_single_window_has_no_standard_error(bench):
    from dataclasses import replace

    report = replace(bench.evaluate("fake", progress=quiet), perplexity_stderr=0.0)
    assert tables.number_rows([("base", report, None)])[0][1] == "17.60 ± –"


def test_fallbacks_stages_and_backends(run):
    assert [row[0] for row in tables.fallback_rows(run.quantize)] == ["2"]
    assert tables.stage_rows(run.quantize)[0] == ["calibration", "1.20 s"]
    assert tables.backend_rows(run.quantize) == [["reference", "42", "no CUDA device"]]


def test_ranges_file_has_every_channel_and_round_trips(ranges):
    rows = list(csv.DictReader(io.StringIO(tables.ranges_csv(ranges))))
    assert len(rows) == sum(len(s.low) for s in ranges.sites.values())
    last = rows[-1]
    site = ranges.sites[last["site"]]
    assert float(last["maximum"]) == float(site.high[int(last["channel"])])


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_no_cell_is_a_formula(text):
    assert tables.safe_cell(text) == "'" + text
    assert tables.safe_cell("plain = text") == "plain = text"


def test_report_file_is_json_with_recipes(run):
    data = json.loads(tables.report_json([Run("fake", "fake"), run]))
    assert data["runs"][0]["recipe"] is None
    assert QuantRecipe.from_dict(data["runs"][1]["recipe"]) == run.recipe
    assert data["runs"][1]["evaluation"]["perplexity"] > 0


def test_foreign_text_is_escaped_everywhere(ranges, bench, run):
    from dataclasses import replace

    from core.recipe import Calibration

    detail = bench.channel("fake", Calibration("sotu", 1024), "layers.1.v", 5, progress=quiet)
    info = bench.load("fake", progress=quiet)
    pieces = [
        cards.error_card(ModelError(EVIL)),
        cards.stopped(replace(info, name=EVIL), replace(ranges, text_name=EVIL)),
        cards.progress(job(stage=EVIL), EVIL),
        cards.idle(replace(info, name=EVIL, architecture=EVIL), replace(ranges, text_name=EVIL)),
        cards.table([EVIL], [[EVIL], [Estimate(EVIL)]], caption=EVIL),
        cards.streams([(1, EVIL, EVIL, EVIL, EVIL)]),
        cards.run_summary(replace(run.quantize, calibration=EVIL), EVIL, 1),
        cards.extremes(detail),
        cards.protocol(EVIL),
        cards.hint(EVIL),
        cards.caution(EVIL),
        cards.headed(EVIL, 1, ""),
    ]
    for piece in pieces:
        assert "<img" not in piece and "<b>nation" not in piece


def test_status_lines():
    assert "2 jobs ahead" in cards.progress(job("waiting", ahead=2), "Opening")
    line = cards.progress(job(), "Opening")
    assert "Layer 2 of 6" in line and "about 4.0 s left" in line and "width:50.0%" in line
    assert "qs-error" in cards.error_card(InputError("No.")) and "qs-error" not in cards.error_card(Cancelled())


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0.2 s"), (45, "45 s"), (125, "2 min 05 s"), (4000, "67 min")])
def test_durations(seconds, text):
    assert cards.seconds_text(seconds) == text

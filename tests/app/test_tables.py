"""Tables say what was measured and what was not; files are safe to open; foreign text never becomes markup."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from app.session import Protocol, Run
from app.view import cards, tables
from app.view.figure import number
from app.view.tables import Estimate, Hover, Measured
from app.worker.job import JobView
from core.errors import Cancelled, InputError, ModelError
from core.evaluation.paired import PairedRatio
from core.recipe import QuantRecipe
from tests.app.tools import quiet

PROTOCOL = Protocol("sotu", 2048, 512)
EVIL = "<img src=x onerror=alert(1)>"


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
    made = Run(report.key, report.label, recipe, report)
    made.measure(PROTOCOL, bench.evaluate(report.key, reference="fake", progress=quiet))
    return made


def measured(report, **more):
    return Measured("run", "the run in full", report, **more)


def test_numbers_carry_units_and_estimates_are_marked(run, bench):
    headers, rows = tables.number_rows([measured(run.evaluation, estimate=7e7)])
    row = dict(zip(headers, rows[0], strict=True))
    assert "±" in row["perplexity"] and row["tokens/s"] == "210"
    assert "± " in row["KLD, nats"].text and row["same top token"].endswith("%")
    spread, change, found = row["median, 99 %, 99.9 %"].text.split(" · "), row["Δp rms, %"], run.evaluation
    assert spread == [number(found.kld_quantiles[name], 2) for name in ("50", "99", "99.9")]
    assert float(change.text.split(" ± ")[0]) / 100 == pytest.approx(found.delta_p_rms, 0.05)
    assert change.hover.startswith("mean: −1.20 ± 0.21") and found.delta_p_mean == -0.012
    assert "median" in row["KLD, nats"].hover and "times the perplexity" in row["against float"].hover
    assert row["by formula"] == Estimate("70.0 MB") and row["run"] == Hover("run", "the run in full")
    assert row["against float"].text.startswith("×1.07 (ln 0.0") and "measured on" not in headers
    page = cards.table(headers, rows, colours=[1])
    assert '<span class="qs-estimate" title="by formula, not measured">≈ 70.0 MB</span>' in page
    assert '<span title="the run in full">run</span>' in page


def test_missing_comparisons_are_dashes(bench):
    headers, rows = tables.number_rows([measured(bench.evaluate("fake", progress=quiet))])
    row = dict(zip(headers, rows[0], strict=True))
    spread = ("median, 99 %, 99.9 %", "Δp rms, %")
    assert {row[name] for name in (*spread, "against float", "KLD, nats", "same top token", "by formula")} == {"–"}


def test_a_single_window_has_no_standard_error(bench):
    from dataclasses import replace

    report = replace(bench.evaluate("fake", progress=quiet), perplexity_stderr=0.0)
    assert tables.number_rows([measured(report)])[1][0][1] == "17.60 ± –"


def test_rows_of_another_protocol_are_marked_and_named(bench):
    report = bench.evaluate("fake", progress=quiet)
    rows = [measured(report, protocol="2,048 tokens"), measured(report, protocol="8,192 tokens", other=True)]
    headers, cells = tables.number_rows(rows)
    assert headers[-1] == "measured on" and [row[-1] for row in cells] == ["2,048 tokens", "8,192 tokens"]
    assert [row[0].text for row in cells] == ["run", "run †"]


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (23.9, "unchanged"),
        (23.0, "fell"),
        (26.3, "rose by 10 %"),
        (47.58, "doubled"),
        (60.0, "more than doubled"),
        (72.0, "tripled"),
        (120.0, "5.0 times"),
        (9999.0, "broken"),
            ],
)
def test_a_verdict_says_the_ratio_in_words(after, words):
    said = cards.verdict(after, PairedRatio(math.log(after / 23.95), 1e-6, 4), "2,048 tokens")
    assert words in said and "23.95 →" in said and "2,048 tokens" in said
    vague = cards.verdict(after, PairedRatio(math.log(after / 23.95), 1e9, 4), "2,048 tokens")
    assert "can tell" in vague
    if words == "doubled":
        assert "47.58 (×1.99)" in said


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
        cards.streams([(1, EVIL, EVIL, (EVIL, EVIL, EVIL), EVIL)]),
        cards.run_summary(replace(run.quantize, calibration=EVIL), EVIL, 1),
        cards.extremes(detail),
        cards.protocol(EVIL),
        cards.hint(EVIL),
        cards.caution(EVIL),
        cards.headed(EVIL, 1, ""),
        cards.verdict(2.0, PairedRatio(0.7, 0.1, 4), EVIL),
        cards.note(EVIL, EVIL),
        cards.command(EVIL),
        cards.footer(EVIL),
        cards.intro(replace(info, name=EVIL), EVIL),
        cards.table(["a"], [[Hover(EVIL, EVIL)]]),
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

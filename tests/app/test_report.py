"""The HTML report: one file that loads nothing, without a visitor's text unless it is chosen, from page and command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import gradio as gr
import pytest

from app.report import report_html
from app.session import Protocol, Run, Session
from app.tabs.sidebar import Sidebar
from app.view import plots_runs
from app.view.svg import Axis, draw
from core.errors import InputError
from core.recipe import Calibration, QuantRecipe
from tests.app.tools import quiet

WORDS = "my diary of secret words"
OWN = "text:" + WORDS * 60


def made(bench, text: str = "sotu") -> Session:
    """A model and two quantised runs, all measured on a text."""
    session = Session(protocol=Protocol(text, 2048, 512))
    session.models["fake"] = bench.load("fake", progress=quiet)
    session.add_run(Run("fake", "fake")).measure(session.protocol, bench.evaluate("fake", text=text, progress=quiet))
    for scheme in ("W4A4", "W3A3KV"):
        recipe = QuantRecipe("fake", scheme=scheme, calibration=Calibration(text, 512))
        report = bench.quantize(recipe, progress=quiet)
        run = session.add_run(Run(recipe.hash, recipe.label(), recipe, quantize=replace(report, recipe=recipe.to_record())))
        run.measure(session.protocol, bench.evaluate(recipe.hash, text="your text", reference="fake", progress=quiet))
    return session


class Loads(HTMLParser):
    """Collects what a page would ask for, its scripts, and its tags that are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.found += [tag] * (tag in ("script", "link", "iframe", "img")) + [v for k, v in named.items() if k in ("src", "href")]
        self.open += [] if tag in ("meta", "br", "i", "rect", "circle", "path") else [tag]

    def handle_endtag(self, tag):
        assert tag in ("i", "rect", "circle", "path") or self.open.pop() == tag


def test_the_report_is_one_file_that_loads_nothing(bench):
    text = report_html(made(bench))
    page = Loads(text)
    assert not page.found and not page.open and "url(" not in text and "default-src 'none'" in text
    assert len(text) < 200_000 and text.count("<svg") == 3
    for said in ("made up for tests", "134,515,008", "2,048 tokens", "KLD, nats", "--scheme W3A3KV", "same top token"):
        assert said in text, said
    recipes = [json.loads(found.replace("&quot;", '"')) for found in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    assert [recipe["scheme"] for recipe in recipes] == ["W4A4", "W3A3KV"]
    assert QuantRecipe.from_dict(recipes[1]).scheme == "W3A3KV"


def test_a_visitors_text_is_in_the_report_only_if_chosen(bench):
    session = made(bench, OWN)
    hidden = report_html(session)
    assert WORDS not in hidden and WORDS[:12] not in hidden and "pasted:sha256=" in hidden and "my-text.txt" in hidden
    assert WORDS in report_html(session, own_text=True)
    assert session.runs[1].recipe.calibration.text == OWN, "the session is as before"


def test_foreign_words_are_escaped(bench):
    session = made(bench)
    session.runs[1].name = "<script>alert(1)</script>"
    session.models["fake"] = replace(session.models["fake"], label="<img src=x>", source="</style><script>")
    assert not Loads(report_html(session)).found


def test_the_page_offers_it(ctx, bench):
    with gr.Blocks():
        share = Sidebar(ctx).share
    session = ctx.sessions.open()
    with pytest.raises(InputError, match="no run"):
        share.html_file({ctx.key: session.key, share.own_text: False})
    session.runs, session.protocol, session.models = made(bench, OWN).runs, Protocol(OWN, 2048, 512), {}
    for chosen in (False, True):
        file = share.html_file({ctx.key: session.key, share.own_text: chosen})[share.saved]
        assert file["name"].endswith(".html") and file["type"] == "text/html" and (WORDS in file["text"]) == chosen


def test_compare_and_evaluate_write_it(call, place):
    code, _, said = call(
        "compare", "--models", "base", "made", "--text", "text.txt", "--tokens", "64", "--window", "32", "--html", "r.html"
    )
    text = (place / "r.html").read_text(encoding="utf-8")
    assert code == 0 and not said and text.count("<svg") >= 2 and not Loads(text).found
    assert "--clusters R1=8" in text and str(place) not in text
    assert (
        call("evaluate", "--model", "base", "--text", "text.txt", "--tokens", "64", "--window", "32", "--html", "e.html")[0] == 0
    )
    assert "perplexity" in (place / "e.html").read_text(encoding="utf-8")
    code, _, said = call("evaluate", "--model", "base", "--html", "nowhere/r.html")
    assert code == 2 and "E-PARAM-HTML" in said and said.count("\n") == 1


def numbers_of(svg: str, tag: str, key: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<{tag} [^>]*?\b{key}="([\d.]+)"', svg)]


def test_bars_and_points_stand_where_their_numbers_are():
    bars = plots_runs.bytes_bars([("a", {"packed weights": 10_000_000, "norms, biases and orders": 30_000_000}, None),
                                  ("b", {"packed weights": 80_000_000}, None)])  # fmt: skip
    svg = draw(bars, label="bytes", height=240)
    widths = [w for w, h in zip(numbers_of(svg, "rect", "width"), numbers_of(svg, "rect", "height"), strict=True) if h > 10]
    assert sorted(round(w / min(widths), 1) for w in widths) == [1, 3, 8]
    svg = draw(plots_runs.layer_sqnr([(1, "a", report_of([10, 20, None, 40]))]), label="dB")
    left, top = numbers_of(svg, "circle", "cx"), numbers_of(svg, "circle", "cy")
    assert len(left) == 3 and left[2] - left[0] == pytest.approx(3 * (left[1] - left[0]), abs=0.3)
    assert top[0] - top[2] == pytest.approx(3 * (top[0] - top[1]), abs=0.3) and top[0] > top[2], "more is higher"
    assert draw({"data": [], "layout": {}}, label="nothing") == ""


def report_of(decibels: list) -> object:
    from core.report import LayerReport

    entries = [LayerReport(i, value if value is not None else float("inf"), {}, {}) for i, value in enumerate(decibels)]
    return type("Report", (), {"layers": entries, "label": "a"})()


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 7, False), (-3e-5, 2e-5, False), (1e-4, 9e3, True), (0.02, 0.05, True), (0.036, 0.039, True), (5, 5, False)],
)
def test_axes_have_ticks_inside(low, high, log):
    axis = Axis.around([low, high], 0, 100, log=log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12 and all(-0.1 <= axis(tick) <= 100.1 for tick in ticks)
    assert axis(low) <= axis(high) and 0 < axis(low) < 100

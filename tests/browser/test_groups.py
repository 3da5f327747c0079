"""Costs by cluster count, two calibrations, and the keys of the cost map, in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import drawn, open_tab, quantise, redrawn, status

pytestmark = pytest.mark.browser

SAID = "([id, words]) => document.querySelector(id)?.textContent.includes(words)"
FITS = "document.documentElement.scrollWidth <= innerWidth"


@pytest.mark.parametrize("width, theme", [(1440, "light"), (390, "dark")])
def test_a_site_is_priced_by_its_number_of_clusters(visit, width, theme):
    page = visit(f"?__theme={theme}", width=width, height=844)
    open_tab(page, "Reorder", "#strips")
    page.wait_for_function(SAID, arg=["#knee", "Predicted divergence"])
    page.locator("#reorder-site").get_by_text("MLP hidden").click()
    page.wait_for_function("() => document.querySelectorAll('#errors tbody tr').length === 11")
    page.wait_for_function(SAID, arg=["#knee", "Predicted divergence: the knee is at g = 8, 0.0110 nats."])
    said = page.locator("#knee").inner_text()
    assert "never cost as little" in said and "Squared error: " in said
    rows = page.locator("#errors tbody tr").all_inner_texts()
    assert rows[0].startswith("one grid") and rows[-1].startswith("per channel") and rows[4].split()[0] == "8" and len(rows) == 11
    page.wait_for_function(SAID, arg=["#nats .legend", "knee, g = 8"])
    assert page.evaluate(FITS)
    page.locator("#everywhere input").check()
    page.wait_for_function(SAID, arg=["#knee", "g = 8, 0.0660 nats"])
    page.locator("#reorder-site").get_by_text("queries").click()
    page.wait_for_function("() => document.querySelectorAll('#errors tbody tr').length === 9")


def test_dragging_g_leaves_the_costs_as_they_are(visit):
    page = visit()
    open_tab(page, "Reorder", "#strips")
    page.wait_for_function(SAID, arg=["#knee", "Predicted divergence"])
    before = {chart: drawn(page, chart) for chart in ("#strips", "#nats")}
    page.locator("#g input[type=range]").focus()
    page.keyboard.press("Home")
    redrawn(page, "#strips", before["#strips"])
    redrawn(page, "#curve", 1)
    assert drawn(page, "#nats") == before["#nats"]


@pytest.mark.parametrize("width, theme", [(1440, "light"), (390, "dark")])
def test_two_calibrations_beside_each_other(visit, width, theme):
    page = visit(f"?__theme={theme}", width=width, height=844)
    open_tab(page, "Quantise", "#where")
    page.get_by_text("Compare two calibration texts").click()
    page.locator("#pair-start").click()
    page.wait_for_function(SAID, arg=["#pair", "0.1000 ± 0.0010 nats with A and 0.1500 ± 0.0010 with B"])
    page.wait_for_selector("#pair-map .qs-chart[data-drawn]")
    assert page.locator("#pair .qs-gauge").count() == 4 and page.evaluate(FITS)
    page.locator("#pair-table tbody tr", has_text="keys").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(SAID, arg=["#pair-widths .gtitle", "layer 2, keys"])
    page.locator("#pair-map .qs-chart").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function(SAID, arg=["#pair-widths .gtitle", "layer 0, queries"])
    assert page.evaluate(FITS)


def test_a_text_of_ones_own_may_be_the_second(visit):
    page = visit()
    open_tab(page, "Quantise", "#where")
    page.get_by_text("Compare two calibration texts").click()
    page.locator("#pair-text input").click()
    page.get_by_role("option", name="Paste my own").last.click()
    page.locator("#pair-pasted textarea").fill("too little")
    page.locator("#pair-start").click()
    status(page, "Paste more")
    page.locator("#pair-pasted textarea").fill("seven quiet houses stood beside the river " * 400)
    page.locator("#pair-start").click()
    page.wait_for_function(SAID, arg=["#pair", "tokens of pasted text"])


def test_arrow_keys_walk_over_the_cost_map_and_enter_opens_the_cell(visit):
    page = visit()
    open_tab(page, "Quantise", "#where")
    page.wait_for_function(SAID, arg=["#cost", "0.100 ± 0.00100 nats"])  # the last of its drawings
    page.wait_for_function("() => !window.quantscopeTurns.busy")
    chart = page.locator("#where .qs-chart")
    chart.focus()
    assert page.locator("#where .shapelayer path").count() == 0
    page.keyboard.press("ArrowRight")  # two cells have a cost: keys of layer 3 and, below, MLP hidden of layer 1
    page.wait_for_function(SAID, arg=["#where .qs-said", "keys"])
    assert "layer 3" in page.locator("#where .qs-said").inner_text()
    page.keyboard.press("ArrowDown")
    page.wait_for_function(SAID, arg=["#where .qs-said", "MLP hidden"])
    frame = page.locator("#where .shapelayer path")
    assert frame.count() == 2 and "layer 1" in page.locator("#where .qs-said").inner_text()
    cell, map_ = frame.last.bounding_box(), page.locator("#where .nsewdrag").bounding_box()
    across, down = cell["x"] - map_["x"] - map_["width"] / 6, cell["y"] - map_["y"] - map_["height"] / 2
    assert abs(across) < 12 and abs(down) < 12  # as wide as its line
    page.locator("#swaps").focus()
    page.wait_for_function("() => document.querySelectorAll('#where .shapelayer path').length === 0")
    chart.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_function(SAID, arg=["#facts h2", "Layer 1 · MLP hidden"])


def test_the_smallest_g_and_the_rank_of_a_verified_run(visit):
    page = visit()
    quantise(page)  # a uniform run to be compared with
    open_tab(page, "Quantise", "#where")
    page.get_by_text("Spend a budget").click()
    page.locator("#find-g").click()
    page.wait_for_function(SAID, arg=["#smallest-g", "g = 11 is the smallest within 5.00 %"])
    page.locator("#within input").fill("-3")
    page.locator("#find-g").click()
    status(page, "0 to 1000")
    page.locator("#spend").click()
    page.wait_for_function(SAID, arg=["#spent", "measured on the probe"])
    page.locator("#use-spent").click()
    page.wait_for_function(SAID, arg=["#cost h2", "layers.0.k=3"])
    assert "Verified" not in page.locator("#spent").inner_text()
    page.locator("#side-quantize").click()
    page.wait_for_function(SAID, arg=["#spent", "among this run and the uniform ones on the same text"])

"""Runs compared by bytes and divergence in a real browser: a chart, a table that sorts, numbers as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser.page_tools import drawn, open_tab, quantise, redrawn

pytestmark = pytest.mark.browser

PLACES = "() => [...document.querySelectorAll('#numbers tbody tr')].map(row => row.cells[0].innerText.trim())"


def sorted_by(page, header):
    head = page.locator("#numbers th", has_text=header)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    return head.get_attribute("aria-sort"), page.evaluate(PLACES)


def test_runs_are_set_against_each_other(visit):
    page = visit()
    quantise(page)
    page.locator("#scheme input").click()
    page.get_by_role("option", name="W3A3KV", exact=True).click()
    page.locator("#side-quantize").click()
    page.wait_for_selector("#quick-numbers tbody tr:nth-child(3)")
    page.locator("#side .toggle-button").click()  # open, it covers a phone's whole page
    page.set_viewport_size({"width": 390, "height": 900})
    open_tab(page, "Compare", "#pareto")
    before = drawn(page, "#pareto")
    points = "() => document.querySelector('#pareto .qs-chart').data.at(-1).x.length"
    assert page.evaluate(points) == 2
    page.locator("#pareto .qs-chart").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => /W[34]A[34].*nats.*MB/.test(document.querySelector('#pareto .qs-said').innerText)")
    page.get_by_label("KV cache per token").click()
    redrawn(page, "#pareto", before)
    names = page.evaluate(PLACES)
    assert sorted_by(page, "KLD") == ("ascending", [names[1], names[2], names[0]])  # the float model has none: last
    assert sorted_by(page, "KLD") == ("descending", [names[2], names[1], names[0]])
    assert sorted_by(page, "bytes measured")[1] == [names[2], names[1], names[0]]
    page.locator("#runs label", has_text="fake").click()
    page.wait_for_function(f"names => JSON.stringify(({PLACES})()) === JSON.stringify(names)", arg=[names[2], names[1]])
    with page.expect_download() as download:
        page.locator("#numbers-json").click()
    assert {entry["run"] for entry in json.loads(Path(download.value.path()).read_text())} == set(names)

"""Memory projected to any size in a real browser: every control moves charts and tables, on a desk and on a phone."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import drawn, open_tab, redrawn

pytestmark = pytest.mark.browser


def choose(page, field, option):
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_a_model_of_any_size_is_projected(visit):
    page = visit()
    page.locator("#side .toggle-button").click()  # open, it covers a phone's whole page
    page.set_viewport_size({"width": 390, "height": 900})
    open_tab(page, "Compare")
    page.get_by_text("Project memory to any size").click()
    page.wait_for_selector("#memory-map .qs-chart[data-drawn]")
    before = drawn(page, "#memory-map")
    choose(page, "shape", "opt-66b")
    page.wait_for_function("() => document.querySelector('#memory-note')?.innerText.includes('927.7 GB (864.0 GiB)')")
    redrawn(page, "#memory-map", before)
    choose(page, "memory-unit", "GiB")
    page.get_by_text("All schemes at usual places").click()
    page.wait_for_function("() => document.querySelector('#memory-grid')?.innerText.includes('329.9')")  # 64 × 8k in W4A4
    choose(page, "memory-gpu", "T4")
    page.wait_for_function("() => document.querySelector('#operators')?.innerText.includes('NVIDIA T4')")
    assert page.locator("#operators table").count() == 2 and page.locator("#memory-fits tbody tr").count() == 9
    own = page.locator("#shape input")
    own.fill("layers=2,hidden=64,heads=4")
    own.press("Enter")
    page.wait_for_function("() => document.querySelector('#memory-fits')?.innerText.includes('0.01 GB')")
    own.fill("no such model")
    own.press("Enter")
    page.wait_for_function("() => document.querySelector('#status')?.innerText.includes('is not known')")
    for width in (390, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        for chart in ("#memory", "#memory-map", "#roofline"):
            box = page.locator(chart).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width

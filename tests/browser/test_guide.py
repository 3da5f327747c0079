"""What helps a newcomer, in a real browser: grids over a channel, the diagram of the reorderings, the guide; wide and narrow."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import drawn, open_tab, redrawn

pytestmark = pytest.mark.browser

LINES = "() => document.querySelector('#histogram .qs-chart').data[1]?.x.filter(x => x !== null).length / 2"
CAPTION = "words => document.querySelector('#histogram .gtitle')?.textContent.replaceAll('\\u00a0', ' ').includes(words)"
FITS = "() => document.documentElement.scrollWidth <= innerWidth"
PLACES = pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])


@PLACES
def test_grids_are_drawn_over_the_channel(visit, width, theme):
    page = visit(f"?__theme={theme}", width=width, height=844)
    page.wait_for_selector("#tokens mark")
    page.wait_for_function(CAPTION, arg="of 16 levels")
    for name, count in (("ternary", "of 3 levels"), ("FP4", "of 15 levels"), ("INT4, its cluster", "of 16 levels")):
        before = drawn(page, "#histogram")
        page.locator("#grid").get_by_text(name).click()
        redrawn(page, "#histogram", before)
        page.wait_for_function(CAPTION, arg=count)
        assert page.evaluate(LINES) >= 2
    page.locator("#grid input:checked").press("Home")  # arrow keys and Home move among the buttons
    page.locator("#grid").get_by_text("none").click()
    page.wait_for_function(f"() => ({LINES})() === undefined || isNaN(({LINES})())")
    assert page.evaluate(FITS)


@PLACES
def test_the_reorderings_light_up_with_the_recipe(visit, width, theme):
    page = visit(f"?__theme={theme}", width=width, height=844)
    page.wait_for_selector("#tokens mark")
    open_tab(page, "Reorder", "#strips")
    lit = "n => document.querySelectorAll('#fused .qs-lit').length === n"
    page.wait_for_function(lit, arg=7)
    assert page.evaluate(FITS)
    before = drawn(page, "#strips")
    page.locator("#fused .qs-place", has_text="queries").press("Enter")
    redrawn(page, "#strips", before)
    page.wait_for_selector("#fused .qs-place[aria-pressed=true] >> text=queries")
    assert page.locator("#reorder-site input:checked").get_attribute("value") == "q"
    page.locator("#g input[type=number]").fill("1")
    page.locator("#g input[type=number]").press("Enter")
    page.wait_for_function(lit, arg=0)
    assert "with one cluster" in page.locator("#fused").inner_text()
    if width > 640:
        page.locator("#method input").click()
        page.get_by_role("option", name="RTN").click()
        page.wait_for_function("() => document.querySelector('#fused').innerText.includes('RTN reorders nothing')")

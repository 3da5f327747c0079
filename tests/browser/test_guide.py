"""What helps a newcomer, in a real browser: grids over a channel, the diagram of the reorderings, the guide; wide and narrow."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import drawn, open_tab, redrawn

pytestmark = pytest.mark.browser

LINES = "() => document.querySelector('#histogram .qs-chart').data[1]?.x.filter(x => x !== null).length / 2"
CAPTION = "words => document.querySelector('#histogram .gtitle')?.textContent.replaceAll('\\u00a0', ' ').includes(words)"
FITS = "() => document.documentElement.scrollWidth <= innerWidth"
PLACES = pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (390, "dark")])


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


def step(page, number):
    page.wait_for_selector(f"#guide li:not([hidden]) h2 >> text=Step {number} of 5")


def done(page):
    page.wait_for_selector("#guide li.qs-done:not([hidden])")
    assert "See:" in page.locator("#guide .qs-said").inner_text()


@PLACES
def test_the_guide_leads_through_the_page_by_keyboard(visit, width, theme):
    page = visit(f"?__theme={theme}", width=width, height=844)
    page.wait_for_selector("#tokens mark")
    page.locator("#guide").get_by_text("Start the guide").press("Enter")
    step(page, 1)
    assert page.evaluate("() => document.activeElement.tagName") == "H2"  # a screen reader reads on from the step's title
    page.wait_for_selector("#scatter .qs-chart.qs-pointed")
    page.locator("#guide [data-go=control]").press("Enter")
    assert page.evaluate("() => document.activeElement.getAttribute('aria-describedby')") == "guide-do-0"
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('#scatter .qs-said').textContent.includes('channel')")
    page.keyboard.press("Enter")
    done(page)
    page.locator("#guide [data-go=next]").press("Enter")
    step(page, 2)
    page.wait_for_selector("#g.qs-pointed")
    page.locator("#g input[type=range]").press("Home")
    done(page)
    assert page.evaluate(FITS)
    page.reload()
    page.wait_for_selector("#g.qs-pointed")
    step(page, 2)
    for number, control in ((3, "#quantize"), (4, "#write")):
        page.locator("#guide [data-go=next]").press("Enter")
        step(page, number)
        page.wait_for_selector(f"{control}.qs-pointed")
        page.locator("#guide [data-go=control]").press("Enter")
        assert page.evaluate("control => document.activeElement.matches(control)", control)
        page.keyboard.press("Enter")
        done(page)
    page.locator("#guide [data-go=next]").press("Enter")
    step(page, 5)
    assert not page.locator("#guide [data-go=next]").is_visible()
    page.locator("#guide li:not([hidden]) h2").press("Escape")
    assert page.locator("#guide [data-when=ended] button").is_visible() and page.locator(".qs-pointed").count() == 0


def test_the_guide_is_skipped_once_and_can_be_had_again(visit):
    page = visit()
    page.locator("#guide").get_by_text("Not now").click()
    page.reload()
    page.wait_for_selector("#guide [data-when=ended] button")
    assert not page.locator("#guide [data-when=offer]").is_visible()
    page.locator("#guide [data-when=ended] button").click()
    step(page, 1)

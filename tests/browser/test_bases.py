"""The switch of bases in a real browser, wide and narrow, light and dark, by pointer and keyboard."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import drawn, open_tab, redrawn, status

pytestmark = pytest.mark.browser

SAID = "([id, words]) => document.querySelector(id)?.textContent.includes(words)"
FITS = "document.documentElement.scrollWidth <= innerWidth"
PLACE = "layer=1&site=down_in&channel=5"


@pytest.mark.parametrize("width, theme", [(1440, "light"), (390, "dark")])
def test_outlier_channels_vanish_and_massive_tokens_are_listed(visit, width, theme):
    page = visit(f"?__theme={theme}&{PLACE}", width=width, height=844)
    page.wait_for_function(SAID, arg=["#facts h2", "Layer 1"])
    assert not page.locator("#explore-bases").is_visible()
    page.locator("#explore-basis").get_by_text("side by side").click()
    page.wait_for_function(SAID, arg=["#explore-bases", "Massive tokens: after the rotation, 1 of 1,024 tokens"])
    page.wait_for_function("() => document.querySelectorAll('#scatter .annotation').length === 4")
    names = [text.strip() for text in page.locator("#scatter .annotation").all_text_contents()]
    assert names == ["as they are", "reordered", "scaled", "rotated"] and page.evaluate(FITS)
    rows = page.locator("#explore-bases tbody tr").all_inner_texts()
    assert rows[2].startswith("rotated") and rows[3].split()[:3] == ["1", "MLP", "hidden"] and "<b>0" in rows[3]
    page.locator("#scatter .qs-chart").focus()
    page.keyboard.press("ArrowRight")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")  # a point of the fourth plot
    page.wait_for_function("() => document.querySelector('#explore-basis .selected')?.innerText === 'rotated'")
    page.wait_for_function(SAID, arg=["#tokens", "tokens behind the extremes"])
    open_tab(page, "Reorder", "#strips")
    page.wait_for_function(SAID, arg=["#reorder-bases", "Massive tokens"])
    assert page.locator("#reorder-basis .selected").inner_text() == "rotated"
    before = drawn(page, "#strips")
    page.locator("#reorder-basis input").last.focus()
    page.keyboard.press("Space")
    redrawn(page, "#strips", before)
    page.wait_for_function("() => document.querySelectorAll('#strips .annotation').length === 4")
    page.wait_for_function(SAID, arg=["#curve .legend", "rotated"])
    assert page.evaluate(FITS)


def test_a_link_opens_a_basis(visit):
    page = visit(f"?basis=scaled&{PLACE}")
    page.wait_for_function(SAID, arg=["#explore-bases", "in the basis: scaled"])
    assert page.locator("#explore-basis .selected").inner_text() == "scaled"


def test_the_error_of_a_link_stays_while_its_tab_opens(visit):
    page = visit("?bogus=1&tab=compare", ready=False)
    status(page, "parts that this page does not know")
    page.wait_for_selector("#compare-models, #eval-text", state="visible")
    page.wait_for_timeout(1500)  # the tab's own events have come by then
    assert "bogus" in page.locator("#status").inner_text()
    open_tab(page, "Explore", "#scatter")
    status(page, "ranges from")

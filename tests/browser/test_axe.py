"""Every tab with its panels open against axe-core's rules, wide and narrow; in the dark theme its colours."""

from __future__ import annotations

from importlib.resources import files

import pytest

from tests.browser.page_tools import choose_model, open_tab, quantise, status

pytestmark = pytest.mark.browser
AXE = files("axe_playwright_python") / "axe.min.js"
FOUND = """async (rules) => {
  const only = rules.length ? { runOnly: rules } : {};
  const { violations } = await axe.run(document, { resultTypes: ['violations'], ...only });
  return violations.flatMap(({ id, nodes }) => nodes.map(node => `${id}: ${node.target.join(' ')}: ${node.html.slice(0, 200)}`));
}"""
STILL = """() => document.getAnimations().every(
  ({ playState, effect }) => playState !== 'running' || effect.getTiming().iterations > 1)"""
FOLDED = ".tabitem:visible button.label-wrap:not(.open):visible"


def violations(page, ready, theme):
    """Open every fold of the tab, do what fills its panels, and ask axe: in the light theme at both widths, in the dark one what
    depends on it, the colours."""
    found = []
    while page.locator(FOLDED).count():
        page.locator(FOLDED).first.click()
        page.wait_for_timeout(150)
    ready(page)
    rules = ["color-contrast"] if theme == "dark" else []
    for width in (1440,) if rules else (1440, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(600)  # charts are drawn anew, panels begin to slide
        page.wait_for_function(STILL)  # colours that fade are not those that a reader sees
        found += [f"{width}: {words}" for words in page.evaluate(FOUND, rules)]
    page.set_viewport_size({"width": 1440, "height": 844})
    return found


def spend(page):
    page.wait_for_selector("#budget-marks label:nth-of-type(6)")
    page.locator("#spend").click()
    page.wait_for_selector("#spent-map tr:nth-child(2)")
    page.locator("#layers-own textarea").fill("layers.1.down_in=8")
    page.locator("#layers-own textarea").blur()
    page.wait_for_function("() => document.querySelector('#layers-note').innerText.includes('Parts set')")


def read(page):
    page.locator("#read-tokens").click()
    page.wait_for_selector("#reading .qs-reading .qs-flip")
    page.locator("#reading .qs-tok[data-index='20']").click()
    page.wait_for_selector("#moved tbody tr")
    page.wait_for_selector("#moved-chart .qs-chart[data-drawn]")
    page.locator("#write").click()
    page.wait_for_selector("#speed tbody tr:nth-child(2)")
    page.wait_for_selector("#pareto .qs-chart[data-drawn]")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_rule_is_violated(visit, theme):
    page = visit(f"?__theme={theme}")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    page.wait_for_selector("#tokens mark")
    quantise(page)
    page.locator("#side-g input[type=number]").fill("8")
    page.locator("#side-g input[type=number]").press("Enter")
    page.locator("#side-quantize").click()
    page.wait_for_selector("#quick-numbers tbody tr:nth-child(3)")
    page.locator("#side button.label-wrap").click()
    found = violations(page, spend, theme)
    page.locator("#side .toggle-button").click()  # open, it covers a phone's whole page
    page.locator("#guide").get_by_text("Start the guide").click()
    page.wait_for_selector("#scatter .qs-chart.qs-pointed")
    found += violations(page, lambda page: page.wait_for_selector("#histogram .qs-chart[data-drawn]"), theme)
    page.locator("#guide [data-go=end]:visible").click()
    open_tab(page, "Reorder", "#strips")
    found += violations(page, lambda page: page.wait_for_selector("#fused .qs-lit"), theme)
    open_tab(page, "Compare", "#bars")
    found += violations(page, read, theme)
    page.locator("#side .toggle-button").click()
    choose_model(page, "fake-ternary")
    status(page, "trained a4.8")
    page.locator("#side .toggle-button").click()
    open_tab(page, "BitNet", "#input-down-in")
    found += violations(page, lambda page: None, theme)
    assert not found, "\n".join(found)

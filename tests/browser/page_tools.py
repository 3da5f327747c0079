"""Drive the page in a browser: tabs, models, runs, the status line, and when a chart has been drawn."""

from __future__ import annotations

DRAWN = "id => Number(document.querySelector(id + ' .qs-chart').dataset.drawn || 0)"


def drawn(page, chart):
    return page.evaluate(DRAWN, chart)


def redrawn(page, chart, before):
    page.wait_for_function(f"([id, n]) => ({DRAWN})(id) > n", arg=[chart, before])


def open_tab(page, name, chart=None):
    page.get_by_role("tab", name=name).click()
    if chart:
        page.wait_for_selector(f"{chart} .qs-chart[data-drawn]")


def choose_model(page, name):
    field = page.locator("#model input")
    field.fill(name)
    field.press("Enter")
    page.locator("#observe").click()


def status(page, words):
    page.wait_for_function("words => document.querySelector('#status')?.innerText.includes(words)", arg=words)
    return page.locator("#status").inner_text()


def quantise(page):
    page.locator("#side-quantize").click()
    page.wait_for_selector("#quick-numbers tbody tr:nth-child(2)")


def choose_bitnet(page):
    page.locator("#method input").click()
    page.get_by_role("option", name="BitNet").click()
    page.wait_for_selector("#mode input", state="visible")

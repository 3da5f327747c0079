"""The page in Chinese: followed from the browser, switched without losing anything, remembered; no English text is left."""

from __future__ import annotations

import pytest

from tests.browser.conftest import CHART_DRAWN
from tests.browser.page_tools import choose_model, drawn, redrawn

pytestmark = pytest.mark.browser

LEFT = """() => {
  const skip = 'script, style, code, pre, textarea, .qs-token, .qs-stream p, .qs-reading .qs-tok, .qs-error, #footer, #language,'
    + '.modebar, #details td, #memory-panel .qs-protocol';  // words of plotly, reasons and assumptions of core
  const english = (text) => /(?:[a-z-]{2,},? ){3,}[a-z]{2,}/.test(text)  // also beside Chinese words
    || (/[A-Za-z]{3,} [a-z]{2,}/.test(text) && !/[\\u4e00-\\u9fff]/.test(text));
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const place = node.parentElement;
    const reason = node.data.startsWith('不能，因为');  // core's reason follows
    if (reason || !english(node.data) || !place.getClientRects().length) continue;
    if (!place.closest(skip)) found.push(node.data.trim().slice(0, 90));
  }
  for (const field of document.querySelectorAll('[aria-label], .wrap-inner input')) {
    const text = field.getAttribute('aria-label') ?? field.value;
    if (english(text) && field.getClientRects().length && !field.closest(skip)) found.push(text.slice(0, 90));
  }
  return [...new Set(found)];
}"""


def test_a_chinese_browser_gets_a_chinese_page(visit):
    page = visit(width=1440, height=844, locale="zh-CN")
    page.wait_for_selector("#tokens mark")
    assert page.evaluate("() => document.documentElement.lang") == "zh-CN"
    page.locator("#side-quantize").click()
    page.wait_for_selector("#quick-numbers tbody tr:nth-child(2)")
    page.locator("#side .toggle-button").click()  # open, it covers a phone's whole page
    found = {}
    charts = {"探索": "#histogram", "重排": "#strips", "量化": "#where", "比较": "#bars", "BitNet": None}
    for tab, chart in charts.items():
        page.get_by_role("tab", name=tab).click()
        if chart:
            page.wait_for_selector(f"{chart} .qs-chart[data-drawn]")
        while page.locator(".tabitem:visible button.label-wrap:not(.open):visible").count():
            page.locator(".tabitem:visible button.label-wrap:not(.open):visible").first.click()
            page.wait_for_timeout(150)
        found[tab] = []
        for width in (390, 1440):
            page.set_viewport_size({"width": width, "height": 844})
            page.wait_for_timeout(800)
            found[tab] += page.evaluate(LEFT)
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), tab
    left = [f"{tab}: {text}" for tab, words in found.items() for text in words]
    assert not left, "\n".join(left)


def test_the_language_is_switched_on_the_page_and_remembered(visit):
    page = visit()
    page.wait_for_selector("#tokens mark")
    page.locator("#channel input").fill("7")
    page.locator("#channel input").press("Enter")
    page.wait_for_function("() => document.querySelector('#facts h2')?.innerText.endsWith('channel 7')")
    whole = page.locator("#tabs").inner_text()
    before = drawn(page, "#scatter")
    page.locator("#language button", has_text="中文").press("Enter")
    redrawn(page, "#scatter", before)
    assert page.locator("#facts h2").inner_text().endswith("通道 7")  # what was chosen stays
    assert page.locator("#scatter .xtitle").text_content() == "通道最小值"
    assert page.locator("#observe").inner_text() == "观察取值范围"
    assert page.locator("#method input").input_value() == "RPTQ：通道分组"
    page.locator("#method input").click()
    page.get_by_role("option", name="RTN").click()
    page.wait_for_function("() => document.querySelector('#method input').value.startsWith('RTN：')")
    page.reload()
    page.wait_for_selector(CHART_DRAWN)
    page.wait_for_function("() => document.querySelector('#observe').innerText === '观察取值范围'")
    choose_model(page, "fake-wide")  # the sentences above the tabs are written anew
    page.wait_for_function("() => document.querySelector('#status b').innerText === 'fake-wide'")
    assert page.locator("#intro .qs-rich").inner_text().startswith("下图每个点")
    page.locator("#language button", has_text="English").click()
    page.wait_for_function("() => document.querySelector('#observe').innerText === 'Observe ranges'")
    page.wait_for_function("() => document.querySelector('#facts h2').innerText.includes('channel')")
    page.wait_for_function("whole => document.querySelector('#tabs').innerText.slice(0, 40) === whole.slice(0, 40)", arg=whole)
    assert page.evaluate("() => document.documentElement.lang") == "en"


SAID = {
    "waiting, 2 jobs ahead": "等待中，前面有 2 个任务",
    "Observing ranges · 1.2 s, about 4.0 s left": "观察取值范围 · 1.2 s，约剩 4.0 s",
    "Layer 0 · values · R3 · channel 124": "第 0 层 · 值 · R3 · 通道 124",
    "23.95 → 47.58 (×1.99) on 2,048 tokens of State of the Union": "23.95 → 47.58（×1.99），在国情咨文的 2,048 个词元上",
    "60 % of the cost is MLP hidden of layers 2 and 26, keys of layer 3 and softmax of layer 4.": "代价的 60 % 来自"
    "第 2 和 26 层的MLP 隐层，第 3 层的键和第 4 层的softmax。",
    "<b>%{y}</b>, layer %{x}<br>%{z:.1f} dB<extra></extra>": "<b>%{y}</b>，第 %{x} 层<br>%{z:.1f} dB<extra></extra>",
    "What this recipe costs: W4A4 g32, layers.1.down_in=8": "此配方的代价：W4A4 g32, layers.1.down_in=8",
    "No model is called 'x'. Use a name from the list.": "No model is called 'x'. Use a name from the list.",
    "−78.2 to 84.6": "−78.2 至 84.6",
    "fake · RTN W4A4": "fake · RTN W4A4",
}
"""Texts as the page puts them together, and in Chinese."""


def test_texts_with_numbers_are_put_together_again(visit):
    page = visit(locale="zh-TW")
    page.wait_for_function("() => window.quantscopeSay")
    assert page.evaluate("texts => texts.map(window.quantscopeSay)", list(SAID)) == list(SAID.values())

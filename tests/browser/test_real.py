"""The whole way with the real core: the default model opens; a small one is quantised, texts and numbers stand side by side."""

from __future__ import annotations

import os

import pytest

from tests.browser.conftest import CHART_DRAWN, serve
from tests.browser.page_tools import choose_model, open_tab, status

pytestmark = [pytest.mark.browser, pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1500)]
MODEL = os.environ.get("QUANTSCOPE_TEST_MODEL", "smollm2-135m")
SMALL = "quantscope-llama-6m"
"""What is quantised: a run of the default model takes minutes; `tests/core/test_real_model.py` makes some."""


def test_from_the_first_chart_to_a_comparison(browser, tmp_path):
    server = serve(MODEL, tmp_path / "log.txt")
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    try:
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(next(server))
        page.wait_for_selector(CHART_DRAWN)
        page.wait_for_selector("#tokens mark")
        choose_model(page, SMALL)
        status(page, SMALL)
        open_tab(page, "Quantise")
        page.locator("#weights input").click()
        page.get_by_role("option", name="Round to nearest").click()
        page.locator("#quantize-tokens input[type=number]").fill("512")
        page.locator("#quantize-tokens input[type=number]").press("Enter")
        page.locator("#quantize").click()
        page.wait_for_selector("#quick-numbers tbody tr:nth-child(2)", timeout=900_000)
        base, run = (float(text.split(" ")[0]) for text in page.locator("#quick-numbers td:nth-child(2)").all_inner_texts())
        assert 5 < base < run < 200
        open_tab(page, "Compare", "#bars")
        page.locator("#new-tokens input[type=number]").fill("8")
        page.locator("#new-tokens input[type=number]").press("Enter")
        page.locator("#write").click()
        page.wait_for_function("() => (document.querySelector('#streams').innerText.match(/tokens\\/s/g) || []).length === 3")
        names = page.locator("#streams h2").all_inner_texts()
        assert names[:2] == [MODEL, SMALL] and "W4A4" in names[2], "the first model, the current one, and its run"
    finally:
        context.close()
        server.close()

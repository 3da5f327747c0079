"""From the small embedded model to the embedded BitNet model in one click, with the real core; a larger one is offered."""

from __future__ import annotations

import pytest

from tests.browser.conftest import CHART_DRAWN, serve
from tests.browser.page_tools import status

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_other_models_are_one_click_away(browser, tmp_path):
    server = serve("quantscope-llama-6m", tmp_path / "log.txt", HF_HUB_OFFLINE="1", QUANTSCOPE_CACHE=str(tmp_path))
    context = browser.new_context(viewport={"width": 1440, "height": 900}, locale="en-US")
    try:
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(next(server))
        page.wait_for_selector(CHART_DRAWN)
        assert "MB to download once" in page.locator("#open-larger").inner_text()
        page.locator("#open-a4\\.8").click()
        status(page, "trained a4.8")
        page.wait_for_selector("#zeros .qs-chart[data-drawn]")
        assert page.get_by_role("tab", selected=True).inner_text() == "5 · BitNet"
        assert page.locator("#open-larger").is_visible() and not page.locator("#open-a4\\.8").is_visible()
    finally:
        context.close()
        server.close()

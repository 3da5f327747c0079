"""A token of the coloured text that is chosen, by pointer and by keys: the sites and channels that moved most there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser.page_tools import open_tab, quantise

pytestmark = pytest.mark.browser


def moved(page, percent):
    """Wait until the sentence names this share; returns the table's cells of the first row."""
    said = "share => document.querySelector('#moved .qs-verdict')?.innerText.includes(`by ${share} %`)"
    page.wait_for_function(said, arg=percent)
    return page.locator("#moved tbody tr").first.locator("td").all_inner_texts()


def read(page):
    page.locator("#read-tokens").click()
    page.wait_for_selector("#reading .qs-reading .qs-flip")
    return page.locator("#reading .qs-tok[data-index]")


def test_a_chosen_token_shows_what_moved_there(visit):
    page = visit()
    quantise(page)
    open_tab(page, "Compare")
    page.locator("#side .toggle-button").click()  # open, it covers a phone's whole page
    page.locator("#token-panel").get_by_text("token by token").click()
    tokens = read(page)
    assert tokens.count() == 127  # nothing predicts the first
    tokens.nth(19).click()
    assert moved(page, "20.0") == ["1", "MLP hidden", "20.0", "0.200", "0", "344: 12.3 → 9.10; 7: 1.00 → −2.00"]
    said = page.locator("#moved").inner_text()
    assert "Moved most: MLP hidden of layer 1" in said and "Channel 344: 12.3 became 9.10." in said and "<i>20" in said
    assert "Rounded most: keys of layer 2" in said and page.locator("#moved tbody tr").count() == 10
    page.wait_for_selector("#moved-chart .qs-chart[data-drawn] .barlayer .point")
    assert page.locator("#reading [aria-current]").get_attribute("data-index") == "20"
    for key, place in (("Enter", 40), (" ", 30)):
        tokens.nth(place - 1).focus()
        page.keyboard.press(key)
        assert moved(page, f"{place}.0")[2] == f"{place}.0"
        assert page.evaluate("() => document.activeElement.dataset.index") == str(place)
    with page.expect_download() as download:
        page.locator("#moved-json").click()
    found = json.loads(Path(download.value.path()).read_text())
    assert found["place"] == 30 and len(found["sites"]) == 15 and found["sites"][0]["channels"][0] == [344, 12.3, 9.1]
    page.set_viewport_size({"width": 390, "height": 844})
    box = page.locator("#moved").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    read(page)
    page.wait_for_selector("#moved-chart", state="hidden")
    assert not page.locator("#moved .qs-verdict").count()

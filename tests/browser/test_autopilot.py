"""A budget is spent in a real browser: the map, the comparison, and the recipe in the fields, wide and narrow."""

from __future__ import annotations

import pytest

from tests.browser.test_page import open_tab, quantise, status

pytestmark = pytest.mark.browser

SAID = "words => document.querySelector('#spent .qs-verdict')?.innerText.includes(words)"


def test_a_budget_is_spent_and_its_recipe_is_quantised(visit):
    page = visit(width=1440, height=844)
    open_tab(page, "Quantise", "#where")
    page.get_by_text("Spend a budget").click()
    page.wait_for_selector("#budget-marks label:nth-of-type(6)")
    marks = page.locator("#budget-marks label").all_inner_texts()
    assert [m.split(",")[0].strip() for m in marks][-2:] == ["W4A8", "W4A16"] and all("MB" in mark for mark in marks)
    page.locator("#budget-marks label", has_text="W4A4KV").click()
    page.wait_for_function(SAID, arg="are better here")
    head, *rows = page.locator("#spent-map tr").all_inner_texts()
    assert head.split() == ["layer", *"012345"] and len(rows) == 6 and rows[0].split()[-6:] == list("345345")
    page.locator("#spread input").check()
    page.locator("#spend").click()
    page.wait_for_function(SAID, arg="less divergence than 4-bit weights and 4-bit keys and values everywhere (240 MB)")
    page.wait_for_function(SAID, arg="measured on the probe")
    for width in (390, 1440):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#use-spent").click()
    status(page, "Quantise makes the packed model and verifies it.")
    page.wait_for_function("() => document.querySelector('#cost h2').innerText.includes('layers.0.k=3')")
    page.get_by_text("One layer or site").click()
    assert "layers.1.down_in=8" in page.locator("#layers-own textarea").input_value()
    quantise(page)
    assert "layers.0.k=3" in page.locator("#summary").inner_text()


def test_a_bound_is_given_in_nats(visit):
    page = visit()
    open_tab(page, "Quantise", "#where")
    page.get_by_text("Spend a budget").click()
    page.get_by_label("a divergence").check()
    page.locator("#budget-kld input").fill("0.08")
    page.locator("#spend").click()
    page.wait_for_function(SAID, arg="17 % fewer bytes than 4-bit weights")
    assert not page.locator("#budget").is_visible() and "0.0800 nats allowed" in page.locator("#spent").inner_text()
    page.locator("#budget-kld input").fill("-1")
    page.locator("#spend").click()
    status(page, "0 to 100")

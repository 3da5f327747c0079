"""What a recipe costs and where a text is read worse, in a real browser."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import open_tab, quantise

pytestmark = pytest.mark.browser

PLACE = "() => [document.querySelector('#facts h2')?.innerText, document.querySelector('#layer input[type=number]').value]"


def at(page, title, layer):
    page.wait_for_selector("#facts", state="visible")
    reached = f"([title, layer]) => {{ const [a, b] = ({PLACE})(); return a?.startsWith(title) && b === layer; }}"
    page.wait_for_function(reached, arg=[title, layer])
    page.wait_for_selector("#tokens table")


def test_a_cell_of_the_map_opens_its_site(visit):
    page = visit()
    open_tab(page, "Quantise", "#where")
    page.locator("#where").scroll_into_view_if_needed()
    cell = page.locator("#where .nsewdrag").bounding_box()  # two rows, keys above MLP hidden, and six layers
    page.mouse.click(cell["x"] + cell["width"] * 1.5 / 6, cell["y"] + cell["height"] * 0.75)
    at(page, "Layer 1 · MLP hidden", "1")
    open_tab(page, "Quantise", "#where")
    page.get_by_text("The ten most expensive parts").click()
    page.locator("#where-table tbody tr", has_text="keys").focus()
    page.keyboard.press("Enter")
    at(page, "Layer 3 · keys", "3")


def test_the_cost_follows_every_control(visit):
    page, gauge = visit(), "() => [...document.querySelectorAll('#cost .qs-gauge b')].map(b => b.innerText)"
    open_tab(page, "Quantise", "#where")
    page.wait_for_function(f"() => ({gauge})().join() === '0.0500 nats,0.100 ± 0.00100 nats'")
    assert "The prediction was 0.50 times" in page.locator("#cost").inner_text()
    assert page.locator("#blame .qs-verdict").inner_text() == "75 % of the cost is MLP hidden of layer 1."
    page.locator("#side-g input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_function(f"() => ({gauge})()[0] === '1.60 nats' && ({gauge})()[1].startsWith('3.20')")
    assert "cost is large" in page.locator("#cost").inner_text() and "W4A4 g1" in page.locator("#cost h2").inner_text()
    page.get_by_text("Bits of every tensor").click()
    page.locator("#bits-down_in input").click()
    page.get_by_role("option", name="8", exact=True).click()
    page.wait_for_function(f"() => ({gauge})()[0] === '0.00625 nats'")
    page.locator("#swaps").click()
    page.wait_for_function("() => document.querySelector('#swaps-note').innerText.includes('2 of 2 parts')")
    said = page.locator("#swaps-note p").inner_text()
    assert "is 1.00 at the median" in said and "swapped): 0 nats" in said and "at once: 0.500" in said
    page.locator("#side-quantize").click()
    page.wait_for_function(f"() => ({gauge})().length === 3")


def test_a_text_is_read_token_by_token(visit):
    page = visit()
    quantise(page)
    open_tab(page, "Compare")
    page.locator("#side .toggle-button").click()  # open, it covers a phone's whole page
    page.locator("#token-panel").get_by_text("token by token").click()
    page.locator("#read-tokens").click()
    page.wait_for_selector("#reading .qs-reading .qs-flip")
    tokens = page.locator("#reading .qs-reading .qs-tok")
    assert tokens.count() == 128 and tokens.nth(3).inner_text().startswith("<i>3")
    assert "127 predictions" in page.locator("#reading .qs-verdict").inner_text()
    tip = tokens.nth(5).locator(".qs-tip")
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 900})
        tokens.nth(4).focus()
        tokens.nth(5).focus()
        assert tip.is_visible() and "<b>no</b> 20.0 %" in tip.inner_text().replace("\n", " ")
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_what_a_run_takes_is_told_before_it_is_started(visit):
    page = visit()
    open_tab(page, "Quantise", "#where")
    page.wait_for_function("() => document.querySelector('#before-start')?.innerText.includes('≈ 12 s')")
    page.locator("#scheme input").click()
    page.get_by_role("option", name="W3A3KV", exact=True).click()
    page.wait_for_function("() => document.querySelector('#before-start')?.innerText.includes('≈ 50.4 MB')")
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 900})
        box = page.locator("#before-start").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width

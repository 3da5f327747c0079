"""Bits of single layers in a real browser: the field moves the cost, says what is wrong, and is part of links."""

from __future__ import annotations

import pytest

from tests.browser.test_page import open_tab, status

pytestmark = pytest.mark.browser

FIRST = "document.querySelector('#cost .qs-gauge b')?.innerText"


def write(page, text):
    field = page.locator("#layers-own textarea")
    field.fill(text)
    field.blur()


def said(page, words):
    page.wait_for_function("words => document.querySelector('#layers-note')?.innerText.includes(words)", arg=words)


def test_bits_of_one_layer_move_the_cost(visit):
    page = visit(width=1440, height=844)
    open_tab(page, "Quantise", "#where")
    page.wait_for_function(f"() => {FIRST} === '0.0500 nats'")
    page.get_by_text("One layer or site").click()
    write(page, "layers.1.down_in=8, layers.0-2.weights=6")
    page.wait_for_function(f"() => {FIRST} === '0.0126 nats'")
    said(page, "Parts set: 13, in 3 of the layers.")
    assert "layers.0-2.weights=6" in page.locator("#cost h2").inner_text()
    for width in (390, 1440):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    mistakes = {"layers.200.k=3": "the model has layers 0 to", "layers.1.k": "is not understood", "layers.1.k=9": "2 to 8"}
    for wrong, words in mistakes.items():
        write(page, wrong)
        said(page, words)
    status(page, "2 to 8")
    write(page, "")
    page.wait_for_function(f"() => {FIRST} === '0.0500 nats' && !document.querySelector('#layers-note').innerText.trim()")


def test_a_link_names_them(visit):
    page = visit("?set=layers.1.down_in%3D8,layers.3.R5%3D8")
    open_tab(page, "Quantise", "#where")
    page.wait_for_function(f"() => {FIRST}?.startsWith('0.0501')")
    page.get_by_text("One layer or site").click()
    assert page.locator("#layers-own textarea").input_value() == "layers.1.down_in=8, layers.3.R5=8"
    page.get_by_text("Share and save").click()
    page.locator("#copy-link").click()
    page.wait_for_function("() => document.querySelector('#link textarea, #link input')?.value.includes('set=layers.1.down_in')")

"""The door in a browser: the page's policy hinders nothing, uploads pass, a lost visit says so and starts anew."""

from __future__ import annotations

import pytest

from tests.browser.conftest import CHART_DRAWN

pytestmark = pytest.mark.browser


def test_a_lost_visit_says_so_and_starts_anew(visit):
    page = visit()
    key = page.evaluate("sessionStorage.getItem('quantscope')")
    page.context.clear_cookies()  # as after a restart of the server: the session is nobody's
    page.evaluate("[...document.querySelectorAll('#tabs button[role=tab]')].filter((t) => t.offsetParent)[1].click()")
    page.wait_for_selector("#status [data-restart]")
    assert "starts anew" in page.inner_text("#status")
    page.wait_for_event("load")
    page.wait_for_selector(CHART_DRAWN)
    new = page.evaluate("sessionStorage.getItem('quantscope')")
    assert new and new != key and "starts anew" not in page.inner_text("#status")


def test_a_key_that_was_seen_opens_nothing(visit, address):
    victim, thief = visit(), visit()
    key = victim.evaluate("sessionStorage.getItem('quantscope')")
    thief.evaluate("(key) => sessionStorage.setItem('quantscope', key)", key)
    thief.reload()
    thief.wait_for_selector(CHART_DRAWN)
    assert thief.evaluate("sessionStorage.getItem('quantscope')") != key


def test_nothing_of_the_page_is_stopped_by_its_policy(visit, tmp_path):
    page, said = visit(), []
    page.on("console", lambda message: said.append(message.text))
    page.reload()
    page.wait_for_selector(CHART_DRAWN)
    page.evaluate("[...document.querySelectorAll('button.label-wrap')].forEach((b) => b.click())")
    recipe = tmp_path / "recipe.json"
    recipe.write_text("{}")
    page.wait_for_selector("#open-recipe")
    page.evaluate(
        """() => {
          let place = document.querySelector('#open-recipe');
          while (!place.querySelector('input[type=file]')) place = place.parentElement;
          place.querySelector('input[type=file]').id = 'recipe-file';
        }"""
    )
    page.set_input_files("#recipe-file", recipe)
    page.wait_for_selector("#status .qs-error")
    assert "names no model" in page.inner_text("#status")
    assert not [text for text in said if "Content Security Policy" in text or "Refused" in text], said


def test_the_page_is_light_and_its_largest_script_is_asked_for_at_once(browser, address):
    context = browser.new_context()
    page = context.new_page()
    wire, asked, sizes = context.new_cdp_session(page), {}, {}
    wire.on("Network.requestWillBeSent", lambda event: asked.setdefault(event["requestId"], event["request"]["url"]))
    wire.on("Network.loadingFinished", lambda event: sizes.setdefault(event["requestId"], event["encodedDataLength"]))
    wire.send("Network.enable")
    page.goto(address)
    page.wait_for_selector(CHART_DRAWN)
    assert 500_000 < sum(sizes.values()) <= 2_000_000, "bytes that opening the page takes"
    scripts = [url for url in asked.values() if url.endswith("plotly.min.js")]
    assert len(scripts) == 1, "what the head asks for ahead is what the charts use"
    loaded = page.evaluate("performance.getEntriesByType('resource').map((e) => [e.name, e.startTime])")
    when = {name.rsplit("/", 1)[-1]: start for name, start in loaded}
    assert when["plotly.min.js"] < max(start for name, start in when.items() if name.startswith("Index-")), "asked for at once"
    context.close()

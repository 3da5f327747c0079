"""The page in a real browser: every tab, bad input, two visitors, light and dark, wide and narrow."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request

import pytest

from tests.browser.page_tools import choose_bitnet, choose_model, drawn, open_tab, quantise, redrawn, status

pytestmark = pytest.mark.browser

LEFTMOST = """id => {
  const chart = document.querySelector(id + ' .qs-chart');
  const points = chart.calcdata[0];
  const point = points.reduce((best, p) => (p.x < best.x ? p : best));
  const box = chart.getBoundingClientRect();
  const { xaxis, yaxis } = chart._fullLayout;
  const channel = chart._fullData[0].customdata[points.indexOf(point)][0];
  return [channel, box.x + xaxis._offset + xaxis.c2p(point.x), box.y + yaxis._offset + yaxis.c2p(point.y)];
}"""
RANGE = "id => document.querySelector(id + ' .qs-chart')._fullLayout.xaxis.range.map(v => Math.round(v * 1000))"


def test_opens_on_a_drawn_chart_with_its_widest_channel(visit):
    page = visit()
    page.wait_for_selector("#tokens mark")
    assert "135 M parameters" in page.locator("#status").inner_text()
    assert "× the median channel" in page.locator("#facts").inner_text()
    assert page.locator("#outliers tr[data-index]").count() == 8
    assert page.locator("#tokens mark b").count() == 0  # a token that looks like markup stays text


def test_a_click_on_a_point_reaches_python(visit):
    page = visit()
    page.wait_for_selector("#tokens mark")
    channel, x, y = page.evaluate(LEFTMOST, "#scatter")
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    page.wait_for_function("words => document.querySelector('#facts h2')?.innerText.endsWith(words)", arg=f"channel {channel}")
    assert page.locator("#channel input").input_value() == str(channel)


def test_the_keyboard_reaches_every_channel(visit):
    page = visit()
    page.wait_for_selector("#facts h2")  # the opening fills the field first
    page.locator("#channel input").fill("7")
    page.locator("#channel input").press("Enter")
    page.wait_for_function("() => document.querySelector('#facts h2')?.innerText.endsWith('channel 7')")
    page.wait_for_timeout(500)  # the table is drawn anew with the channel's answer; a row of the old one loses the focus
    page.locator("#outliers tr[data-index='4']").press("Enter")
    page.wait_for_function("() => !document.querySelector('#facts h2')?.innerText.endsWith('channel 7')")


def test_zoom_survives_a_cluster_change_but_not_another_site(visit):
    page = visit()
    open_tab(page, "Reorder", "#cluster-scatter")
    page.wait_for_function("() => document.querySelector('#headline').innerText.includes('clusters')")
    page.wait_for_selector("#cluster-scatter .points path")
    box = page.locator("#cluster-scatter .nsewdrag").first.bounding_box()
    whole = page.evaluate(RANGE, "#cluster-scatter")
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.9, steps=4)
    page.mouse.up()
    page.wait_for_function(f"([id, old]) => String(({RANGE})(id)) !== String(old)", arg=["#cluster-scatter", whole])
    page.wait_for_timeout(300)
    zoomed = page.evaluate(RANGE, "#cluster-scatter")
    before = drawn(page, "#cluster-scatter")
    page.locator("#g input[type=number]").fill("5")
    page.locator("#g input[type=number]").press("Enter")
    redrawn(page, "#cluster-scatter", before)
    assert page.evaluate(RANGE, "#cluster-scatter") == zoomed
    before = drawn(page, "#cluster-scatter")
    page.locator("#reorder-site").get_by_text("queries").click()
    redrawn(page, "#cluster-scatter", before)
    assert page.evaluate(RANGE, "#cluster-scatter") != zoomed


def test_the_slider_moves_clusters_strips_curve_and_fields(visit):
    page = visit()
    open_tab(page, "Reorder", "#strips")
    page.locator("#reorder-site").get_by_text("MLP hidden").click()
    page.wait_for_function("() => document.querySelector('#headline').innerText.includes('1,536')")
    before = drawn(page, "#strips")
    slider = page.locator("#g input[type=range]")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('#headline').innerText.includes('29')")
    redrawn(page, "#strips", before)
    assert page.locator("#side-g input[type=number]").input_value() == "29"
    open_tab(page, "Quantise")
    page.get_by_text("Clusters of every reordering").click()
    page.wait_for_function("() => document.querySelector('#clusters-R1 input').value === '29'")
    assert page.locator("#clusters-R2 input").input_value() == "4"


def test_own_bits_make_a_custom_run(visit):
    page = visit()
    open_tab(page, "Quantise")
    page.get_by_text("Bits of every tensor").click()
    page.locator("#bits-down_in input").click()
    page.get_by_role("option", name="6", exact=True).click()
    page.wait_for_function("() => document.querySelector('#scheme input').value.startsWith('custom')")
    quantise(page)
    assert "down_in 6" in page.locator("#summary").inner_text()


def test_quantise_compare_and_save(visit):
    page = visit()
    quantise(page)
    assert "bits per decoder weight" in page.locator("#summary").inner_text()
    assert page.locator("#quick-numbers .qs-estimate").count() == 1
    page.wait_for_selector("#sqnr .qs-chart[data-drawn]")
    open_tab(page, "Compare", "#bars")
    assert page.locator("#runs input:checked").count() == 2
    page.locator("#write").click()
    page.wait_for_function("() => (document.querySelector('#streams').innerText.match(/tokens\\/s/g) || []).length === 2")
    page.get_by_text("Project memory to any size").click()
    page.wait_for_selector("#memory .qs-chart[data-drawn]")
    page.get_by_text("Share and save").click()
    with page.expect_download() as download:
        page.locator("#save-recipe").click()
    assert re.fullmatch(r"recipe-[0-9a-f]{16}\.json", download.value.suggested_filename)
    assert json.loads(download.value.path().read_text())["scheme"] == "W4A4"
    for button, start in (("#save-ranges", "model,text"), ("#save-report", "{")):
        with page.expect_download() as download:
            page.locator(button).click()
        assert download.value.path().read_text().startswith(start)


def test_bitnet_has_its_own_controls_and_its_tab_reads_the_run(visit):
    page = visit()
    open_tab(page, "BitNet")
    assert "press Quantise" in page.locator("#ternary-facts").inner_text()
    choose_bitnet(page)
    assert not page.locator("#scheme").is_visible() and not page.locator("#side-g").is_visible()
    open_tab(page, "Quantise")
    assert page.locator("#kv-bits").is_visible() and not page.locator("#variant").is_visible()
    assert not page.get_by_text("Bits of every tensor").is_visible()
    page.locator("#kv-bits input").click()
    page.get_by_role("option", name="3 bits").click()
    quantise(page)
    assert "KV 3 bits" in page.locator("#summary").inner_text() and "expect noise" in page.locator("#summary").inner_text()
    open_tab(page, "BitNet", "#input-down-in")
    assert page.locator("#ternary-facts tbody tr").count() == 2
    assert "expect noise" in page.locator("#ternary-facts").inner_text()
    for chart in ("#zeros", "#ternary-weights", "#input-attn-in", "#input-o-in", "#input-mlp-in"):
        page.wait_for_selector(f"{chart} .qs-chart[data-drawn]")
    before = drawn(page, "#input-o-in")
    page.locator("#ternary-layer input").click()
    page.get_by_role("option", name="4", exact=True).click()
    page.wait_for_function("() => document.querySelector('#input-o-in')?.innerText.includes('layer 4')")
    assert drawn(page, "#input-o-in") > before
    page.locator("#method input").click()
    page.get_by_role("option", name="RPTQ").click()
    page.wait_for_selector("#scheme input", state="visible")
    assert not page.locator("#mode").is_visible()


def test_a_bitnet_link_opens_with_its_controls(visit):
    page = visit("?model=fake&method=bitnet&bitnet=mode%3Dfp4%2Ckv_bits%3D4")
    assert page.locator("#mode input").input_value() == "full FP4"
    assert not page.locator("#scheme").is_visible()
    page.get_by_text("Share and save").click()
    page.locator("#copy-link").click()
    page.wait_for_function("() => document.querySelector('#link textarea, #link input')?.value.includes('mode%3Dfp4')")
    with page.expect_download() as download:
        page.locator("#save-recipe").click()
    assert json.loads(download.value.path().read_text())["bitnet"]["kv_bits"] == 4


def test_runs_of_two_models_are_compared_and_written_side_by_side(visit):
    page = visit()
    quantise(page)
    choose_model(page, "fake-ternary")
    status(page, "trained a4.8")
    open_tab(page, "Compare")
    page.wait_for_function("() => document.querySelectorAll('#runs input:checked').length === 3")
    page.locator("#measure-now").click()
    page.wait_for_selector("#numbers tbody tr:nth-child(3)")
    assert "does not compare between them" in page.locator("#numbers").inner_text()
    page.locator("#write").click()
    page.wait_for_selector("#speed tbody tr:nth-child(3)")
    assert page.locator("#speed .qs-estimate").count() == 3
    assert page.locator("#streams h2").all_inner_texts()[2] == "fake-ternary · trained a4.8"
    open_tab(page, "BitNet", "#zeros")


def test_stop_ends_the_reading_of_a_ternary_model(visit):
    page = visit("?model=fake-slow&method=bitnet")
    status(page, "fake-slow")
    quantise(page)
    open_tab(page, "BitNet")
    status(page, "Reading the ternary model")
    page.locator("#stop").click()
    status(page, "Stopped")
    assert "Read the model" in page.locator("#ternary-facts").inner_text()


def test_a_link_restores_model_and_recipe(visit, address):
    page = visit("?model=fake-wide&method=rtn&scheme=W4A8&clusters=16&weights=rtn&seed=5&window=256")
    assert page.locator("#model input").input_value() == "fake-wide"
    assert page.locator("#scheme input").input_value().startswith("W4A8")
    assert "fake-wide" in status(page, "fake-wide") and not page.locator("#side-g").is_visible()
    page.wait_for_selector("#tokens mark")
    page.wait_for_function("() => document.querySelector('#layer').innerText.trim().endsWith('5')")
    assert page.locator("#facts h2").inner_text().endswith(f"channel {page.locator('#channel input').input_value()}")
    page.get_by_text("Share and save").click()
    page.locator("#copy-link").click()
    page.wait_for_function("() => document.querySelector('#link textarea, #link input')?.value.startsWith('http')")
    link = page.locator("#link textarea, #link input").first.input_value()
    assert link.startswith(address + "?model=fake-wide") and "scheme=W4A8" in link and "R1%3D16" in link
    assert "seed=5" in link and "window=256" in link


def test_on_a_phone_the_side_leaves_when_its_run_starts_and_stop_stays_on_the_tab(visit):
    page = visit("?model=fake-slow", width=390, height=844)
    page.wait_for_selector("#tokens mark")
    page.locator("#side .toggle-button").click()
    page.locator("#side-quantize").click()
    status(page, "GPTQ")
    page.wait_for_selector("#side:not(.open)", state="attached")
    page.wait_for_selector("#summary", state="visible")
    open_tab(page, "Compare")
    page.locator("#stop").click()
    status(page, "Stopped")
    page.wait_for_timeout(500)
    assert page.locator("#write").is_visible()


def test_stop_ends_a_running_job_and_the_page_lives_on(visit):
    page = visit()
    choose_model(page, "fake-endless")
    status(page, "Opening fake-endless")
    page.locator("#stop").click()
    status(page, "Stopped")
    choose_model(page, "fake")
    status(page, "135 M parameters")


def test_bad_models_give_one_sentence_and_the_page_lives_on(visit):
    page = visit()
    bad = {
        "no such model": "E-MODEL-NAME",
        "fake-killed": "E-MEM",
        "<img src=x onerror=alert(1)>": "<img",
        "fake-exit": "E-BUG",
        "x" * 400: "E-PARAM-MODEL",
    }
    for model, words in bad.items():
        choose_model(page, model)
        text = status(page, words)
        assert "Traceback" not in text and len(text) < 300
        assert page.locator("#status img").count() == 0
    open_tab(page, "Reorder", "#strips")


def test_bad_texts_numbers_and_links_give_one_sentence(visit):
    page = visit()
    page.locator("#text input").click()
    page.get_by_role("option", name="Paste my own").click()
    page.locator("#observe").click()
    status(page, "E-TEXT-SHORT")
    page.locator("#pasted textarea").fill("Four score and seven years ago.")
    page.locator("#observe").click()
    assert "at least 512" in status(page, "has about")
    page.locator("#channel input").fill("99999")
    page.locator("#channel input").press("Enter")
    status(page, "E-PARAM-CHANNEL")
    other = visit("?scheme=W1A1&model=fake")
    status(other, "E-PARAM-SCHEME")


def test_two_visitors_do_not_see_each_other(visit):
    first, second = visit(), visit()
    first.locator("#text input").click()
    first.get_by_role("option", name="Paste my own").click()
    first.locator("#pasted textarea").fill("my secret diary " * 200)
    first.locator("#observe").click()
    status(first, "your text")
    quantise(first)
    open_tab(second, "Compare")
    second.wait_for_selector("#runs label")
    assert second.locator("#runs label").count() == 1
    assert "sotu" in second.locator("#status").inner_text()
    assert "diary" not in second.content()


def test_dark_mode_reaches_the_charts(visit):
    page = visit("?__theme=dark")
    colour = "() => getComputedStyle(document.querySelector('#scatter .xtick text')).fill"
    dark = page.evaluate(colour)
    before = drawn(page, "#scatter")
    page.evaluate("() => document.body.classList.remove('dark')")
    redrawn(page, "#scatter", before)
    assert page.evaluate(colour) != dark


def test_a_phone_shows_everything_without_sideways_scrolling(visit):
    page = visit("?model=fake&method=bitnet", width=390, height=844)
    page.wait_for_selector("#tokens mark")
    open_tab(page, "Quantise")
    page.locator("#quantize").click()
    page.wait_for_selector("#quick-numbers tbody tr:nth-child(2)")
    open_tab(page, "BitNet", "#input-down-in")
    for tab in ("Explore", "Reorder", "Quantise", "Compare", "BitNet"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        edges = page.evaluate("() => [...document.querySelectorAll('.qs-chart')].map(c => c.getBoundingClientRect().right)")
        assert max(edges) <= 390


def test_a_closed_tab_stops_its_jobs(visit):
    page, other = visit(), visit()
    choose_model(page, "fake-endless")
    status(page, "Opening fake-endless")
    page.context.close()
    choose_model(other, "fake-slow")
    status(other, "fake-slow")
    other.wait_for_function("() => document.querySelector('#status').innerText.includes('135 M parameters')")


@pytest.mark.parametrize("path", ["app/main.py", "core/recipe.py", "/etc/passwd", "/proc/self/environ"])
def test_files_are_not_served(address, path):
    from tests.browser.conftest import ROOT

    full = path if path.startswith("/") else ROOT / path
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}gradio_api/file={full}")
    assert caught.value.code in (403, 404)


def test_the_server_logged_no_fault_but_the_planned_ones(server_log):
    """Runs last: only the worker's `fake-exit` may have left a traceback."""
    log = server_log.read_text()
    assert "in a handler" not in log and "Exception in ASGI" not in log
    assert "diary" not in log

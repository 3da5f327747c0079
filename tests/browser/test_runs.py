"""Runs as their owner keeps them: over a reload, under a name, as a zip file; links with every part; values past the fields."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import open_tab, quantise, status

pytestmark = pytest.mark.browser

RUNS = "() => [...document.querySelectorAll('#runs label')].map(label => label.innerText.trim())"
SEND = """async ([field, event, sent]) => {
  const { components, dependencies } = window.gradio_config;
  const known = Object.fromEntries(components.map(component => [component.id, component]));
  const name = id => known[id].props.elem_id;
  const fired = dependencies.find(entry => entry.targets.some(([id, what]) => what === event && name(id) === field));
  const key = JSON.stringify(sessionStorage.getItem('quantscope'));
  const value = id => name(id) in sent ? sent[name(id)] : name(id) ? JSON.stringify(known[id].props.value ?? null) : key;
  const body = `{"data": [${fired.inputs.map(value)}], "fn_index": ${fired.id}, "session_hash": "test"}`;
  const headers = { 'Content-Type': 'application/json' };
  const answer = await fetch('gradio_api/run/predict', { method: 'POST', headers, body });
  return [answer.status, await answer.text()];
}"""
"""Fire an event of a field with values of its inputs that the browser would never send, written as JSON."""


def runs(page, expected):
    page.wait_for_function(f"names => JSON.stringify(({RUNS})()) === JSON.stringify(names)", arg=expected)


def open_keep(page):
    open_tab(page, "Compare", "#bars")
    page.locator("#keep button").first.click()
    page.locator("#rename-run").wait_for(state="visible")


def test_runs_outlive_a_reload_under_their_names(visit):
    page = visit()
    quantise(page)
    open_keep(page)
    page.locator("#run-name input, #run-name textarea").first.fill("mine")
    page.locator("#rename-run").click()
    runs(page, ["fake", "mine"])
    page.reload()
    page.wait_for_selector("#numbers tbody tr:nth-child(2)")  # on the tab that was open
    runs(page, ["fake", "mine"])
    assert "mine" in page.locator("#numbers").inner_text()
    open_tab(page, "Quantise", "#sqnr")
    assert "bits per decoder weight" in page.locator("#summary").inner_text()


def test_a_run_leaves_as_a_zip_file_and_comes_back(visit, tmp_path):
    page = visit()
    quantise(page)
    open_keep(page)
    page.locator("#pack-run").click()
    page.locator("#run-file").wait_for(state="visible")
    with page.expect_download() as download:
        page.locator("#run-file").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.suffix == ".zip" and file.stat().st_size > 100_000
    page.locator("#remove-run").click()
    runs(page, ["fake"])
    with page.expect_file_chooser() as chooser:
        page.locator("#upload-saved").click()
    chooser.value.set_files(file)
    runs(page, ["fake", "W4A4 g32"])
    file.write_bytes(file.read_bytes()[:5000])
    with page.expect_file_chooser() as chooser:
        page.locator("#upload-saved").click()
    chooser.value.set_files(file)
    status(page, "E-CKPT-BAD")


def test_a_link_with_every_part_opens_there_in_another_browser(visit, address):
    view = "tab=reorder&layer=2&site=q&channel=5&preview=3&linear=1&measure_on=wikitext2&memory_of=opt-66b&batch=64"
    page = visit(f"?model=fake&scheme=W4A8&clusters=8&seed=3&window=256&{view}", ready=False)
    page.wait_for_function("() => document.querySelector('#headline')?.innerText.includes('clusters')")
    assert page.locator("#strips .qs-chart").is_visible()
    assert page.locator("#reorder-layer input[type=number]").input_value() == "2"
    page.get_by_text("Share and save").click()
    page.locator("#copy-link").click()
    page.wait_for_function("() => document.querySelector('#link textarea, #link input')?.value.startsWith('http')")
    link = page.locator("#link textarea, #link input").first.input_value()
    other = visit(link.removeprefix(address), ready=False)
    open_tab(other, "Explore", "#scatter")
    other.wait_for_function("() => document.querySelector('#facts h2')?.innerText.endsWith('channel 5')")
    assert other.locator("#facts h2").inner_text().startswith("Layer 2 · queries")
    other.wait_for_selector("#tokens mark")
    assert other.locator("#side-g input[type=number]").input_value() == "8"
    assert other.locator("#scheme input").input_value().startswith("W4A8")
    assert other.locator("#linear input").is_checked()
    open_tab(other, "Reorder", "#strips")
    assert other.locator("#preview-bits input").input_value() == "3 bits"
    open_tab(other, "Compare")
    assert other.locator("#eval-text input").input_value() == "WikiText-2"
    other.locator("#memory-panel button").first.click()
    assert other.locator("#shape input").input_value() == "opt-66b"
    assert other.locator("#batch input[type=number]").input_value() == "64"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("calibration=pasted%3Asha256%3D" + 64 * "0", "its author pasted it"),
        ("channel=99999", "E-PARAM-CHANNEL"),
        ("runs=0123456789abcdef", "not kept here"),
    ],
)
def test_a_part_of_a_link_that_is_not_there_is_said_in_a_sentence(visit, query, words):
    page = visit(f"?model=fake&{query}")
    assert words in status(page, words)
    page.wait_for_selector("#tokens mark")


@pytest.mark.parametrize("value", ["99", "-1", "1e999", "null", '"two"', "2.5"])
@pytest.mark.parametrize("field", ["layer", "reorder-layer", "g", "side-g"])
def test_values_sent_past_the_fields_get_a_sentence(visitor, field, value):
    answer, text = visitor.evaluate(SEND, [field, "input", {field: value}])
    assert answer == 200 and "E-PARAM-" in text and "broke" not in text, text[:400]


@pytest.mark.parametrize(
    ("field", "event", "sent"),
    [
        ("g", "input", {"g": "500"}),
        ("preview-bits", "input", {"preview-bits": "null"}),
        ("site", "input", {"site": '"nowhere"'}),
        ("clusters-R1", "input", {"clusters-R1": "1e999"}),
        ("batch", "input", {"batch": "1e999"}),
        ("shape", "input", {"shape": "7"}),
        ("save-recipe", "click", {"bits-down_in": "null", "scheme": '"custom"'}),
        ("save-recipe", "click", {"model": "null"}),
        ("copy-link", "click", {"observe-tokens": "1e999"}),
    ],
)
def test_other_values_sent_past_the_fields_get_a_sentence_too(visitor, field, event, sent):
    answer, text = visitor.evaluate(SEND, [field, event, sent])
    assert answer == 200 and "E-PARAM-" in text and "broke" not in text, text[:400]


@pytest.fixture(scope="module")
def visitor(browser, address):
    """A page that stays open for many events."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#tokens mark")
    yield page
    context.close()



def test_the_report_opens_from_disk_and_asks_for_nothing(visit, browser, tmp_path):
    page, file = visit(), tmp_path / "report.html"
    quantise(page)
    page.get_by_text("Share and save").click()
    with page.expect_download() as saved:
        page.locator("#save-html").click()
    saved.value.save_as(file)
    for width in (1280, 390):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        report, asked = context.new_page(), []
        report.on("request", lambda request, asked=asked: asked.append(request.url))
        report.goto(file.as_uri())
        assert asked == [file.as_uri()] and report.locator("svg").count() == 2 and report.locator("h2").count() >= 2
        assert report.locator("table").first.is_visible() and "W4A4" in report.locator("pre").last.inner_text()
        assert report.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing leaves the page"
        context.close()


def test_the_api_page_shows_the_four_endpoints(visit):
    page = visit()
    page.get_by_text("Share and save").click()
    page.locator("#programs").click()
    for name in ("/inspect", "/predict", "/quantize", "/compare"):
        page.get_by_text(name).first.wait_for()
    page.get_by_text("Observe the range of every channel").first.wait_for()

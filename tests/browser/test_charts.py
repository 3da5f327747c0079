"""Charts in a real browser: drawing order, words that fit at every width, the keyboard, contrast and focus."""

from __future__ import annotations

import pytest

from tests.browser.page_tools import open_tab

pytestmark = pytest.mark.browser

TURNS = """() => {
  window.turns = [];
  for (const id of ['strips', 'cluster-scatter', 'curve']) {
    const chart = document.querySelector('#' + id + ' .qs-chart');
    new MutationObserver(() => window.turns.push(id)).observe(chart, { attributes: true, attributeFilter: ['data-drawn'] });
  }
}"""
OUTSIDE = """() => [...document.querySelectorAll('.qs-chart')].filter(chart => chart.clientWidth).flatMap(chart => {
  const box = chart.getBoundingClientRect();
  return [...chart.querySelectorAll('svg.main-svg text')].filter(text => text.getBoundingClientRect().width).map(text => {
    const r = text.getBoundingClientRect();
    const over = Math.max(box.left - r.left, r.right - box.right, box.top - r.top, r.bottom - box.bottom);
    return [chart.getAttribute('aria-label'), text.textContent, Math.round(over)];
  }).filter(([, , over]) => over > 2);
})"""
"""Texts of charts that stick out of their chart, by how many pixels."""
CROSSED = """() => [...document.querySelectorAll('.qs-chart')].filter(chart => chart.clientWidth).flatMap(chart => {
  const parts = [...chart.querySelectorAll('.gtitle, .legend .scrollbox, .xtitle, .nsewdrag')];
  const boxes = parts.map(e => [e, e.getBoundingClientRect()]);
  const crossed = [];
  boxes.forEach(([e, a], i) => boxes.slice(i + 1).forEach(([f, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (e.matches('.nsewdrag') && f.matches('.nsewdrag')) return;
    if (chart.closest('#curve')) return;  // its legend lies in the empty corner over the curve
    if (wide > 3 && high > 3) crossed.push([chart.getAttribute('aria-label'), e.getAttribute('class'), f.getAttribute('class')]);
  }));
  return crossed;
})"""
"""Titles, legends and plots of one chart that lie on each other."""
OUTLINED = """() => [document.activeElement, document.activeElement.closest('.wrap-inner')].filter(e => e)
  .map(e => getComputedStyle(e)).some(style => style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2)"""
CONTRAST = """(element) => {
  const channels = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = (colour) => channels(colour).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const style = getComputedStyle(element);
  const [low, high] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.mark.parametrize("site", ["MLP in", "MLP hidden"])
def test_dragging_g_draws_the_strips_first_and_warns_of_nothing(visit, site):
    page, said = visit(), []
    page.on("console", lambda message: said.append(message.text))
    open_tab(page, "Reorder", "#strips")
    page.evaluate(TURNS)
    page.locator("#reorder-site").get_by_text(site).click()
    page.wait_for_function("() => window.turns.length >= 3")  # the site's own turns
    page.locator("#g input[type=range]").focus()
    for key in ("Home", "End"):  # few clusters: a colour each; many: the ordered scale
        page.evaluate("() => (window.turns.length = 0)")
        page.keyboard.press(key)
        page.wait_for_function("() => window.turns.length >= 3")
        assert page.evaluate("() => window.turns") == ["strips", "cluster-scatter", "curve"]
    assert not [text for text in said if "GL Driver" not in text], said[:3]
    colours = "() => [...document.querySelectorAll('#strips .points path')].map(bar => getComputedStyle(bar).fill)"
    page.wait_for_function(f"() => new Set(({colours})()).size > 32")
    assert "rgb(0, 0, 0)" not in page.evaluate(colours)


@pytest.mark.parametrize("widths", [(1440, 1024), (390,)], ids=str)
def test_no_word_of_a_chart_is_cut_off_and_nothing_lies_on_a_title(visit, widths):
    page = visit("?model=fake&method=bitnet", width=widths[0])
    page.wait_for_selector("#tokens mark")
    open_tab(page, "Quantise")
    page.locator("#quantize").click()
    page.wait_for_selector("#quick-numbers tbody tr:nth-child(2)")
    charts = {"Explore": "#scatter", "Reorder": "#strips", "Quantise": "#sqnr", "Compare": "#bars", "BitNet": "#zeros"}
    for tab, chart in charts.items():
        open_tab(page, tab, chart)
        if tab == "BitNet":
            page.wait_for_selector("#input-down-in .qs-chart[data-drawn]")
        for width in (*widths[1:], widths[0]):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(f"() => ({OUTSIDE})().length === 0 && ({CROSSED})().length === 0", timeout=15_000)


def test_runs_leave_their_chart_its_room(visit):
    page = visit()
    for count, g in enumerate((31, 24, 16, 8, 4)):
        page.locator("#side-g input[type=number]").fill(str(g))
        with page.expect_response(lambda response: "predict" in response.url):  # the recipe's fields follow
            page.locator("#side-g input[type=number]").press("Enter")
        page.locator("#side-quantize").click()
        page.wait_for_selector(f"#quick-numbers tbody tr:nth-child({count + 2})")
    page.wait_for_function("() => document.querySelectorAll('#sqnr .legendtoggle').length === 6")
    assert page.locator("#sqnr .nsewdrag").first.bounding_box()["height"] >= 110
    colours = page.evaluate("() => [...document.querySelectorAll('#sqnr .js-line')].map(line => getComputedStyle(line).stroke)")
    assert len(set(colours)) == 5


def test_arrow_keys_walk_from_point_to_point_and_enter_chooses(visit):
    page = visit()
    page.wait_for_selector("#tokens mark")
    chart = page.locator("#scatter .qs-chart")
    chart.focus()
    assert chart.get_attribute("role") == "group" and chart.get_attribute("aria-label")
    page.keyboard.press("Home")
    page.wait_for_function("() => document.querySelector('#scatter .qs-said').textContent.includes('channel')")
    first = page.locator("#scatter .qs-said").inner_text()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("text => document.querySelector('#scatter .qs-said').textContent !== text", arg=first)
    number = page.evaluate("() => document.querySelector('#scatter .qs-said').textContent.match(/channel (\\d+)/)[1]")
    page.keyboard.press("Enter")
    page.wait_for_function("words => document.querySelector('#facts h2')?.innerText.endsWith(words)", arg=f"channel {number}")
    heatmap = page.locator("#heatmap .qs-chart")
    heatmap.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#heatmap .qs-said').textContent.includes('layer')")
    before = page.locator("#heatmap .qs-said").inner_text()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("text => document.querySelector('#heatmap .qs-said').textContent !== text", arg=before)


def test_buttons_over_a_chart_are_no_stops_of_the_tab_key_and_scrolled_tables_are(visit):
    page = visit()
    page.wait_for_selector("#tokens mark")
    page.locator("#scatter").hover()
    assert page.locator("#scatter .modebar-btn").count() > 3
    assert page.evaluate("() => [...document.querySelectorAll('.modebar-btn')].every(button => button.tabIndex === -1)")
    assert page.evaluate("() => [...document.querySelectorAll('.qs-scroll')].every(region => region.tabIndex === 0)")
    assert page.evaluate("() => document.querySelectorAll('.qs-scroll').length") >= 2


def test_token_marks_can_be_read_and_focus_by_keyboard_is_visible(visit):
    page = visit("?__theme=light")
    page.wait_for_selector("#tokens mark")
    for widget in ("#layer input[type=range]", "#model input", "#observe"):
        page.locator(widget).focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Shift+Tab")
        assert page.evaluate(OUTLINED), widget
    light = page.locator("#tokens mark").first.evaluate(CONTRAST)
    page.evaluate("() => document.body.classList.add('dark')")
    dark = page.locator("#tokens mark").first.evaluate(CONTRAST)
    assert min(light, dark) >= 4.5 and light != dark


def test_the_moving_average_changes_points_title_and_facts_together(visit):
    page = visit()
    page.wait_for_selector("#tokens mark")
    page.locator("#averaged input").check()
    page.wait_for_function("() => document.querySelector('#scatter .gtitle').textContent.includes('averaged')")
    assert page.locator("#scatter .xtitle").text_content() == "average channel minimum"
    assert "average range" in page.locator("#facts").inner_text()
    page.locator("#averaged input").uncheck()
    page.wait_for_function("() => !document.querySelector('#facts').innerText.includes('average range')")
    assert page.locator("#scatter .xtitle").text_content() == "channel minimum"

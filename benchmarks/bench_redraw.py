"""U1 to U3: time from moving the slider or clicking to painted pixels, in headless Chromium.

U1, U2: g is moved by one step in the tab Reorder; the time runs from the slider's `input` event to the frame that shows the
strips of the new g. A model with random weights gives 768 and 4,096 channels.
U3: a point of the heat map is clicked, each time another layer and channel; the time runs from the click to the frame that
shows this channel's histogram and the tokens at its extreme values.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.browser import chromium, page_server, visit
from benchmarks.common import Result

STEPS = 24
CLICKS = 9
STRIPS = (("U1 strips 768", "MLP in", 768, "≤ 0.25 s"), ("U2 strips 4096", "MLP hidden", 4096, "≤ 0.4 s"))
"""Job, site by its label on the page, its channels, and the target."""

WATCH = """() => {
  const paint = (done) => requestAnimationFrame(() => setTimeout(() => done(performance.now())));  // after the frame
  window.moved = 0;
  document.querySelector('#g input[type=range]').addEventListener('input', (event) => { window.moved = event.timeStamp; }, true);
  const chart = document.querySelector('#strips .qs-chart');
  chart.on('plotly_afterplot', () => paint((now) => { window.painted = now; }));
}"""
PAINTED = "() => window.painted > window.moved && window.moved > 0 && window.painted - window.moved"
CLICKED = """() => document.addEventListener('click', (event) => { window.clicked = event.timeStamp; }, true)"""
SHOWN = """([words, drawn]) => {
  const facts = document.querySelector('#facts h2')?.innerText || '';
  const count = Number(document.querySelector('#histogram .qs-chart').dataset.drawn || 0);
  const there = facts.endsWith(words) && document.querySelector('#tokens mark') && count > drawn;
  return there && performance.now() - window.clicked;
}"""
TITLED = "words => document.querySelector('#facts h2')?.innerText.startsWith(words)"
CELL = """([layer, channel]) => {
  const chart = document.querySelector('#heatmap .qs-chart');
  const box = chart.getBoundingClientRect();
  const { xaxis, yaxis } = chart._fullLayout;
  return [box.x + xaxis._offset + xaxis.c2p(channel), box.y + yaxis._offset + yaxis.c2p(layer)];
}"""


def run(model: str) -> list[Result]:
    """Measure U1 and U2 on random weights, U3 on `model`; all in one browser."""
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        return [*_strips(browser, Path(folder) / "wide"), _channel(browser, model)]


def _strips(browser: Any, folder: Path) -> list[Result]:
    """Move g one step at a time, down through many clusters and few, and wait for the strips after each."""
    from core.models.tiny import save_tiny

    save_tiny(folder, "llama", layers=2, hidden_size=768, intermediate_size=4096)
    results = []
    with page_server(str(folder)) as address:
        page = visit(browser, address)
        page.get_by_role("tab", name="Reorder").click()
        page.wait_for_selector("#strips .js-plotly-plot")
        page.evaluate(WATCH)
        for job, site, channels, mark in STRIPS:
            page.locator("#reorder-site").get_by_text(site).click()
            page.wait_for_function(f"() => document.querySelector('#headline').innerText.includes('{channels:,} channels')")
            page.locator("#g input[type=number]").fill(str(STEPS + 4))
            page.locator("#g input[type=number]").press("Enter")
            page.wait_for_timeout(1500)
            slider = page.locator("#g input[type=range]")
            slider.focus()
            times = []
            for _ in range(STEPS):
                page.keyboard.press("ArrowLeft")
                times.append(page.wait_for_function(PAINTED).json_value())
                page.wait_for_timeout(150)
            note = f"slowest of {STEPS} {max(times) / 1000:.3f} s; g = {STEPS + 3} to 4"
            results.append(Result(job, None, "-", mark, seconds=median(times) / 1000, note=note))
        page.close()
    return results


def _channel(browser: Any, model: str) -> Result:
    """Time clicks on cells of the heat map of `model`."""
    with page_server(model) as address:
        page = visit(browser, address)
        page.wait_for_selector("#tokens mark")
        times = channel_clicks(page, CLICKS)
        page.close()
    note = f"{model}, slowest of {CLICKS} {max(times):.3f} s; first click {times[0]:.3f} s"
    return Result("U3 channel default model", None, "-", "≤ 3 s", seconds=median(times), note=note)


def channel_clicks(page: Any, clicks: int) -> list[float]:
    """Time clicks on cells of the heat map, from the last layer to the first, each another channel.

    Returns: for each click the seconds until the channel's histogram and tokens are there.
    """
    page.evaluate(CLICKED)
    last = int(page.evaluate("() => document.querySelector('#heatmap .qs-chart')._fullLayout.yaxis.range[1]"))
    times = []
    for step in range(clicks):
        layer, channel = last - step * last // (clicks - 1), 20 + 11 * step
        drawn = page.evaluate("() => Number(document.querySelector('#histogram .qs-chart').dataset.drawn || 0)")
        page.locator("#heatmap").scroll_into_view_if_needed()  # a click reaches only what the window shows
        page.mouse.click(*page.evaluate(CELL, [layer, channel]))
        page.wait_for_function(TITLED, arg=f"Layer {layer} ")
        words = f"channel {page.locator('#channel input').input_value()}"
        times.append(page.wait_for_function(SHOWN, arg=[words, drawn]).json_value() / 1000)
    return times

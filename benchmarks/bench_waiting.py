"""W1 to W4: how long a visitor waits while other jobs run, measured in headless Chromium.

W1 to W3: 64 visitors have each asked for a different quantised model, and their pages poll as a browser's do. The
65th opens the page (to the first chart drawn), moves g by one step (to painted strips) and clicks a channel (to its tokens).
W4: a visitor clicks channels while a model of their own is being quantised.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import httpx

from benchmarks.bench_redraw import PAINTED, WATCH, channel_clicks
from benchmarks.browser import chromium, page_server, visit
from benchmarks.common import Result
from benchmarks.visitors import Report, Visitor
from core import embedded_cards

VISITORS = 64
MOVES = 12
CLICKS = 6
MARK = "≤ 2 s"
RUNNING = "() => document.querySelector('#status').innerText.includes('Layer')"


def run(model: str) -> list[Result]:
    """Measure on the first embedded model, whatever `model` is: the target is for embedded ones."""
    del model
    embedded = next(name for name, card in embedded_cards().items() if card.get("mode") == "fp")
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        os.environ["QUANTSCOPE_CACHE"] = folder  # without an earlier run's models, which would only be loaded
        with page_server(embedded) as address:
            visit(browser, address).close()
            with crowd(address) as waiting:
                results = _newcomer(browser, address)
                left = waiting()
            results = [Result(r.job, None, "-", MARK, seconds=r.seconds, note=f"{r.note}{left} jobs in line") for r in results]
        with page_server(embedded) as address:
            return [*results, _own_click(browser, address)]


def _newcomer(browser: Any, address: str) -> list[Result]:
    """Time the 65th visitor's opening, moves of g, and a channel."""
    start = time.perf_counter()
    page = visit(browser, address)
    opened = time.perf_counter() - start
    page.wait_for_selector("#tokens mark")
    clicks = channel_clicks(page, CLICKS)
    page.get_by_role("tab", name="Reorder").click()
    page.wait_for_selector("#strips .js-plotly-plot")
    page.wait_for_timeout(500)
    page.evaluate(WATCH)
    page.locator("#g input[type=range]").focus()
    moves = []
    for _ in range(MOVES):
        page.keyboard.press("ArrowLeft")
        moves.append(page.wait_for_function(PAINTED).json_value() / 1000)
        page.wait_for_timeout(150)
    page.close()
    return [
        Result("W1 65th visitor: page opened, first chart drawn", None, "-", seconds=opened),
        Result("W2 65th visitor: g to painted strips", None, "-", seconds=median(moves), note=f"slowest {max(moves):.2f} s, "),
        Result("W3 65th visitor: click to a channel's tokens", None, "-", seconds=median(clicks), note=_slowest(clicks)),
    ]


def _own_click(browser: Any, address: str) -> Result:
    """Time clicks on channels while the visitor's own run is in progress."""
    page = visit(browser, address)
    page.wait_for_selector("#tokens mark")
    page.get_by_role("tab", name="Quantise").click()
    page.locator("#quantize-tokens input[type=number]").fill("16384")
    page.locator("#quantize-tokens input[type=number]").press("Enter")
    page.locator("#quantize").click()
    page.wait_for_function(RUNNING)
    page.get_by_role("tab", name="Explore").click()
    clicks = channel_clicks(page, CLICKS)
    still = "still running" if page.evaluate(RUNNING) else "ended meanwhile"
    page.close()
    job = "W4 click to a channel's tokens during one's own run"
    return Result(job, None, "-", MARK, seconds=median(clicks), note=f"{_slowest(clicks)}run {still}")


def _slowest(times: list[float]) -> str:
    return f"slowest of {len(times)} {max(times):.2f} s, "


@contextlib.contextmanager
def crowd(address: str) -> Iterator[Any]:
    """Let VISITORS visitors ask for a quantised model each; yield a function that counts those still waiting or running."""
    finished: set[int] = set()
    asked = threading.Barrier(2)

    async def everyone() -> None:
        async with contextlib.AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(Visitor(address, n, Report())) for n in range(VISITORS)]
            for number, visitor in enumerate(visitors):
                await visitor.open()
                await visitor.send(visitor.events["side-quantize", "click"], {visitor.named["clusters-R1"]: number + 1})
            await asyncio.to_thread(asked.wait)
            await asyncio.gather(*(listen(number, visitor) for number, visitor in enumerate(visitors)))

    async def listen(number: int, visitor: Visitor) -> None:
        await visitor.settle()
        finished.add(number)

    loop = asyncio.new_event_loop()
    task = loop.create_task(everyone())

    def serve() -> None:
        with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=serve)
    thread.start()
    asked.wait(600)
    yield lambda: VISITORS - len(finished)
    loop.call_soon_threadsafe(task.cancel)
    thread.join(30)


"""Time `python -m app` until the first chart is drawn, in headless Chromium, with the model cached."""

from __future__ import annotations

import time

from benchmarks.browser import chromium, page_server, visit
from benchmarks.common import Result


def run(model: str) -> list[Result]:
    """Measure seconds from the command to the first drawn chart; the browser is already running."""
    with chromium() as browser:
        start = time.perf_counter()
        with page_server(model) as address:
            visit(browser, address)
            seconds = time.perf_counter() - start
    return [Result("page: `python -m app` to the first chart drawn", None, "-", "≤ 15 s", seconds=seconds)]

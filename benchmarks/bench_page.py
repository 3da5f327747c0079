"""`python -m app` to a page whose first chart is drawn, in headless Chromium, with the model cached."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import Result

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-swiftshader",
]


def run(model: str) -> list[Result]:
    """Measure seconds from the command to the first drawn chart; the browser is already running."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        start = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, "-m", "app", "--port", str(port), "--model", model],
            cwd=Path(__file__).resolve().parents[1],
            env=dict(os.environ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            page = browser.new_page()
            while True:
                try:
                    page.goto(f"http://127.0.0.1:{port}/")
                    break
                except Exception:  # noqa: BLE001 (the server is not up yet; the deadline below ends the wait)
                    if time.perf_counter() - start > 120:
                        raise
                    time.sleep(0.2)
            page.wait_for_selector(".js-plotly-plot .main-svg", timeout=120_000)
            page.wait_for_function("document.querySelector('.js-plotly-plot')?.data?.length > 0", timeout=120_000)
            seconds = time.perf_counter() - start
        finally:
            server.terminate()
            server.wait(timeout=20)
            browser.close()
    return [Result("page: `python -m app` to the first chart drawn", None, "-", "≤ 15 s", seconds=seconds)]

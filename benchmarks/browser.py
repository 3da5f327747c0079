"""Run the page's server and a headless Chromium, for the jobs that measure waiting times."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
START_SECONDS = 120.0


@contextmanager
def chromium() -> Iterator[Any]:
    """Start headless Chromium and close it at the end. Raises: RuntimeError if this machine has none."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        raise RuntimeError("No Chromium on this machine: install chromium, or leave the browser's jobs out.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_server(model: str) -> Iterator[str]:
    """Start `python -m app --model MODEL` on a free port, yield its address at once, and end it.

    The server may not listen yet: `visit` waits for it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "app", "--port", str(port), "--model", model],
        cwd=Path(__file__).resolve().parents[1],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(timeout=20)


def visit(browser: Any, address: str, *, width: int = 1440, height: int = 900) -> Any:
    """Open the page as soon as the server listens, and return it once the first chart is drawn.

    Raises: TimeoutError if it does not listen within START_SECONDS.
    """
    from playwright.sync_api import Error

    page = browser.new_page(viewport={"width": width, "height": height})
    limit = time.perf_counter() + START_SECONDS
    while True:
        try:
            page.goto(address)
            break
        except Error as error:  # refused: the server does not listen yet
            if time.perf_counter() > limit:
                raise TimeoutError(f"The page did not answer within {START_SECONDS:.0f} s: {error}") from None
            time.sleep(0.2)
    page.set_default_timeout(1000 * START_SECONDS)
    page.wait_for_function("document.querySelector('#scatter .js-plotly-plot')?.data?.length > 1")
    return page

"""A real server with a fake workbench, and a headless Chromium to drive it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.app.tools import FAKE

sync_api = pytest.importorskip("playwright.sync_api")
ROOT = Path(__file__).resolve().parents[2]
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
CHART_DRAWN = "#scatter .qs-chart[data-drawn] .scatterlayer .points path, #scatter .qs-chart[data-drawn] canvas"


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(model: str, log: Path, **environment: str) -> Iterator[str]:
    """Run the page until the generator is closed; yields its address."""
    port = free_port()
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "app", "--model", model, "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            limit = time.monotonic() + 240
            while "Quantscope is at" not in log.read_text():
                assert server.poll() is None and time.monotonic() < limit, log.read_text()[-2000:]
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="session")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server printed."""
    return tmp_path_factory.mktemp("server") / "log.txt"


@pytest.fixture(scope="session")
def address(server_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a page whose workbench is the fake one; what it saves is removed with the page."""
    cache = tmp_path_factory.mktemp("cache")
    yield from serve("fake", server_log, QUANTSCOPE_WORKBENCH=FAKE, QUANTSCOPE_CACHE=str(cache))
    shutil.rmtree(cache)


@pytest.fixture(scope="package")
def browser() -> Iterator[object]:
    """Start the system's Chromium without a window.

    Playwright keeps an event loop running in this thread until it is closed, so it is closed before tests of other folders begin.
    """
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: object, address: str) -> Iterator[Callable]:
    """Open the page as a new visitor: visit(query, width=, height=, locale=). Script errors and foreign requests fail it."""
    contexts, faults = [], []

    def check(request: object) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            faults.append(f"request to {request.url}")

    def visitor(
        query: str = "", *, width: int = 1440, height: int = 900, ready: bool = True, locale: str = "en-US"
    ) -> object:
        context = browser.new_context(viewport={"width": width, "height": height}, locale=locale)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # a busy machine is slow, not wrong
        page.on("pageerror", lambda error: faults.append(f"script error {error}"))
        page.on("request", check)
        page.goto(address + query)
        if ready:
            page.wait_for_selector(CHART_DRAWN)
        return page

    yield visitor
    for context in contexts:
        context.close()
    assert not faults, faults

"""Reports and job tables for the page's tests, a folder of models for the command line's."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from app.cli import __main__ as cli  # noqa: E402 - the path fix comes first
from app.context import Context  # noqa: E402
from app.page import Page  # noqa: E402
from app.session import SessionStore  # noqa: E402
from app.settings import Settings  # noqa: E402
from app.worker.client import Workers  # noqa: E402
from core.recipe import Calibration  # noqa: E402
from tests.app.cli_tools import CALIBRATION, SENTENCES  # noqa: E402
from tests.app.tools import FAKE, quiet  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of these tests and their workers, removed with all that they saved."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTSCOPE_CACHE", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def bench():
    """The stand-in workbench, in this process."""
    from tests.app.fake_workbench import FakeWorkbench

    return FakeWorkbench()


@pytest.fixture(scope="session")
def ranges(bench):
    """Ranges of a small model."""
    return bench.observe("fake", Calibration("sotu", 1024), progress=quiet)


@pytest.fixture(scope="session")
def wide_ranges(bench):
    """Ranges of a model with 4096 channels."""
    return bench.observe("fake-wide", Calibration("sotu", 1024), progress=quiet)


@contextlib.contextmanager
def shared_context() -> Iterator[Context]:
    """What the tabs share, with fake workers and names for components."""
    settings = Settings(model="fake", workbench=FAKE)
    context = Context(settings, Workers(settings), SessionStore(seconds=60, capacity=100))
    context.key, context.status, context.stop, context.timer = "key", "status", "stop", "timer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.engine.warm", lambda: None)  # takes seconds, and nothing here waits for it
        yield context
    context.workers.close()


@pytest.fixture
def ctx() -> Iterator[Context]:
    """What the tabs share, for one test."""
    with shared_context() as context:
        yield context


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """The whole page with workers, for all tests of a file: each opens a session of its own."""
    with shared_context() as context:
        with gr.Blocks() as demo:
            page = Page(context)
            page.wire(demo)
        yield page


@pytest.fixture(scope="module")
def wait() -> Iterator[Callable]:
    """Run coroutines one after the other on one event loop, as a server does."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two float models, a text, and a quantised model made by the command line."""
    from core.models.tiny import save_tiny

    folder = tmp_path_factory.mktemp("cli")
    patch = pytest.MonkeyPatch()
    patch.setenv("QUANTSCOPE_CACHE", str(folder / "cache"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.chdir(folder)
    save_tiny(folder / "base", "llama")
    save_tiny(folder / "opt", "opt", seed=1)
    (folder / "text.txt").write_text(SENTENCES * 80)
    assert (
        cli.main(
            [
                "quantize",
                "--model",
                "base",
                "--method",
                "rptq",
                "--scheme",
                "W4A4",
                "--clusters",
                "R1=8,R2=2,R3=2,R4=8,R5=8",
                *CALIBRATION,
                "--out",
                "made",
                "--json",
                "made.json",
            ]
        )
        == 0
    )
    yield folder
    patch.undo()


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run a verb in that folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(place)
    capsys.readouterr()

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run

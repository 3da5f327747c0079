"""Reports and job tables for the page's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from app.jobs import JobRunner  # noqa: E402 - the path fix comes first
from app.settings import Settings  # noqa: E402
from core.config import Calibration  # noqa: E402

FAKE = "tests.app.fake_workbench:FakeWorkbench"


@pytest.fixture(scope="session")
def bench():
    """The stand-in workbench, in this process."""
    from tests.app.fake_workbench import FakeWorkbench

    return FakeWorkbench()


@pytest.fixture(scope="session")
def ranges(bench):
    """Ranges of a small model."""
    return bench.observe("fake", Calibration("sotu", 1024), progress=lambda *_: None)


@pytest.fixture(scope="session")
def wide_ranges(bench):
    """Ranges of a model with 4096 channels."""
    return bench.observe("fake-wide", Calibration("sotu", 1024), progress=lambda *_: None)


@pytest.fixture
def runner() -> Iterator[JobRunner]:
    """A job table with a fake worker."""
    table = JobRunner(Settings(model="fake", workbench=FAKE))
    yield table
    table.close()

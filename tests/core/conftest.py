"""A tiny model in a folder, a cache folder of its own for each test, and a workbench that uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.models.tiny import save_tiny
from core.workbench import Workbench


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "llama", "llama", seed=2))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def bench(cache) -> Workbench:
    return Workbench()

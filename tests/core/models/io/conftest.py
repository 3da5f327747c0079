"""A cache of its own for tests that resolve names, and transformers without its compiler."""

from __future__ import annotations

import pytest
import torch

from core.models.io import catalog


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, no embedded models and no Hub; returns the cache's folder."""
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(catalog, "EMBEDDED", tmp_path / "embedded")
    return tmp_path / "cache"


@pytest.fixture
def no_compiler():
    """transformers decorates its quantisers with torch.compile, which needs a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield

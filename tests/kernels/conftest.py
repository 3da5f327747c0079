"""Where the tests of Triton kernels run: on the GPU if there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import importlib

import pytest
import torch

from kernels.backend import Backend, Choice

OPS = (
    "kv.append", "kv.attention", "linear.cluster", "linear.weight_only", "norm_quant", "rope", "ternary.linear", "ternary.sparse",
    "topk",
)  # fmt: skip
DOORS = ("core.models.attention", "core.models.norm")
"""Modules that ask `triton_runs_on`."""


@pytest.fixture(scope="session")
def device() -> str:
    """Device of the tensors that a Triton kernel is given."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def capability(monkeypatch):
    """Set the compute capability that CUDA devices are said to have; (9, 0) at first."""
    pytest.importorskip("triton")

    def be(*number: int) -> None:
        monkeypatch.setattr("kernels.backend._capability", lambda device: number)

    be(9, 0)
    return be


@pytest.fixture
def triton_everywhere(monkeypatch, device):
    """AUTO takes the kernels on CPU tensors too, where they are interpreted."""
    if device == "cpu":
        from kernels import _triton

        def choose(requested, **_):
            return Choice(Backend.REFERENCE if requested is Backend.REFERENCE else Backend.TRITON, "test")

        def use(backend, x, *, unsupported_reason=None):
            return backend is not Backend.REFERENCE and unsupported_reason is None

        for op in OPS:
            monkeypatch.setattr(importlib.import_module(f"kernels.{op}"), "use_triton", use)
        for module in DOORS:
            monkeypatch.setattr(f"{module}.triton_runs_on", lambda device: True)
        monkeypatch.setattr("core.quant.linear.ternary.triton_unsupported_reason", lambda device: None)
        monkeypatch.setattr("core.quant.linear.quant.select_linear_backend", choose)
        assert _triton.interpreting()
    return device

"""Where the tests of Triton kernels run: on the GPU if there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Device of the tensors that a Triton kernel is given."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"

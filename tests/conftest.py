"""Settings of the whole session that must come before any import of torch and Triton."""

from __future__ import annotations

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # `pytest -n`: the processes share the processor
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch  # noqa: E402 - reads the variable

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors: see kernels/_triton.py


def pytest_collection_modifyitems(items: list) -> None:
    """Put the browser's tests first where processes share the work: a long file that begins last would leave the others idle."""
    if workers:
        items.sort(key=lambda item: "/browser/" not in item.nodeid)

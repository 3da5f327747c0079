"""Settings of the whole session that must come before any import of torch and Triton."""

from __future__ import annotations

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # `pytest -n`: the processes share the processor
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch  # noqa: E402 - reads the variable

os.environ.setdefault("QUANTSCOPE_INT8_COLUMNS", "192")  # else measured, and the same test could take either product

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors: see kernels/_triton.py


LONG = ("tests/browser/", "tests/kernels/", "tests/training/", "tests/fuzz/")


def pytest_collection_modifyitems(items: list) -> None:
    """Put the longest files first where processes share the work: one that begins last would leave the others idle."""
    if workers:
        items.sort(key=lambda item: next((n for n, place in enumerate(LONG) if item.nodeid.startswith(place)), len(LONG)))

"""Record where a number was measured: versions, processor, threads, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("torch", "transformers", "scikit-learn", "triton")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide results, by package name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Return the processor's name, the cores this process may use and the torch threads, in one line."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads"


def provenance() -> dict[str, object]:
    """Return versions, hardware and UTC date for a measurement made now."""
    return {"versions": versions(), "hardware": hardware(), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""Check before a download that a model's weights fit in memory and its files on the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from core.errors import InputError, ModelError, ResourceError
from core.memory import free_memory_bytes


def memory_limit_bytes() -> int:
    """Return how many bytes a model's weights may take: `$QUANTSCOPE_MAX_MODEL_GB` (10**9 bytes), else 80% of the free memory.

    Raises: InputError E-PARAM-MAX-MODEL-GB when the variable is not a positive number.
    """
    stated = os.environ.get("QUANTSCOPE_MAX_MODEL_GB")
    if not stated:
        return int(0.8 * free_memory_bytes())
    with contextlib.suppress(ValueError, OverflowError):
        if float(stated) > 0:
            return int(float(stated) * 1e9)
    raise InputError(f"QUANTSCOPE_MAX_MODEL_GB is {stated[:30]!r}: it must be a positive number of gigabytes.",
                     code="E-PARAM-MAX-MODEL-GB")


def check_memory(parameters: int, *, bytes_per_parameter: int = 4) -> None:
    """Refuse a model whose weights do not fit.

    Args: parameters: stored elements. bytes_per_parameter: 4 for float32.
    Raises: ModelError E-MODEL-SIZE with both sizes.
    """
    needed, limit = parameters * bytes_per_parameter, memory_limit_bytes()
    if needed > limit:
        raise ModelError(f"The weights need {needed / 1e9:.1f} GB of memory, the limit here is {limit / 1e9:.1f} GB. "
                         "Choose a smaller model.", code="E-MODEL-SIZE")


def check_disk(nbytes: int, folder: Path) -> None:
    """Refuse to write more than half of the free disk.

    Args: nbytes: bytes to be written. folder: where; it need not exist yet.
    Raises: ResourceError E-DISK with both sizes.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free / 2:
        raise ResourceError(f"This needs {nbytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free and half of that "
                            "may be used. Free some space, or move the cache with QUANTSCOPE_CACHE.", code="E-DISK")

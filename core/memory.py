"""Measure the memory of this machine or container, and recognise errors that say that it ran out."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of a container's limit and use, of control groups version 2 and 1."""


def memory_bytes() -> int:
    """Return the bytes of memory that this process may use: the smaller of the machine's and the container's."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _containers())])


def free_memory_bytes() -> int:
    """Return the bytes of memory that are free, under the container's limit too."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _containers())])


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error says that memory ran out: Python's own, or torch's on the processor or on a GPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "can't allocate memory" in str(error)


def _containers() -> list[tuple[int, int]]:
    """List (limit, bytes in use) of every control group that limits this process."""
    found = []
    for names in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # a limit of "max" is no number
            limit, used = (int((_CGROUP / name).read_text()) for name in names)
            found.append((limit, used))
    return found


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it, so a server would stay as large as it ever was."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)

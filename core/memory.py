"""Measure the memory of this machine or container, and recognise errors that say that it ran out."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil

_M_MMAP_THRESHOLD = -3
"""Name of the smallest size that has pages of its own, in glibc's malloc.h."""
_PAGES_FROM, _LARGEST_THRESHOLD = 10 * 2**20, 32 * 2**20
"""That size in `freed_at_once`; and the one that glibc itself arrives at in a process that frees large tensors."""
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


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Let the body return the memory of a tensor above 10 MiB as soon as it is freed; else glibc keeps it for other sizes.

    Such tensors get pages of their own, which takes time: the kernel clears them.
    """
    _set_mmap_threshold(_PAGES_FROM)
    try:
        yield
    finally:
        _set_mmap_threshold(_LARGEST_THRESHOLD)


def _set_mmap_threshold(nbytes: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, nbytes)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps it, so a server would stay as large as it ever was."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)

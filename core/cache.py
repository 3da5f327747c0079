"""The cache: the folder of everything that Quantscope may delete, where it is and how large it may become.

It holds folders that `storage.atomic_dir` wrote: downloaded and converted models, quantised models, texts and token streams.
Whenever a folder is added, those used longest ago are removed until the size is below the limit. The time of a folder's last
use is its modification time (`mark_used`). Two kinds of folders are never removed: those that are being read, which are locked
(`in_use`), and those used in the last `GRACE_S` seconds, which a reader may have chosen and not locked yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from core.errors import InputError
from core.folders import bytes_in, remove

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "QUANTSCOPE_CACHE_GB"
DEFAULT_GB = 20.0
"""Limit of the cache in gigabytes (10**9 bytes) unless `LIMIT_VARIABLE` says another."""

GRACE_S = 60.0


def cache_root() -> Path:
    """Return the folder of the cache: `$QUANTSCOPE_CACHE`, else the XDG cache folder / `quantscope`.

    Returns: an absolute path. It is not created here: writers create it.
    """
    chosen = os.environ.get("QUANTSCOPE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"  # the XDG rule: ignore a relative value
    return base / "quantscope"


def cache_limit() -> int:
    """Return how many bytes the cache may hold: `$QUANTSCOPE_CACHE_GB` (10**9 bytes), else `DEFAULT_GB`.

    Raises: InputError E-PARAM-CACHE-GB when the variable is not a positive number.
    """
    stated = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_GB)
    try:
        size = float(stated)
    except ValueError:
        size = math.nan
    if not 0 < size < 1e9:
        fault = f"{LIMIT_VARIABLE} is {stated[:30]!r}: give the cache's size as a positive number of gigabytes."
        raise InputError(fault, code="E-PARAM-CACHE-GB")
    return int(size * 1e9)


def mark_used(folder: Path) -> None:
    """Record that a folder of the cache is used now; other folders, and one that cannot be changed, are left alone."""
    with contextlib.suppress(OSError):
        if folder.is_relative_to(cache_root()):
            os.utime(folder)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[bool]:
    """Lock a folder of the cache while the body reads it, so that `sweep` leaves it, and mark it used; ignore other folders.

    Yields: whether the folder is locked.
    """
    mark_used(folder)
    with contextlib.ExitStack() as held:
        locked = False
        with contextlib.suppress(OSError):  # gone, or a file system without locks: the body finds out what it can read
            while not locked:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, handle)  # closing releases the lock
                fcntl.flock(handle, fcntl.LOCK_SH)
                locked = os.path.samestat(os.fstat(handle), folder.stat())  # another may have replaced it meanwhile
        yield locked


def sweep(keep: Path) -> None:
    """Remove the folders used longest ago until the cache holds at most `cache_limit` bytes; `keep` stays.

    Raises: InputError as `cache_limit`.
    """
    limit, recent = cache_limit(), time.time() - GRACE_S
    found = [(_last_use(folder), bytes_in(folder), folder) for folder in _entries()]
    total = sum(size for _, size, _ in found)
    for _, size, folder in sorted(found):
        if total <= limit:
            return
        if folder != keep and _last_use(folder) <= recent and _take_away(folder):
            total -= size
    if total > limit:
        logger.warning("the cache holds %.1f GB, more than its limit: what is left is in use", total / 1e9)


def _entries() -> list[Path]:
    """List the folders of the cache that have a manifest: those that a writer has completed (`quantized/*`, `hub/*/*`, …)."""
    found = {path.parent for pattern in ("*/*/manifest.json", "*/*/*/manifest.json") for path in cache_root().glob(pattern)}
    return [folder for folder in found if ".old-" not in folder.name]


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return math.inf  # another process has just removed it


def _take_away(folder: Path) -> bool:
    """Remove a folder unless somebody reads or writes it. It is renamed first: a reader sees the whole folder or none."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dead = folder.with_name(f"{folder.name}.part-{secrets.token_hex(6)}")  # swept later if we die here
        os.rename(folder, dead)
    except OSError:
        return False
    finally:
        os.close(handle)
    logger.info("the cache is full: removing %s", folder.name)
    remove(dead)
    return True

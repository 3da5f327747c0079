"""Replace one folder by another, in one step where the system can; and small functions of folders.

renameat2(RENAME_EXCHANGE) swaps two names atomically on Linux's own file systems. Where it is missing (some network
and sandbox file systems) the old folder is moved aside first, and `recover` undoes that if the writer died in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import secrets
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def publish(stage: Path, target: Path) -> None:
    """Rename the folder `stage` to `target`, and flush the parent folder.

    Afterwards `stage` is the folder that was replaced, or nothing. Raises: OSError; then `target` is as it was.
    """
    try:
        os.rename(stage, target)  # nothing there, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not exchange(stage, target):
            _replace_in_two_steps(stage, target)
    flush(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (renameat2 with RENAME_EXCHANGE). Returns: False where the system cannot; then nothing moved.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _replace_in_two_steps(stage: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.old-{secrets.token_hex(6)}")
    os.rename(target, old)
    try:
        os.rename(stage, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old, target)
        raise
    remove(old)


def recover(target: Path) -> None:
    """Put back the folder that a replacement in two steps had moved aside when it was killed; do nothing if there is none."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for old in sorted(target.parent.glob(f"{glob_name(target)}.old-*")):
        with contextlib.suppress(OSError):
            os.rename(old, target)
        return


def glob_name(path: Path) -> str:
    """Return the name of `path` as a glob pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path.name)


def flush(path: Path) -> None:
    """Write a file's or a folder's data through to the disk (fsync). Raises: OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there; what cannot be deleted is logged, and the next writer tries again."""
    if not os.path.lexists(path):
        return
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("could not remove %s: %s", path.name, error.strerror)


def bytes_in(folder: Path) -> int:
    """Count the bytes of all files under `folder`; files that vanish while they are counted are skipped."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def state_of(name: str) -> str | None:
    """Return a fingerprint of a local file or folder, from names, sizes and times alone: when it changes, so did the content.

    Args: name: a path, or any other name of a model. Only files directly in the folder count.
    Returns: 16 hexadecimal digits; None when `name` is no path of this machine.
    """
    try:
        if os.path.isdir(name):
            places = [os.path.join(name, entry) for entry in sorted(os.listdir(name))]
            found = [_facts(place) for place in places if os.path.isfile(place)]
        else:
            found = [_facts(name)]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return hashlib.sha256(repr(found).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _facts(path: str) -> tuple[str, int, int]:
    info = os.stat(path)
    return os.path.basename(path), info.st_size, info.st_mtime_ns

"""Turn errors of the disk into sentences: one for each errno with which writing can fail.

Rust libraries (safetensors, tokenizers, the Hub's downloader) raise errors of their own, whose text ends in "(os error 28)".
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from core.errors import QuantscopeError, ResourceError

_ELSEWHERE = "Choose another folder (QUANTSCOPE_CACHE moves the cache)"
_FREE = "Free some space, or choose another folder (QUANTSCOPE_CACHE moves the cache)"

WRITING = {
    errno.ENOSPC: ("the disk is full", _FREE),
    errno.EDQUOT: ("the disk quota is used up", _FREE),
    errno.EFBIG: ("a file would exceed the largest size allowed there", "Raise that limit (ulimit -f), or choose another folder"),
    errno.EROFS: ("the disk is read-only", _ELSEWHERE),
    errno.EIO: ("the disk reports an error", _ELSEWHERE),
    errno.ESTALE: ("the network disk has changed or is gone", _ELSEWHERE),
    errno.ENODEV: ("the disk is gone", _ELSEWHERE),
    errno.ENXIO: ("the disk is gone", _ELSEWHERE),
    errno.EMFILE: ("too many files are open", "Raise that limit (ulimit -n), or close other programs"),
    errno.ENFILE: ("too many files are open on this machine", "Close other programs"),
    errno.ENOTSUP: ("the disk cannot do what is needed", _ELSEWHERE),
    errno.ENOSYS: ("the disk cannot do what is needed", _ELSEWHERE),
}
"""errno → (reason, remedy), for errors that only a failed write raises."""

PLACE = {
    errno.EACCES: ("no permission to write there", _ELSEWHERE),
    errno.EPERM: ("no permission to write there", _ELSEWHERE),
    errno.ENAMETOOLONG: ("its name is too long", "Choose a shorter name"),
    errno.ENOTDIR: ("a part of its path is a file", _ELSEWHERE),
    errno.EEXIST: ("a part of its path is a file", _ELSEWHERE),
    errno.EISDIR: ("a folder has its name", "Choose another name"),
    errno.ENOENT: ("no folder can be made there", _ELSEWHERE),
    errno.ELOOP: ("the links in its path lead in a circle", _ELSEWHERE),
    errno.EBUSY: ("another program holds it", "Stop that program, or choose another folder"),
    errno.ETXTBSY: ("another program holds it", "Stop that program, or choose another folder"),
}
"""errno → (reason, remedy), for errors about a path: reading another file may raise them, too."""

_RUST = re.compile(r"\(os error (\d{1,3})\)")


@contextlib.contextmanager
def disk_errors(target: Path, *, every_path: bool = False) -> Iterator[None]:
    """Turn an error of the disk into ResourceError E-DISK, which names `target`, the reason and the remedy.

    Args:
        target: the file or folder that is written.
        every_path: True blames `target` for an error with any path, so give it only where nothing else is opened; False only for
            errors whose path begins like the target's, as those of its stages do.
    Raises: ResourceError E-DISK. Errors of other kinds pass unchanged.
    """
    try:
        yield
    except QuantscopeError:
        raise
    except OSError as error:
        if error.errno in WRITING or (error.errno in PLACE and (every_path or _concerns(target, error))):
            raise _sentence(target, error.errno) from error
        raise
    except Exception as error:  # wide: Rust libraries raise types of their own. Without an errno in its text it is raised again
        found = _RUST.search(str(error))
        if found and int(found[1]) in WRITING.keys() | PLACE.keys() - {errno.ENOENT}:
            raise _sentence(target, int(found[1])) from error
        raise


def disk_error_in(text: str, target: Path) -> ResourceError | None:
    """Return the ResourceError for the "[Errno 28]" in another program's output `text`, or None without one."""
    found = re.search(r"\[Errno (\d{1,3})\]", text)
    return _sentence(target, int(found[1])) if found and int(found[1]) in WRITING else None


def _concerns(target: Path, error: OSError) -> bool:
    """Say whether every path that an error names begins like the target's; errors of open files name none, and concern it."""
    named = [os.fspath(path) for path in (error.filename, error.filename2) if isinstance(path, (str, os.PathLike))]
    return all(path.startswith(str(target)) for path in named)


def _sentence(target: Path, number: int) -> ResourceError:
    reason, remedy = (WRITING | PLACE)[number]
    return ResourceError(f"Cannot write {target.name[:60]!r}: {reason}. {remedy}.", code="E-DISK")

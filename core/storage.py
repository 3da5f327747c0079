"""Write files and folders that are either whole or absent, whatever interrupts the writer.

`atomic_dir(target)` gives a stage beside the target. On success every file is flushed to disk, `manifest.json` (size
and SHA-256 of each file) is written last, and the stage takes the target's place in one rename; where a folder is
already there the two are exchanged in one system call (renameat2, Linux), so that a reader or a crash sees the old
folder or the new one. On failure the stage is removed. A stage is locked while its writer lives (flock on the folder),
so that the stages of dead writers can be told apart and swept. A folder that is added to the cache makes the cache look at
its size (`core.cache`).

`verify(folder)` accepts only a folder with its full manifest. The sequence write, fsync, rename, fsync of the parent is the one
in SQLite's and LMDB's notes on atomic commit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from core.cache import cache_limit, cache_root, mark_used, sweep
from core.disk import disk_errors
from core.errors import ArtifactError, InputError, ResourceError
from core.folders import flush, glob_name, publish, recover, remove

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "quantscope-manifest"
MAX_MANIFEST_BYTES = 8 * 2**20
_CHUNK = 2**20


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file as 64 lower-case hex digits; `on_bytes` is called with the count of bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            done += len(block)
            if on_bytes:
                on_bytes(done)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_dir(target: Path | str, *, replace: bool = False, private: bool = False) -> Iterator[Path]:
    """Yield a fresh stage folder; when the body ends well, the stage becomes `target` in one step.

    Args:
        target: folder to create or to replace. An existing folder is replaced only when it is empty or when its
            manifest lists every file in it, so that nobody's own files are deleted.
        replace: replace whatever is there; for folders inside the cache only.
        private: nobody but this user may enter the folder, while it is written too: modes 0700 and 0600.
    Raises:
        InputError E-PARAM-OUT: the target is a file, or a folder with files that are not Quantscope's.
        ResourceError E-DISK: the disk is full, read-only or not writable. The target is then as it was.
    """
    target = Path(os.path.realpath(target))
    cached = target.is_relative_to(cache_root())
    if cached:
        cache_limit()  # a limit that is no number is refused before the work
    with disk_errors(target, every_path=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        _check_replaceable(target, replace)
        stage, lock = _new_stage(target, sweep="*" if replace else glob_name(target), mode=0o700 if private else 0o777)
    try:
        try:
            with disk_errors(target):
                yield stage
            with disk_errors(target, every_path=True):
                _seal(stage)
                publish(stage, target)
        finally:  # after a publication this is the folder that was replaced, if any
            remove(stage)
    finally:
        os.close(lock)
    if cached:
        with contextlib.suppress(OSError):
            sweep(keep=target)


def write_file(path: Path, data: bytes) -> None:
    """Write one file in one step: a reader or a crash sees the old content or the new.

    Raises: ResourceError E-DISK; the file is then as it was, and nothing else is left.
    """
    part = path.with_name(f".{secrets.token_hex(6)}.part")
    with disk_errors(path, every_path=True):
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        flush(path.parent)


def check_target(target: Path | str) -> None:
    """Refuse before a long job what `atomic_dir` would refuse after it.

    Raises: InputError E-PARAM-OUT, ResourceError E-DISK.
    """
    if not str(target).strip() or "\0" in str(target):
        raise InputError("No output folder was named: give the name of a new or empty folder.", code="E-PARAM-OUT")
    target = Path(os.path.realpath(target))
    with disk_errors(target, every_path=True):
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # says whether the name is too long, or leads through a file
        recover(target)
        _check_replaceable(target, replace=False)
        parent = next(place for place in target.parents if place.is_dir())
        # tried out, as permissions do not tell: root may write anywhere, but not in /proc
        os.rmdir(tempfile.mkdtemp(prefix=".quantscope-", dir=parent))


def verify(folder: Path | str, checksums: bool = False) -> None:
    """Check that `folder` is complete: manifest present, every listed file there with its size.

    Args:
        folder: a folder written by `atomic_dir`. Files that the manifest does not list are ignored.
        checksums: also compare each SHA-256 (reads everything: about 1 s per GB).
    Raises: ArtifactError E-CKPT-BAD naming the first file that is missing or differs.
    """
    folder = Path(folder)
    recover(folder)
    for name, record in read_manifest(folder).items():
        path = folder / name
        try:
            info = os.lstat(path)
        except OSError:
            raise ArtifactError(f"{name} is missing from {folder.name!r}. Create the folder again.") from None
        if not stat.S_ISREG(info.st_mode) or info.st_size != record["size"]:
            raise ArtifactError(f"{name} has {info.st_size:,} of {record['size']:,} bytes: {folder.name!r} is damaged. "
                                "Create the folder again.")
        if checksums and file_sha256(path) != record["sha256"]:
            raise ArtifactError(f"The checksum of {name} differs: {folder.name!r} is damaged. Create the folder again.")


def is_whole(folder: Path | str, checksums: bool = False) -> bool:
    """Say whether `verify` accepts a folder; a whole folder of the cache counts as used now."""
    try:
        verify(folder, checksums)
    except ArtifactError:
        return False
    mark_used(Path(folder))
    return True


def read_manifest(folder: Path | str) -> dict[str, dict]:
    """Read the manifest of a folder written by `atomic_dir`: file name → {"size": bytes, "sha256": hex digits}.

    Raises: ArtifactError E-CKPT-BAD when it is missing, not ours, or names a file outside the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        if os.path.getsize(path) > MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != MANIFEST_FORMAT or document["version"] != 1:
            raise ValueError("another format")
        files = dict(document["files"])
        if not all(_is_inside(name) and type(record["size"]) is int and isinstance(record["sha256"], str)
                   for name, record in files.items()):
            raise ValueError("bad entry")
    except FileNotFoundError:
        raise ArtifactError(f"{folder.name!r} has no {MANIFEST}: it is incomplete, or Quantscope did not write it. "
                            "Create the folder again.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArtifactError(f"{MANIFEST} in {folder.name!r} cannot be read. Create the folder again.") from None
    return files


@contextlib.contextmanager
def file_lock(path: Path | str, *, timeout: float = 600.0) -> Iterator[None]:
    """Hold the lock file `path` (created when missing, never removed): one holder at a time, threads included.

    Args: timeout: seconds to wait for another holder.
    Raises: ResourceError E-TIME naming the holder's process id; E-DISK when the lock cannot be created.
    """
    path = Path(path)
    lock = FileLock(path, timeout=timeout, thread_local=False, poll_interval=0.05)
    try:
        with disk_errors(path, every_path=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        holder = f"process {found}" if (found := _read_line(path)) else "another process"
        waited = f" for more than {timeout:.0f} s" if timeout else ""
        raise ResourceError(f"In use by {holder}{waited}. Wait for it to finish, or stop it.", code="E-TIME") from None
    try:
        with disk_errors(path, every_path=True):
            path.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        lock.release()


def _read_line(path: Path) -> str:
    """Return at most 32 characters of a lock file, "" if it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")[:32].strip()
    except OSError:
        return ""


def _is_inside(name: str) -> bool:
    """Say whether a manifest's file name stays inside its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name and name != MANIFEST


def _check_replaceable(target: Path, replace: bool) -> None:
    """Refuse to replace anything that Quantscope did not write in full."""
    if replace or not os.path.lexists(target):
        return
    if not target.is_dir():
        raise InputError(f"{target.name!r} is a file: give the name of a folder.", code="E-PARAM-OUT")
    try:
        ours = set(read_manifest(target)) | {MANIFEST}
        present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    except ArtifactError:
        ours, present = set(), {path.name for path in target.iterdir()}
    if foreign := sorted(present - ours):
        raise InputError(f"The folder {target.name!r} holds files that Quantscope did not write ({foreign[0]}): "
                         "choose a new or empty folder.", code="E-PARAM-OUT")


def _new_stage(target: Path, *, sweep: str, mode: int) -> tuple[Path, int]:
    """Make and lock `<target>.part-<random>`, removing dead stages of the targets `sweep` (a pattern of names) first.

    Returns: its path and the lock's descriptor.
    """
    parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _try_lock(parent, wait=True)  # so that no sweep sees a stage between its creation and its lock
        for leftover in target.parent.glob(f"{sweep}.part-{'[0-9a-f]' * 12}"):
            _sweep(leftover)
        if target.exists():  # then a replacement in two steps has ended, perhaps before its last deletion
            for replaced in target.parent.glob(f"{glob_name(target)}.old-*"):
                remove(replaced)
        stage = target.parent / f"{target.name}.part-{secrets.token_hex(6)}"
        os.mkdir(stage, mode)
        lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _try_lock(lock)
        return stage, lock
    finally:
        os.close(parent)


def _sweep(leftover: Path) -> None:
    """Remove a stage whose writer is dead, that is, one that nobody has locked."""
    try:
        handle = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _try_lock(handle):
            logger.info("removing the unfinished folder %s", leftover.name)
            remove(leftover)
    finally:
        os.close(handle)


def _try_lock(handle: int, *, wait: bool = False) -> bool:
    """Lock an open folder. Returns: False when another holder has it, or where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("this file system has no locks (%s)", error.strerror)
        return False
    return True


def _seal(stage: Path) -> None:
    """Flush every file and folder of the stage, then write the manifest and flush that."""
    mode = stat.S_IMODE(stage.stat().st_mode) & 0o666  # the umask's choice; safetensors writes 0600
    files = {}
    for path in sorted(stage.rglob("*")):
        if path.is_symlink() or path == stage / MANIFEST:
            raise ValueError(f"{path.name} is a link or has the manifest's name: neither can be saved")
        if path.is_dir():
            flush(path)
            continue
        os.chmod(path, mode)
        flush(path)
        files[path.relative_to(stage).as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    document = {"format": MANIFEST_FORMAT, "version": 1, "files": files}
    (stage / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.chmod(stage / MANIFEST, mode)
    flush(stage / MANIFEST)
    flush(stage)

"""Check that the files of a model folder are still those that were written, by SHA-256.

Hashing reads every byte, so a file that passed is remembered by its stamp: size, modification time, change time and inode. The
record of stamps is kept in the cache, named after the folder, and is valid for one manifest (whose SHA-256 is part of it).
Writing to a file changes its stamp, even if its modification time is set back afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from core.errors import ArtifactError
from core.folders import remove
from core.models.io.catalog import EMBEDDED
from core.storage import MANIFEST, cache_root, file_sha256, read_manifest, verify

logger = logging.getLogger(__name__)

_REMADE = ("hub", "wheel", "gguf")
"""Parts of the cache whose folders are fetched or converted again when they are gone."""


def check_contents(folder: Path) -> None:
    """Check that every file of an embedded model, or of a model in the cache, holds the bytes that were written.

    A damaged folder of the cache is removed, so that the next load makes it anew. Other folders are not checked: their owners
    may edit them.
    Raises: ArtifactError E-CKPT-BAD naming the first file that is missing or differs.
    """
    home, place = cache_root().resolve(), folder.resolve()
    cached = any(place.is_relative_to(home / part) for part in _REMADE)
    if not cached and not place.is_relative_to(EMBEDDED.resolve()):
        return
    try:
        verify(folder)
        record, known = _record(folder), {}
        manifest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(record.read_text(encoding="utf-8"))
            if isinstance(found, dict) and found.get("manifest") == manifest and isinstance(found.get("files"), dict):
                known = found["files"]
        stamps = {name: _sound(folder, name, entry["sha256"], known) for name, entry in read_manifest(folder).items()}
        if stamps != known:
            _remember(record, {"manifest": manifest, "files": stamps})
    except ArtifactError as error:
        remedy = "Install Quantscope again."
        if cached:
            remove(folder)
            remedy = "The damaged copy was removed from the cache: load the model again to get a new one."
        raise ArtifactError(f"{str(error).removesuffix('Create the folder again.')}{remedy}", code=error.code) from error


def _sound(folder: Path, name: str, sha256: str, known: dict[str, Any]) -> list[int]:
    """Return the stamp of a file whose contents are as written. Raises: ArtifactError."""
    path = folder / name
    stamp = _stamp(path)
    if known.get(name) != stamp and (file_sha256(path) != sha256 or _stamp(path) != stamp):
        raise ArtifactError(f"{name} has changed since it was written (its checksum differs): {folder.name[:60]!r} is damaged. "
                            "Create the folder again.")
    return stamp


def _stamp(path: Path) -> list[int]:
    info = os.stat(path)
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _record(folder: Path) -> Path:
    """Return the file in which the stamps of a folder are kept."""
    return cache_root() / "verified" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def _remember(record: Path, facts: dict[str, Any]) -> None:
    """Write a record in one step. Where that fails the files are hashed again next time."""
    part = record.with_name(f"{record.name}.{os.getpid()}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(part, record)
    except OSError as error:
        logger.info("the stamps of a checked folder are not kept: %s", error.strerror)

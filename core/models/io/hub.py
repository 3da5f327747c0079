"""Download public models of the Hugging Face Hub whole, and check them before they enter the cache.

Only safetensors, configuration and tokenizer files are fetched, by name, and never with a token, so that a public page cannot
be used to read its owner's private models. A download goes to a folder of its own (an interrupted one continues there), is
compared with the Hub's sizes and SHA-256, passes `preflight`, and is then renamed into the cache in one step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from core.cache import cache_root
from core.disk import disk_errors
from core.errors import ModelError
from core.folders import bytes_in, remove
from core.models.io.gguf import write_source
from core.models.io.limits import check_disk, check_memory
from core.models.io.preflight.config import check_architecture, check_config, weight_bytes
from core.models.io.preflight.folder import MAX_JSON_BYTES, PICKLE_SUFFIXES, check_folder, read_json
from core.progress import Progress
from core.storage import atomic_dir, file_lock, file_sha256, is_whole

logger = logging.getLogger(__name__)

T = TypeVar("T")

REPO_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = re.compile(r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|"
                     r"special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|"
                     r"quant(?:ize)?_config\.json")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_TIMEOUT_S = 10.0
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def is_offline() -> bool:
    """Say whether the environment forbids the Hub (`HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`)."""
    return any(os.environ.get(key, "").upper() in {"1", "ON", "YES", "TRUE"}
               for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def fetch_model(repo: str, revision: str | None, *, progress: Progress, timeout_s: float = _TIMEOUT_S
                ) -> tuple[Path, str]:
    """Return a checked local folder of `repo` at `revision` (default `main`), downloaded if it is not in the cache.

    Args:
        repo: `owner/name`, matching `REPO_ID`. revision: branch, tag or commit, matching `REVISION`.
        timeout_s: how long the Hub may take to answer the first request.
    Returns: (folder, commit of 40 hex digits). When the Hub does not answer, the commit fetched last for that revision
        is used and logged.
    Raises: ModelError E-MODEL-GATED, -NOTFOUND, -OFFLINE, -PICKLE, -MISSING, -SIZE, or any code of `preflight`.
    """
    home = cache_root() / "hub" / repo.replace("/", "--")
    if revision and _COMMIT.fullmatch(revision) and is_whole(home / revision):
        return home / revision, revision
    try:
        info = model_info(repo, revision, timeout_s=timeout_s)
    except ModelError as error:
        known = _recall(home, revision or "main")
        if error.code != "E-MODEL-OFFLINE" or not known or not is_whole(home / known):
            raise
        logger.warning("the Hub did not answer: using the copy of %s from commit %s", repo, known[:8])
        return home / known, known
    folder = home / info.sha
    with file_lock(home / "download.lock"), disk_errors(home):
        if not is_whole(folder):
            _download(repo, info, folder, progress)
        _remember(home, revision or "main", info.sha)
    return folder, info.sha


def fetch_config(repo: str, revision: str | None) -> dict[str, Any]:
    """Fetch the raw `config.json` of `repo` at `revision` (default `main`), and nothing else of it.

    When the Hub does not answer, that of the copy in the cache is read.
    Raises: ModelError E-MODEL-GATED, -NOTFOUND, -OFFLINE, -MISSING, or -SIZE or -BAD for the file.
    """
    home = cache_root() / "hub" / repo.replace("/", "--")
    try:
        info = model_info(repo, revision, timeout_s=_TIMEOUT_S)
    except ModelError as error:
        known = revision if revision and _COMMIT.fullmatch(revision) else _recall(home, revision or "main")
        if error.code != "E-MODEL-OFFLINE" or not known or not is_whole(home / known):
            raise
        return read_json(home / known, "config.json")
    size = next((item.size or 0 for item in info.siblings or [] if item.rfilename == "config.json"), None)
    if size is None:
        raise _no_config(repo)
    if size > MAX_JSON_BYTES:
        raise ModelError(f"config.json of {repo} has {size:,} bytes: choose another model.", code="E-MODEL-SIZE")
    with disk_errors(home), tempfile.TemporaryDirectory() as folder:
        fetch = partial(_fetch, repo, "config.json", info.sha, Path(folder))
        _translate(repo, lambda: in_background(fetch, deadline_s=_TIMEOUT_S))
        return read_json(Path(folder), "config.json")


def model_info(repo: str, revision: str | None, *, timeout_s: float) -> Any:
    """Ask the Hub for a model's ModelInfo with file sizes; refuse gated and private models.

    Raises: ModelError E-MODEL-OFFLINE (also when no answer comes within `timeout_s`), -GATED, -NOTFOUND.
    """
    from huggingface_hub import HfApi

    if is_offline():
        raise _offline("HF_HUB_OFFLINE is set")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=False)
    try:
        info = _translate(repo, lambda: in_background(
            lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout_s),
            deadline_s=timeout_s))
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # huggingface_hub does not check the answer
        raise _offline("its answer is malformed") from error
    if info.gated or info.private or info.disabled:
        raise _gated(repo)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise _offline("its answer is malformed")
    return info


def in_background(work: Callable[[], T], *, deadline_s: float | None = None,
                  poll: Callable[[], None] = lambda: None) -> T:
    """Run `work` in a daemon thread, and meanwhile call `poll` five times a second; an exception of either is raised.

    The thread is needed because a name look-up has no timeout: after `deadline_s` it is left running.
    Raises: TimeoutError after `deadline_s` seconds.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # noqa: BLE001  (re-raised in the calling thread)
            outcome.append((None, error))

    thread, start = threading.Thread(target=run, daemon=True), time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(0.2 if deadline_s is None else min(0.2, deadline_s))
        if deadline_s is not None and thread.is_alive() and time.monotonic() - start >= deadline_s:
            raise TimeoutError("no answer")
        poll()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def fetch_dataset_file(repo: str, name: str, folder: Path, *, deadline_s: float = 120.0) -> Path:
    """Download one public file of the dataset `repo` into `folder`; return its path.

    Raises: ModelError E-MODEL-OFFLINE (also after `deadline_s`), -NOTFOUND, -GATED.
    """
    _translate(repo, lambda: in_background(lambda: _fetch(repo, name, None, folder, kind="dataset"),
                                           deadline_s=deadline_s))
    return folder / name


def choose_files(repo: str, siblings: list[Any]) -> list[Any]:
    """Choose the files to fetch from the Hub's list (objects with `rfilename`, `size`, `lfs`).

    Raises: ModelError E-MODEL-PICKLE when only other weight formats are there, E-MODEL-MISSING without weights or
        without config.json.
    """
    table = {item.rfilename: item for item in siblings}
    chosen = [item for name, item in table.items() if _WANTED.fullmatch(name)]
    if "model.safetensors" in table:
        weights = [table["model.safetensors"]]
    elif "model.safetensors.index.json" in table:
        weights = [table["model.safetensors.index.json"]] + [i for n, i in table.items() if _SHARD.fullmatch(n)]
    else:
        raise _no_weights(repo, list(table))
    if "config.json" not in table:
        raise _no_config(repo)
    return chosen + weights


def _download(repo: str, info: Any, folder: Path, progress: Progress) -> None:
    """Fetch the chosen files into a temporary folder, compare them with the Hub's list, check, publish."""
    files = choose_files(repo, info.siblings or [])
    total = sum(item.size or 0 for item in files)
    counts = getattr(info.safetensors, "parameters", None) or {}
    parameters = sum(counts.values()) or sum((i.size or 0) for i in files if i.rfilename.endswith("safetensors")) // 4
    check_disk(total, folder)
    part = folder.with_name(f"{folder.name}.download")
    for other in folder.parent.glob("*.download"):  # unfinished downloads of other commits; the lock is held, so none is running
        if other != part:
            remove(other)
    part.mkdir(parents=True, exist_ok=True)
    _translate(repo, lambda: _fetch(repo, "config.json", info.sha, part))
    config = check_config(read_json(part, "config.json"))  # may refuse the model before gigabytes are fetched
    check_architecture(config)
    outside = config.get("vocab_size", 0) * config.get("hidden_size", 0)  # a lower bound: an untied head is as large again
    check_memory(weight_bytes(config, parameters, outside), bytes_per_parameter=1)
    stage_text = f"Downloading {repo} ({total / 1e6:,.0f} MB)"
    _translate(repo, lambda: in_background(
        lambda: [_fetch(repo, item.rfilename, info.sha, part) for item in files],
        poll=lambda: progress(stage_text, min(1.0, bytes_in(part) / max(total, 1)))))
    progress("Checking the download", None)
    for item in files:
        _compare(part / item.rfilename, item)
    with atomic_dir(folder, replace=True) as stage:
        for item in files:
            os.replace(part / item.rfilename, stage / item.rfilename)
        types = ", ".join(kind for kind in _BYTES if kind in counts) or "stored"
        write_source(stage, {"source": f"Hugging Face Hub, {repo} at {info.sha[:8]}, {types} weights",
                             "revision": info.sha})
        check_folder(stage)
    remove(part)


def _fetch(repo: str, name: str, commit: str | None, part: Path, *, kind: str = "model") -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        hf_hub_download(repo, name, repo_type=kind, revision=commit, local_dir=part, token=False, etag_timeout=_TIMEOUT_S,
                        endpoint=os.environ.get("HF_ENDPOINT") or None)
    finally:
        if not silent:
            enable_progress_bars()


def _compare(path: Path, item: Any) -> None:
    """Refuse a file that is not the one the Hub listed; it is removed, so that the next attempt fetches it anew."""
    expected = item.lfs.sha256 if item.lfs else None
    size = path.stat().st_size if path.is_file() else 0
    if size != item.size or (expected and file_sha256(path) != expected):
        path.unlink(missing_ok=True)
        raise ModelError(f"{item.rfilename} is cut or damaged: {size:,} of {item.size or 0:,} bytes. "
                         "Try again.", code="E-MODEL-CUT")


def _translate(repo: str, call: Callable[[], T]) -> T:
    """Run `call`, turning the Hub library's errors into one sentence each."""
    from huggingface_hub import errors

    try:
        return call()
    except (errors.GatedRepoError, errors.DisabledRepoError) as error:
        raise _gated(repo) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no such revision. Leave the revision out, or choose one from its page.",
                         code="E-MODEL-NOTFOUND") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(f"{repo} was not found on the Hub, or it is private. Check the spelling; only public models "
                         "are read.", code="E-MODEL-NOTFOUND") from error
    except errors.LocalEntryNotFoundError as error:  # raised by a download when the network is gone
        raise _offline("the connection broke") from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"A file of {repo} has vanished from the Hub. Try again.", code="E-MODEL-NOTFOUND") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:  # HTTPError covers 5xx, DNS and refused ones
        logger.info("the Hub failed: %s", type(error).__name__)
        raise _offline("no answer came") from error
    except errors.FileMetadataError as error:
        raise _offline("its answer is malformed") from error


def _offline(reason: str) -> ModelError:
    return ModelError(f"The Hub is not reachable ({reason}). Models already here still work; try again later.",
                      code="E-MODEL-OFFLINE")


def _gated(repo: str) -> ModelError:
    return ModelError(f"{repo} is gated or private. Use a public model.", code="E-MODEL-GATED")


def _no_config(repo: str) -> ModelError:
    return ModelError(f"{repo} has no config.json: it is not a transformers model.", code="E-MODEL-MISSING")


def _no_weights(repo: str, names: list[str]) -> ModelError:
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return ModelError(f"{repo} has only {pickles[0][:60]}, a format that can run code. Try a revision with "
                          f"safetensors, often {repo.split('/')[1][:40]}@refs/pr/1 and up, or another model.",
                          code="E-MODEL-PICKLE")
    if any(name.endswith(".gguf") for name in names):
        return ModelError(f"{repo} has GGUF files only: download one and give its path.", code="E-MODEL-MISSING")
    return ModelError(f"{repo} has no safetensors weights. Choose another model.", code="E-MODEL-MISSING")


def _recall(home: Path, revision: str) -> str | None:
    """Return the commit that `revision` named when it was fetched last, or None."""
    try:
        commit = json.loads((home / "refs.json").read_text(encoding="utf-8")).get(revision)
    except (OSError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None


def _remember(home: Path, revision: str, commit: str) -> None:
    try:
        table = json.loads((home / "refs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        table = {}
    temporary = home / f"refs.json.{os.getpid()}"
    temporary.write_text(json.dumps(table | {revision: commit}), encoding="utf-8")
    os.replace(temporary, home / "refs.json")

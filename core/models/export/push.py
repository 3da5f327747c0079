"""Push an exported folder to the Hugging Face Hub: private unless asked otherwise, never over files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from core.errors import InputError, ModelError
from core.models.io.hub import is_offline

T = TypeVar("T")
OWN_FILES = {".gitattributes"}
"""Files that the Hub itself puts into a new repository."""


def check_destination(repo: str) -> None:
    """Refuse a repository that a folder may not be pushed to; call this function before the work.

    Args: repo: "owner/name". The token is the user's own, from HF_TOKEN or `hf auth login`.
    Raises: InputError E-PARAM-PUSH for a name that is none, without a token, and for a repository that holds files;
        ModelError E-MODEL-OFFLINE when the Hub does not answer.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise _refused("The repository to push to is no Hub id: write owner/name.")
    if is_offline():
        raise ModelError("Nothing can be pushed while HF_HUB_OFFLINE is set: unset it.", code="E-MODEL-OFFLINE")
    if get_token() is None:
        raise _refused("Pushing needs a token of yours that may write: set HF_TOKEN, or run hf auth login.")
    _require_empty(repo)


def push_folder(folder: Path | str, repo: str, *, private: bool = True) -> str:
    """Write a folder into a repository as one commit; create the repository where there is none.

    Args: repo: as `check_destination`. private: whether only its owner sees a repository that is created.
    Returns: the address of the commit.
    Raises: as `check_destination`; an upload that breaks leaves the repository empty, so the same call can be repeated.
    """
    api = HfApi()
    _asked(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    _require_empty(repo)  # somebody else may have filled it since it was checked
    done = _asked(
        repo, lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model exported by Quantscope")
    )
    return str(done.commit_url)


def _require_empty(repo: str) -> None:
    """Refuse a repository that holds files; one that does not exist holds none."""
    try:
        found = set(_asked(repo, lambda: HfApi().list_repo_files(repo))) - OWN_FILES
    except RepositoryNotFoundError:
        return
    if found:
        raise _refused(f"{repo} exists and holds {min(found)[:40]!r}: choose a new name, nothing is overwritten.")


def _asked(repo: str, call: Callable[[], T]) -> T:
    """Run `call`, turning the Hub's refusals into one sentence each. Raises: RepositoryNotFoundError itself."""
    try:
        return call()
    except RepositoryNotFoundError:
        raise
    except (HTTPError, ConnectionError, TimeoutError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise _refused(f"The token may not write to {repo}: use one with write access to its owner's models.") from error
        raise ModelError(
            f"The Hub did not take {repo} ({status or 'no answer came'}). The exported folder is whole: export again "
            "into a new folder later, or upload this one.",
            code="E-MODEL-OFFLINE",
        ) from error


def _refused(sentence: str) -> InputError:
    return InputError(sentence, code="E-PARAM-PUSH")

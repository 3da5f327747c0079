"""Pushing an export: a repository of its own, private, with the user's token, and nothing overwritten."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from core.errors import QuantscopeError
from core.models.export import push


class Hub:
    """The calls of `HfApi` that are used, over repositories in memory: names to (private, files)."""

    def __init__(self) -> None:
        self.repos, self.fails = {}, None

    def list_repo_files(self, repo):
        if repo not in self.repos:
            raise _error(RepositoryNotFoundError, 404)
        return [*self.repos[repo][1], ".gitattributes"]

    def create_repo(self, repo, *, private, exist_ok):
        if self.fails in (401, 403):
            raise _error(HfHubHTTPError, self.fails)
        assert exist_ok or repo not in self.repos
        self.repos.setdefault(repo, (private, []))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.fails:
            raise _error(HfHubHTTPError, self.fails)
        self.repos[repo_id][1].extend(path.name for path in folder_path.iterdir())
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")


def _error(kind, status):
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub.example")))


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: made)
    monkeypatch.setattr(push, "get_token", lambda: "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return made


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize("private", [True, False])
def test_a_folder_becomes_a_new_repository(hub, folder, private):
    push.check_destination("me/new")
    assert not hub.repos, "checking makes nothing"
    assert push.push_folder(folder, "me/new", private=private) == "https://hub.example/me/new/commit/1"
    assert hub.repos == {"me/new": (private, ["model.safetensors"])}


def test_a_repository_with_files_stays_as_it_is(hub, folder):
    hub.repos["me/old"] = (False, ["a.bin"])
    for call in (lambda: push.check_destination("me/old"), lambda: push.push_folder(folder, "me/old")):
        with pytest.raises(QuantscopeError, match=r"holds 'a\.bin': choose a new name"):
            call()
    assert hub.repos == {"me/old": (False, ["a.bin"])}


def test_an_upload_that_breaks_can_be_repeated(hub, folder):
    hub.fails = 500
    with pytest.raises(QuantscopeError, match="did not take me/new .500.*again into a new folder"):
        push.push_folder(folder, "me/new")
    hub.fails = None
    push.check_destination("me/new")
    assert push.push_folder(folder, "me/new") and hub.repos["me/new"] == (True, ["model.safetensors"])


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_said(hub, folder, status):
    hub.fails = status
    with pytest.raises(QuantscopeError, match="The token may not write to me/new") as refused:
        push.push_folder(folder, "me/new")
    assert "hf_secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "../x", "a b/c", "https://huggingface.co/a/b"])
def test_a_name_that_is_no_hub_id_is_refused(hub, name):
    with pytest.raises(QuantscopeError, match="write owner/name"):
        push.check_destination(name)


def test_without_token_or_network_nothing_is_begun(hub, monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(QuantscopeError, match="HF_TOKEN"):
        push.check_destination("me/new")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QuantscopeError, match="HF_HUB_OFFLINE"):
        push.check_destination("me/new")

"""Models from the Hub, a stand-in on 127.0.0.1: fetched whole, checked before and after, every failure one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from core.errors import Cancelled, ModelError, ResourceError
from core.models.io import catalog, hub, limits
from core.models.io.catalog import DEFAULT_MODEL, resolve
from core.models.io.preflight.config import weight_bytes
from core.storage import read_manifest, verify
from tests.core.models.io.catalog_tools import refused
from tests.core.models.io.fake_hub import COMMIT, FakeHub, serve
from tests.core.models.io.malformed import LLAMA, good_safetensors

REPO = {
    "config.json": json.dumps(LLAMA).encode(),
    "model.safetensors": good_safetensors(),
    "tokenizer.json": b'{"model": {"vocab": {}}}',
    "README.md": b"# no",
    "pytorch_model.bin": b"\x80\x04",
    "modeling.py": b"raise SystemExit",
    "a/config.json": b"{}",
}
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def fake(own_cache, monkeypatch):
    """Serve REPO as owner/name; options change the stand-in."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it reads the environment once
    with serve(FakeHub(dict(REPO))) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def test_a_model_is_fetched_whole_without_a_token(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    stages: list[tuple[str, float | None]] = []
    found = resolve("owner/name", progress=lambda text, part: stages.append((text, part)), allow_local=False)
    assert found.revision == COMMIT and found.path.is_relative_to(tmp_path / "cache")
    assert "owner/name at 01234567" in found.source
    assert set(read_manifest(found.path)) == {"config.json", "model.safetensors", "tokenizer.json", "source.json"}
    verify(found.path, checksums=True)
    assert not any("authorization" in {key.lower() for key in headers} for _, _, headers in fake.requests)
    assert not any(name in path for _, path, _ in fake.requests for name in ("README", "pytorch_model", "modeling"))
    assert sorted(os.listdir(found.path.parent)) == [COMMIT, "download.lock", "refs.json"]
    assert stages and all(part is None or 0 <= part <= 1 for _, part in stages)


def test_a_fetched_model_stays_usable_without_the_hub(fake, monkeypatch):
    found = resolve("owner/name")
    count = len(fake.requests)
    assert resolve(f"owner/name@{COMMIT}").path == found.path
    assert len(fake.requests) == count  # a commit never changes: nobody is asked
    fake.fault = "busy"
    assert resolve("owner/name").path == found.path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("owner/name").path == found.path
    refused("owner/name@other", "OFFLINE")
    (found.path / "config.json").unlink()
    refused("owner/name", "OFFLINE")


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("gated", "GATED"),
        ("gated later", "GATED"),
        ("missing", "NOTFOUND"),
        ("revision", "NOTFOUND"),
        ("broken", "OFFLINE"),
        ("busy", "OFFLINE"),
        ("nonsense", "OFFLINE"),
        ("corrupt", "CUT"),
        ("break", "OFFLINE"),
    ],
)
def test_every_way_the_hub_fails_is_one_sentence(fake, fault, code, monkeypatch, own_cache):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # its retries wait
    fake.fault = fault
    error = refused("owner/name", code)
    assert "127.0.0.1" not in str(error) and "http" not in str(error)
    assert not list(own_cache.glob("hub/*/*/config.json")) or fault in ("gated later", "corrupt", "break")
    assert not (own_cache / "hub" / "owner--name" / COMMIT).exists()


@pytest.mark.parametrize(("option", "value"), [("gated", "manual"), ("gated", "auto"), ("private", True)])
def test_a_gated_or_private_model_is_refused_before_a_byte_is_fetched(fake, option, value):
    setattr(fake, option, value)
    assert "public" in str(refused("owner/name", "GATED"))
    assert len(fake.requests) == 1


def test_a_silent_hub_is_left_after_the_deadline(fake):
    fake.fault = "stall"
    with pytest.raises(ModelError, match="not reachable"):
        hub.fetch_model("owner/name", None, progress=lambda text, part: None, timeout_s=0.3)


def test_no_server_at_all(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("owner/name", "OFFLINE")


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x", "flax_model.msgpack": b"x"}, "PICKLE"),
        ({"config.json": b"{}", "model.Q4_0.gguf": b"x"}, "MISSING"),
        ({"README.md": b"x"}, "MISSING"),
        ({"model.safetensors": good_safetensors()}, "MISSING"),
        ({**REPO, "config.json": json.dumps(LLAMA | {"model_type": "mamba"}).encode()}, "ARCH"),
        ({**REPO, "config.json": json.dumps(LLAMA | {"auto_map": {"a": "b"}}).encode()}, "CODE"),
        ({**REPO, "model.safetensors": b"\x80\x04" + bytes(64)}, "PICKLE"),
        ({**REPO, "config.json": b"{"}, "BAD"),
    ],
)
def test_unusable_repositories_are_refused(fake, files, code, own_cache):
    fake.files = files
    refused("owner/name", code)
    assert not (own_cache / "hub" / "owner--name" / COMMIT).exists()
    if code in ("ARCH", "CODE"):
        assert not any("model.safetensors" in path for _, path, _ in fake.requests)


def test_sizes_are_checked_before_the_download(fake, monkeypatch):
    monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", "0.0000001")
    assert "limit" in str(refused("owner/name", "SIZE"))
    monkeypatch.delenv("QUANTSCOPE_MAX_MODEL_GB")
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(ResourceError) as caught:
        resolve("owner/name")
    assert caught.value.code == "E-DISK"
    assert not any("model.safetensors" in path for _, path, _ in fake.requests)


@pytest.mark.parametrize("ternary", (False, True), ids=("floats", "ternary masters"))
def test_ternary_masters_may_be_larger_than_floats(fake, monkeypatch, ternary):
    """They are packed while they are read: one byte each, and four for what is not ternary."""
    shapes = {"model.embed_tokens.weight": (10, 8), "model.layers.0.mlp.up_proj.weight": (4096, 8)}
    fake.files["model.safetensors"] = good_safetensors(shapes)
    monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", "0.00004")
    config = LLAMA | ({"model_type": "bitnet", "quantscope": {"mode": "a4.8"}} if ternary else {})
    fake.files["config.json"] = json.dumps(config).encode()
    assert weight_bytes(config, 4096 * 8 + 80, 80) == 4096 * (8 if ternary else 32) + 4 * 80
    if ternary:
        assert resolve("owner/name").revision == COMMIT
    else:
        refused("owner/name", "SIZE")


def test_a_download_left_for_another_commit_is_removed(fake, own_cache):
    left = own_cache / "hub" / "owner--name" / f"{'f' * 40}.download"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    found = resolve("owner/name")
    assert not left.exists() and found.path.is_dir()


def test_stopping_a_download_is_heard(fake):
    def stop(text: str, part: float | None) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        resolve("owner/name", progress=stop)
    assert resolve("owner/name").revision == COMMIT


def test_the_default_model_comes_from_the_hub_when_it_answers(fake, monkeypatch):
    monkeypatch.setattr(catalog, "DEFAULT_REPO", "owner/name")
    found = resolve(DEFAULT_MODEL)
    assert (found.name, found.revision) == (DEFAULT_MODEL, COMMIT) and "Hub" in found.source


def test_a_pinned_repository_is_asked_for_its_commit_unless_one_is_named(monkeypatch):
    asked = []

    def fetch(repo: str, revision: str | None, *, progress: object) -> tuple[Path, str]:
        asked.append(revision)
        raise ModelError("The Hub is not asked in this test.", code="E-MODEL-OFFLINE")

    monkeypatch.setattr(hub, "fetch_model", fetch)
    for name in ("microsoft/BitNet-b1.58-2B-4T", "microsoft/bitnet-b1.58-2B-4T@main", "owner/name"):
        refused(name, "OFFLINE")
    assert asked == [catalog.PINNED["microsoft/bitnet-b1.58-2b-4t"], "main", None]

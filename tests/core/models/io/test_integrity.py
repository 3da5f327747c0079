"""One flipped bit in any file of a model in the cache is found, named and remedied; whole files are hashed once per change."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from core.errors import ArtifactError
from core.models.io import catalog, integrity
from core.models.io.catalog import EMBEDDED, resolve
from core.models.io.integrity import check_contents
from core.models.io.load import load_model
from core.models.tiny import save_tiny
from core.storage import MANIFEST, atomic_dir, cache_root, file_sha256
from tests.core.models.io.gguf_files import write_gguf
from tests.core.tools import tiny_source

pytestmark = pytest.mark.usefixtures("own_cache")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLACES = {"hub": f"hub/owner--name/{COMMIT}", "wheel": "wheel/demo-1.0", "converted": "gguf/abc-2"}


@pytest.fixture
def cached(own_cache):
    """A model folder in one of the places of the cache."""
    def make(kind: str) -> Path:
        folder = own_cache / PLACES[kind]
        folder.parent.mkdir(parents=True, exist_ok=True)
        return save_tiny(folder, "llama", seed=3)
    return make


def flip(path: Path, place: float, bit: int) -> None:
    """Flip one bit at a share of the file's length, keeping its size."""
    raw = bytearray(path.read_bytes())
    raw[int(place * (len(raw) - 1))] ^= 1 << bit
    path.write_bytes(raw)


def test_forty_flipped_bits_are_forty_refusals(cached):
    draw = random.Random(5)
    for number in range(40):
        folder = cached(list(PLACES)[number % 3])
        check_contents(folder)
        files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
        path = files[number // 3 % len(files)]
        flip(path, draw.random(), draw.randrange(8))
        with pytest.raises(ArtifactError, match="load the model again") as caught:
            check_contents(folder)
        assert path.name in str(caught.value) and caught.value.code == "E-CKPT-BAD" and len(str(caught.value)) <= 240
        assert not folder.exists(), "the next load makes it anew"


def test_a_flipped_bit_in_the_manifest_never_hides_another(cached):
    folder = cached("hub")
    check_contents(folder)
    document = json.loads((folder / MANIFEST).read_text())
    flip(folder / "model.safetensors", 0.9, 2)
    document["files"]["config.json"]["sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="config.json has changed"):
        check_contents(folder)


@pytest.mark.parametrize("kind", PLACES)
def test_loading_a_damaged_model_says_so(cached, monkeypatch, kind):
    folder = cached(kind)
    found = catalog.ResolvedModel(folder, "owner/name", COMMIT, "the Hub")
    monkeypatch.setattr("core.models.io.load.resolve", lambda name, **options: found)
    load_model("owner/name")
    flip(folder / "model.safetensors", 0.99, 0)  # the last bit of a mantissa: only a checksum sees it
    with pytest.raises(ArtifactError, match="model.safetensors has changed"):
        load_model("owner/name")


def test_a_damaged_conversion_is_made_anew_by_the_next_load(tmp_path, own_cache):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_source("llama", seed=3))
    expected = load_model(str(path)).model.decoder.head.weight
    folder = resolve(str(path)).path
    flip(folder / "tokenizer.json", 0.5, 1)
    with pytest.raises(ArtifactError, match="tokenizer.json"):
        load_model(str(path))
    assert bool((load_model(str(path)).model.decoder.head.weight == expected).all())


def test_an_embedded_model_is_checked_and_never_removed(tmp_path, monkeypatch):
    name = "quantscope-opt-6m"
    shutil.copytree(EMBEDDED / name, tmp_path / "embedded" / name)
    for module in (catalog, integrity):
        monkeypatch.setattr(module, "EMBEDDED", tmp_path / "embedded")
    load_model(name)
    flip(tmp_path / "embedded" / name / "tokenizer.json", 0.3, 4)
    with pytest.raises(ArtifactError, match="Install Quantscope again"):
        load_model(name)
    assert (tmp_path / "embedded" / name / "tokenizer.json").exists()


def test_files_are_hashed_once_per_change(cached, monkeypatch):
    folder, hashed = cached("hub"), []
    monkeypatch.setattr(integrity, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    check_contents(folder)
    assert sorted(hashed) == sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    check_contents(folder)
    assert len(hashed) == len(list(folder.iterdir())) - 1
    hashed.clear()
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes())
    check_contents(folder)
    assert hashed == ["config.json"]


def test_setting_the_time_back_hides_nothing(cached):
    folder = cached("wheel")
    check_contents(folder)
    path = folder / "model.safetensors"
    before = path.stat()
    flip(path, 0.7, 3)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(ArtifactError, match="model.safetensors"):
        check_contents(folder)


def test_a_record_holds_for_its_manifest_alone(cached):
    """A folder published again at the same place is hashed again, whatever the record says."""
    folder = cached("hub")
    check_contents(folder)
    (record,) = (cache_root() / "verified").iterdir()
    stamps = json.loads(record.read_text())["files"]
    document = json.loads((folder / MANIFEST).read_text())
    document["files"]["config.json"]["sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(document))
    assert stamps["config.json"] == integrity._stamp(folder / "config.json")
    with pytest.raises(ArtifactError, match="config.json"):
        check_contents(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"manifest": 3}', '{"files": []}', '{"manifest": "x", "files": {"a": 1}}'])
def test_a_damaged_record_is_no_record(cached, text):
    folder = cached("converted")
    check_contents(folder)
    (record,) = (cache_root() / "verified").iterdir()
    record.write_text(text)
    check_contents(folder)
    assert json.loads(record.read_text())["files"].keys() == {path.name for path in folder.iterdir()} - {MANIFEST}


def test_without_room_for_a_record_the_files_are_hashed_again(cached, own_cache):
    folder = cached("hub")
    (own_cache / "verified").write_text("a file in the way")
    check_contents(folder)
    flip(folder / "config.json", 0.4, 0)
    with pytest.raises(ArtifactError):
        check_contents(folder)


def test_a_folder_of_the_users_own_may_be_edited(tmp_path):
    with atomic_dir(tmp_path / "mine") as stage:
        (stage / "README.md").write_text("first")
    (tmp_path / "mine" / "README.md").write_text("second, longer")
    check_contents(tmp_path / "mine")

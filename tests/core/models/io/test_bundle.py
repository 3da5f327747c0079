"""A saved model leaves as a zip file and comes back; what is no such file, or was changed, is refused in a sentence."""

from __future__ import annotations

import json
import zipfile

import pytest

from core.errors import ArtifactError, ResourceError
from core.models.io import bundle
from core.models.io.quantized import FORMAT
from core.storage import MANIFEST, atomic_dir


@pytest.fixture
def saved(tmp_path):
    with atomic_dir(tmp_path / "saved") as stage:
        (stage / "model.safetensors").write_bytes(bytes(range(256)) * 40)
        (stage / "quantscope.json").write_text("{}")
    return tmp_path / "saved"


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def test_a_folder_comes_back_as_it_left(saved, empty, tmp_path):
    count = bundle.pack(saved, tmp_path / "a.zip")
    assert count == (tmp_path / "a.zip").stat().st_size > 10_240
    bundle.unpack(tmp_path / "a.zip", empty)
    assert {p.name: p.read_bytes() for p in empty.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "a\\b", "..", "x" * 200, "C:evil"])
def test_names_that_lead_elsewhere_are_refused(saved, empty, tmp_path, name):
    path = archive(tmp_path / "a.zip", [(MANIFEST, (saved / MANIFEST).read_bytes()), (name, b"x")])
    with pytest.raises(ArtifactError, match="zip file"):
        bundle.unpack(path, empty)
    assert list(empty.iterdir()) == [] and not (tmp_path / "evil").exists()


def test_a_changed_or_missing_file_is_refused(saved, empty, tmp_path):
    for at, members in enumerate(
        (
            [(p.name, p.read_bytes().replace(b"\x07", b"\x08")) for p in saved.iterdir()],
            [(p.name, p.read_bytes()) for p in saved.iterdir() if p.suffix != ".safetensors"],
            [("x", b"y")],
        )
    ):
        place = empty / str(at)
        place.mkdir()
        with pytest.raises(ArtifactError):
            bundle.unpack(archive(tmp_path / f"{at}.zip", members), place)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip" * 100])
def test_no_zip_file_is_refused(empty, tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ArtifactError, match="zip file"):
        bundle.unpack(tmp_path / "a.zip", empty)


def test_what_is_too_large_is_refused_before_anything_is_written(saved, empty, tmp_path, monkeypatch):
    size = bundle.pack(saved, tmp_path / "a.zip")
    assert bundle.pack(saved, tmp_path / "b.zip", limit=size) == size == (tmp_path / "b.zip").stat().st_size
    monkeypatch.setattr(bundle, "MAX_BUNDLE_BYTES", 5000)
    for call in (
        lambda: bundle.pack(saved, tmp_path / "c.zip", limit=size - 1),
        lambda: bundle.unpack(tmp_path / "a.zip", empty),
    ):
        with pytest.raises(ResourceError, match="MB"):
            call()
    assert list(empty.iterdir()) == [] and not (tmp_path / "c.zip").exists()


def test_a_received_model_is_its_owners_alone(saved, tmp_path, monkeypatch):
    from core.models.io import saved as kept

    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    key = "0123456789abcdef"
    with atomic_dir(tmp_path / "made") as stage:
        (stage / "quantscope.json").write_text(json.dumps({"format": FORMAT, "report": {"key": key}}))
    bundle.pack(tmp_path / "made", tmp_path / "a.zip")
    assert kept.receive(tmp_path / "a.zip", "mine")[0] == key
    assert kept.find_saved(key, "mine") == kept.receive(tmp_path / "a.zip", "mine")[1]
    assert kept.find_saved(key, "another") is None
    kept.forget("mine")
    assert kept.find_saved(key, "mine") is None
    bundle.pack(saved, tmp_path / "b.zip")
    with pytest.raises(ArtifactError):
        kept.receive(tmp_path / "b.zip", "mine")
    assert list((tmp_path / "cache" / "quantized").iterdir()) == []


def test_a_member_before_the_beginning_of_the_file_is_refused(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("manifest.json", "{}")
    raw = bytearray(archive.read_bytes())
    raw[-6:-2] = (int.from_bytes(raw[-6:-2], "little") + 65_536).to_bytes(4, "little")  # where the table of members begins
    archive.write_bytes(raw)
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="no readable zip file"):
        bundle.unpack(archive, tmp_path / "out")

"""atomic_dir under errors and kills, verify against tampering, locks between processes."""

from __future__ import annotations

import errno
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import folders, storage
from core.cache import cache_root
from core.errors import ArtifactError, InputError, ResourceError
from core.storage import MANIFEST, atomic_dir, read_manifest, verify
from tests.core.storage_tools import leftovers, write


def test_success_leaves_a_folder_with_its_manifest_and_nothing_else(tmp_path):
    write(tmp_path / "deep" / "out", "one")
    target = tmp_path / "deep" / "out"
    verify(target, checksums=True)
    assert sorted(read_manifest(target)) == ["a.txt", "sub/b.bin"]
    assert leftovers(target) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_file_is_replaced_or_left_alone(tmp_path, monkeypatch, function):
    file = tmp_path / "facts.json"
    storage.write_file(file, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(ResourceError, match="disk is full"):
        storage.write_file(file, b"new and longer")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    storage.write_file(file, b"new")
    assert file.read_bytes() == b"new" and [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_files_get_the_mode_of_the_folder(tmp_path):
    with atomic_dir(tmp_path / "out") as stage:
        (stage / "private").touch(mode=0o600)
    folder_mode = (tmp_path / "out").stat().st_mode & 0o666
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == folder_mode


def test_an_error_in_the_body_keeps_the_old_folder(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    with pytest.raises(KeyError), atomic_dir(target) as stage:
        (stage / "a.txt").write_text("new")
        raise KeyError("x")
    verify(target, checksums=True)
    assert (target / "a.txt").read_text() == "old" and leftovers(target) == []


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two steps"])
def test_replacing_removes_the_old_files(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    target = tmp_path / "out"
    write(target, "old")
    with atomic_dir(target) as stage:
        (stage / "only.txt").write_text("new")
    verify(target, checksums=True)
    assert sorted(os.listdir(target)) == [MANIFEST, "only.txt"] and leftovers(target) == []


def test_a_failed_publication_keeps_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write(target, "old")
    real = os.rename

    def refuse(source, destination):
        if ".part-" in str(source):
            raise OSError(errno.EXDEV, "no")
        real(source, destination)

    monkeypatch.setattr(folders.os, "rename", refuse)
    with pytest.raises(OSError):
        write(target, "new")
    verify(target, checksums=True)
    assert (target / "a.txt").read_text() == "old" and leftovers(target) == []


@pytest.mark.parametrize("prepare", [
    lambda path: path.write_text("a file"),
    lambda path: (path.mkdir(), (path / "thesis.tex").write_text("mine")),
    lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"name": "a web app"}')),
    lambda path: (write(path, "ours"), (path / "notes.txt").write_text("mine")),
    lambda path: (path.mkdir(), (path / "empty folder").mkdir()),
], ids=["file", "foreign", "foreign manifest", "file added", "folders only"])
def test_somebody_elses_files_are_never_replaced(tmp_path, prepare):
    target = tmp_path / "out"
    prepare(target)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        write(target, "new")
    assert caught.value.code == "E-PARAM-OUT" and len(str(caught.value)) <= 240
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    write(target, "new", replace=True)
    verify(target)


def test_a_link_to_a_folder_keeps_being_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "one")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a.txt").read_text() == "two"


def test_links_and_a_foreign_manifest_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError), atomic_dir(tmp_path / "out") as stage:
        (stage / "x").symlink_to("/etc/hostname")
    with pytest.raises(ValueError), atomic_dir(tmp_path / "out") as stage:
        (stage / MANIFEST).write_text("{}")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    with pytest.raises(ResourceError) as caught, atomic_dir(target), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert caught.value.code == "E-DISK" and "disk is full" in str(caught.value)
    assert (target / "a.txt").read_text() == "old" and leftovers(target) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["mkdir", "fsync", "chmod", "rename"])
def test_every_step_reports_the_disk(tmp_path, monkeypatch, function, number):
    target = tmp_path / "out"

    def fail(*arguments, **options):
        raise OSError(number, "no")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(ResourceError) as caught, atomic_dir(target) as stage:
        (stage / "a.txt").write_text("x")
    monkeypatch.undo()
    assert caught.value.code == "E-DISK" and not target.exists() and leftovers(target) == []


def test_what_a_library_in_rust_says_about_a_full_disk_is_understood(tmp_path):
    class SafetensorError(Exception):
        pass

    with pytest.raises(ResourceError, match="full"), atomic_dir(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="a part of its path is a file"):
        write(tmp_path / "file" / "out", "x")
    with pytest.raises(ResourceError, match="too long"):
        write(tmp_path / ("n" * 300), "x")


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
    (lambda folder: (folder / "a.txt").write_text("o"), "a.txt has 1 of 3 bytes"),
    (lambda folder: (folder / MANIFEST).unlink(), "no manifest"),
    (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
    (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "cannot be read"),
    (lambda folder: (folder / MANIFEST).write_text(json.dumps({"format": "quantscope-manifest", "version": 1,
        "files": {"../x": {"size": 1, "sha256": ""}}})), "cannot be read"),
    (lambda folder: ((folder / "a.txt").unlink(), (folder / "a.txt").symlink_to("/etc/hostname")), "a.txt has"),
])
def test_verify_refuses_damage(tmp_path, damage, said):
    write(tmp_path / "out", "one")
    damage(tmp_path / "out")
    with pytest.raises(ArtifactError, match=said) as caught:
        verify(tmp_path / "out")
    assert caught.value.code == "E-CKPT-BAD" and str(tmp_path) not in str(caught.value)


def test_only_checksums_find_a_changed_byte(tmp_path):
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "a.txt").write_text("onf")
    verify(tmp_path / "out")
    with pytest.raises(ArtifactError, match="checksum of a.txt"):
        verify(tmp_path / "out", checksums=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["format", "version", "files", "size", "sha256", "a.txt"]), inner, max_size=4),
    max_leaves=8).map(lambda value: json.dumps(value).encode())))
def test_any_manifest_is_accepted_or_refused_in_words(tmp_path, document):
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / MANIFEST).write_bytes(document)
    with pytest.raises(ArtifactError):
        verify(tmp_path / "out")


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "q"))
    assert cache_root() == tmp_path / "q" and not (tmp_path / "q").exists()
    monkeypatch.delenv("QUANTSCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "quantscope"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "quantscope"


def test_file_sha256_reports_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    seen: list[int] = []
    assert storage.file_sha256(tmp_path / "x", seen.append).startswith("ba7816bf") and seen == [3]

"""A streamed run that is killed at any layer continues to the same result; work that does not belong to it is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import core
from core.errors import ArtifactError, InputError, ResourceError
from core.models.tiny import save_tiny
from core.storage import file_lock
from tests.core.stream.stream_tools import facts_of, recipe_of, tensors_of

LAYERS = 4
ROTATION = {"method": "rotation", "scheme": "W4A4"}  # it carries two sets of states


class Stopped(Exception):
    """Raised by the progress of a run that is to stop."""


def stop_at(sentence: str):
    def progress(stage: str, fraction: float | None = None) -> None:
        if stage.startswith(sentence):
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama", seed=4, layers=LAYERS)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    core.quantize_streamed(recipe_of(folder, **ROTATION), out)
    return out


def begun(folder: Path, out: Path, layers: int, **options: object) -> Path:
    """A work folder with so many layers done."""
    with pytest.raises(Stopped):
        core.quantize_streamed(recipe_of(folder, **(options or ROTATION)), out, progress=stop_at(f"Layer {layers + 1} of"))
    return out.with_name(f"{out.name}.stream")


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert facts_of(one) == facts_of(other)


@pytest.mark.parametrize("sentence", [
    *(f"Layer {i + 1} of 4: {stage}" for i in range(LAYERS) for stage in ("observing", "quantised")), "Saving"])
def test_a_run_stopped_anywhere_continues_to_the_same_result(folder, whole, tmp_path, sentence):
    out, said = tmp_path / "out", []
    with pytest.raises(Stopped):
        core.quantize_streamed(recipe_of(folder, **ROTATION), out, progress=stop_at(sentence))
    assert not out.exists()
    core.quantize_streamed(recipe_of(folder, **ROTATION), out, note=said.append)
    assert_same(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    done = LAYERS if sentence == "Saving" else int(sentence.split()[1]) - 1
    assert [line for line in said if line.startswith("Continuing")] == [
        f"Continuing after layer {done} of 4, which 'out.stream' holds."] * (done > 0)


CHILD = """
import json, os, signal, sys
import core
seen = {}
def progress(stage, fraction=None):
    if stage.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
core.quantize_streamed(core.QuantRecipe.from_dict(json.loads(sys.argv[1])), sys.argv[2], progress=progress)
"""


def test_a_killed_process_is_continued(folder, whole, tmp_path):
    recipe = recipe_of(folder, **ROTATION)
    command = [sys.executable, "-c", CHILD, json.dumps(recipe.to_dict()), str(tmp_path / "out"), "Layer 3 of 4: quantised"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    core.quantize_streamed(recipe, tmp_path / "out")
    assert_same(tmp_path / "out", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_layer_that_was_cut_between_its_two_folders_is_done_again(folder, whole, tmp_path, monkeypatch):
    """The states of a layer are on the disk, the layer is not: they are replaced, and the states before them are still there."""
    from core.models.io import quantized

    work, kept = begun(folder, tmp_path / "out", 2), quantized.save_tensors

    def save(path: Path, tensors: object) -> None:
        if path.name == "block.safetensors":
            raise Stopped
        kept(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("core.stream.work.save_tensors", save)
        core.quantize_streamed(recipe_of(folder, **ROTATION), tmp_path / "out")
    assert {path.name for path in work.glob("states-*")} == {"states-00001", "states-00002"}
    core.quantize_streamed(recipe_of(folder, **ROTATION), tmp_path / "out")
    assert_same(tmp_path / "out", whole)


def test_a_disk_without_second_names_gets_new_ones(folder, whole, tmp_path, monkeypatch):
    def refuse(*names: object) -> None:
        raise OSError(95, "no links")

    monkeypatch.setattr(os, "link", refuse)
    core.quantize_streamed(recipe_of(folder, **ROTATION), tmp_path / "out")
    assert_same(tmp_path / "out", whole)


def test_another_run_does_not_continue(folder, tmp_path):
    begun(folder, tmp_path / "out", 1)
    with pytest.raises(InputError, match="unfinished run with another recipe"):
        core.quantize_streamed(recipe_of(folder, method="rtn", weights="rtn"), tmp_path / "out")
    config = folder / "config.json"
    times = config.stat()
    os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    try:
        with pytest.raises(InputError, match="another version of the model"):
            core.quantize_streamed(recipe_of(folder, **ROTATION), tmp_path / "out")
    finally:
        os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [
    lambda work: damage(work / "block-00000" / "block.safetensors"),
    lambda work: damage(work / "states-00001" / "batch-00000.safetensors"),
    lambda work: (work / "block-00000").rename(work / "elsewhere"),
    lambda work: (work / "states-00001" / "batch-00000.safetensors").unlink(),
    lambda work: (work / "run.json").write_text("["),
], ids=["weights", "states", "missing layer", "missing states", "record"])
def test_a_damaged_work_folder_is_named(folder, tmp_path, change):
    work = begun(folder, tmp_path / "out", 2)
    change(work)
    with pytest.raises(ArtifactError, match=r"The unfinished run 'out\.stream' is damaged \(.+\): delete that folder"):
        core.quantize_streamed(recipe_of(folder, **ROTATION), tmp_path / "out")


def test_somebody_elses_folder_is_left_alone(folder, tmp_path):
    (tmp_path / "out.stream").mkdir()
    (tmp_path / "out.stream" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not the work folder of a run"):
        core.quantize_streamed(recipe_of(folder), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.stream").iterdir()] == ["notes.txt"]


def test_two_processes_do_not_share_a_work_folder(folder, tmp_path):
    work = begun(folder, tmp_path / "out", 1)
    with file_lock(work / "lock"), pytest.raises(ResourceError, match="In use by process"):
        core.quantize_streamed(recipe_of(folder, **ROTATION), tmp_path / "out")

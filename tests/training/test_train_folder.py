"""A run's folder: which texts it belongs to, who may write in it, and what stays when it is resumed, damaged or exported."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from core import folders
from core.errors import ArtifactError, InputError, ResourceError
from core.storage import atomic_dir, file_lock
from tests.training.train_tools import losses, tiny, write_text
from training import loop as training
from training.checkpoint import read_state
from training.export import export_run, load_run
from training.loop import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, a cache of its own, and a run of twelve steps with checkpoints at 4, 8 and 12, called `done`."""
    folder = tmp_path_factory.mktemp("folder")
    patch = pytest.MonkeyPatch()
    patch.setenv("QUANTSCOPE_CACHE", str(folder / "cache"))
    write_text(folder / "text.txt")
    train(tiny(folder, keep_at=(0.5,)), folder / "done")
    yield folder
    patch.undo()


@pytest.fixture
def run(place, tmp_path):
    """A copy of that run."""
    return shutil.copytree(place / "done", tmp_path / "run")


@pytest.fixture
def begun(place, tmp_path):
    """A run that was stopped after its fifth step: (configuration, folder)."""
    config = tiny(place)
    stop_after(5, config, tmp_path / "begun")
    return config, tmp_path / "begun"


@pytest.fixture
def other_text(place):
    """Another text under the same name, put back afterwards."""
    kept = (place / "text.txt").read_bytes()
    write_text(place / "text.txt", seed=1)
    yield
    (place / "text.txt").write_bytes(kept)


def stop_after(step: int, config, folder: Path) -> None:
    class Stop(Exception):
        pass

    def progress(text: str, fraction: float | None) -> None:
        if text.startswith(f"Training step {step} "):
            raise Stop

    with pytest.raises(Stop):
        train(config, folder, progress=progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def without_corpus(checkpoint: Path) -> None:
    """A checkpoint as earlier versions wrote it."""
    state = read_state(checkpoint)
    del state["corpus"]
    kept = {name: (checkpoint / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    with atomic_dir(checkpoint, replace=True) as stage:
        for name, data in kept.items():
            (stage / name).write_bytes(data)
        (stage / "state.json").write_text(json.dumps(state))


# the texts


def test_a_run_is_not_continued_on_another_text(begun, other_text):
    """The same file name with other words would bring another tokenizer: the losses would jump, and nothing would say why."""
    config, folder = begun
    before = contents(folder)
    with pytest.raises(ArtifactError, match=r"text\.txt.*put the earlier text back") as caught:
        train(config, folder, resume=True)
    assert caught.value.code == "E-CKPT-TEXT" and contents(folder) == before


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_checkpoint_is_not_taken_to_another_text(place, run, tmp_path, other_text, optimizer):
    config = tiny(place, init_from=str(run / "step-6"), resume_optimizer=optimizer)
    with pytest.raises(ArtifactError, match="checkpoint 'step-6'"):
        train(config, tmp_path / "branch")
    assert not (tmp_path / "branch/run.json").exists()


def test_the_card_is_not_measured_on_another_text(run, tmp_path, other_text):
    with pytest.raises(ArtifactError, match="put the earlier text back") as caught:
        export_run(run, tmp_path / "model")
    assert caught.value.code == "E-CKPT-TEXT" and not (tmp_path / "model").exists()


def test_replaced_inputs_are_not_exported_under_the_name_of_a_mode(place, tmp_path):
    """The folder would run by the mode's own quantisers and call itself trained."""
    train(tiny(place, inputs={"down_in": "int4x2"}), tmp_path / "run")
    with pytest.raises(ArtifactError, match="down_in"):
        export_run(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_older_checkpoints_are_held_to_the_run_beside_them(begun, request):
    """They name no texts: run.json does. Without either there is nothing to compare."""
    config, folder = begun
    without_corpus(folder / "checkpoint")
    copies = {name: shutil.copytree(folder, folder.with_name(name)) for name in ("same", "alone")}
    (copies["alone"] / "run.json").unlink()
    assert train(config, copies["same"], resume=True).step == 12
    request.getfixturevalue("other_text")
    with pytest.raises(ArtifactError, match="put the earlier text back"):
        train(config, folder, resume=True)
    assert train(config, copies["alone"], resume=True).step == 12


# who writes


def test_one_process_at_a_time(begun):
    config, folder = begun
    before = contents(folder)
    with file_lock(folder / "lock"), pytest.raises(ResourceError, match=rf"'begun'.*process {os.getpid()}\..*stop it") as caught:
        train(config, folder, resume=True)
    assert caught.value.code == "E-TIME" and contents(folder) == before
    assert train(config, folder, resume=True).step == 12


def test_a_run_that_came_and_went_is_not_overwritten(place, tmp_path, monkeypatch):
    """Two fresh starts: the second waited for the corpus while the first ran to its end."""
    config, real = tiny(place), training.load_corpus

    def slow(*args, **options):
        monkeypatch.setattr(training, "load_corpus", real)
        train(config, tmp_path / "run")
        return real(*args, **options)

    monkeypatch.setattr(training, "load_corpus", slow)
    with pytest.raises(InputError, match="--resume"):
        train(config, tmp_path / "run")
    assert read_state(tmp_path / "run/checkpoint")["step"] == 12


# what stays


def test_resuming_adds_to_the_provenance(place, begun, monkeypatch):
    """The card quotes where a run began; where it went on is added."""
    config, folder = begun
    first = json.loads((folder / "run.json").read_text())
    monkeypatch.setattr(training, "provenance", lambda: {"versions": {}, "hardware": "another machine", "date": "later"})
    train(replace(config, name="renamed"), folder, resume=True)
    train(config, folder, resume=True)  # nothing is left to do: nothing is added
    document = json.loads((folder / "run.json").read_text())
    assert document.pop("resumed") == [
        {"step": 4, "processes": 1, "device": first["device"], "versions": {}, "hardware": "another machine", "date": "later"}
    ]
    assert document == first
    assert losses(folder) == losses(place / "done")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(place, run):
    """Nine bytes changed in place: only the checksum tells. The run goes on from step 8 and ends where it had."""
    reference = (run / "checkpoint/model.safetensors").read_bytes()
    file = run / "checkpoint/model.safetensors"
    file.write_bytes(reference[:-9] + b"different")
    with pytest.raises(ArtifactError, match="step 8 of 12"):
        load_run(run)
    assert train(tiny(place, keep_at=(0.5,)), run, resume=True).step == 12
    assert json.loads((run / "run.json").read_text())["resumed"][0]["step"] == 8
    assert file.read_bytes() == reference and losses(run) == losses(place / "done")


def test_folders_that_cannot_change_names_in_one_step(place, begun, monkeypatch):
    """On such file systems there is one generation, and a run ends the same."""
    config, folder = begun
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    train(config, folder, resume=True)
    assert read_state(folder / "checkpoint")["step"] == 12 and not (folder / "previous").exists()
    assert losses(folder) == losses(place / "done")


def test_two_damaged_checkpoints_are_refused(place, run):
    for name in ("checkpoint", "previous"):
        (run / name / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="'checkpoint' is damaged"):
        train(tiny(place, keep_at=(0.5,)), run, resume=True)


def test_a_finished_run_without_its_log_has_no_loss_to_tell(place, run):
    (run / "log.jsonl").unlink()
    report = train(tiny(place, keep_at=(0.5,)), run, resume=True)
    assert (report.step, report.loss, report.held_out_loss) == (12, None, None)
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_a_branch_needs_steps_of_its_own(place, run, tmp_path):
    config = tiny(place, init_from=str(run / "checkpoint"), resume_optimizer=True)
    with pytest.raises(InputError, match="at step 12, this run has 12") as caught:
        train(config, tmp_path / "branch")
    assert caught.value.code == "E-PARAM-INIT_FROM"

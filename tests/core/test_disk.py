"""Every writer meets every error of a disk with one sentence, and leaves what was there and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from app.cli.output import write_json
from core.disk import PLACE, WRITING, disk_error_in, disk_errors
from core.errors import MAX_MESSAGE, InputError, ResourceError
from core.models.io.bitnet import save_bitnet
from core.models.io.load import load_model
from core.models.io.quantized import save_quantized
from core.models.tiny import save_tiny
from core.recipe import Calibration, QuantRecipe
from core.stages import quantize
from core.storage import atomic_dir, file_lock, is_whole, write_file
from core.workbench import Workbench
from tests.core.disk_tools import RustError, failing, failing_rust
from tests.training.train_tools import tiny, write_text
from training.checkpoint import save_latest
from training.corpus import load_corpus
from training.loop import train

TEXT = "text:" + " ".join(f"number {i} comes after number {i - 1}." for i in range(1, 200))
NUMBERS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENAMETOOLONG", "ENOTDIR", "EMFILE", "ESTALE", "EBUSY")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, object]:
    """A float model, a quantised one, a trainable one, and a folder for all."""
    place = tmp_path_factory.mktemp("made")
    float_model = load_model(str(save_tiny(place / "llama", "llama", seed=2)))
    recipe = QuantRecipe(float_model.name, weights="rtn", calibration=Calibration(TEXT, 64, 32))
    write_text(place / "text.txt")
    (place / "text.txt").write_text((place / "text.txt").read_text()[:20_000])
    return {"float": float_model, "recipe": recipe, "quantized": quantize(float_model, recipe)[0], "place": place}


def quantised_folder(place: Path, made: dict) -> None:
    """A quantised model."""
    save_quantized(place / "out", made["quantized"], {"recipe": made["recipe"].to_record(), "report": {}})


def trained_folder(place: Path, made: dict) -> None:
    """A trained model as the verb train --export writes it."""
    loaded, card = made["float"], dict.fromkeys(("title", "description", "licence"), "x")
    save_bitnet(place / "out", loaded.model, loaded.tokenizer, mode="fp", card=card, readme="x")


def checkpoint(place: Path, made: dict) -> None:
    """A checkpoint beside an earlier one."""
    import torch

    layer = torch.nn.Linear(4, 4)
    save_latest(place, layer, torch.optim.AdamW(layer.parameters()), {"step": 1, "config": {}})


def corpus(place: Path, made: dict) -> None:
    """A token stream in the cache."""
    load_corpus(((str(made["place"] / "text.txt"), 1),), vocab=300)


def json_file(place: Path, made: dict) -> None:
    """The object of --json."""
    write_json(str(place / "out.json"), {"a": 1})


def run_file(place: Path, made: dict) -> None:
    """A file of a training run."""
    write_file(place / "run.json", b"new")


def locked(place: Path, made: dict) -> None:
    """A lock file."""
    with file_lock(place / "x.lock"):
        pass


WRITERS = (quantised_folder, trained_folder, checkpoint, corpus, json_file, run_file, locked)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "work" / "cache"))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def leftovers(place: Path) -> list[str]:
    """Files of unfinished work: neither a lock file nor what lies in a whole folder."""
    return [str(p) for p in place.rglob("*") if p.is_file() and not p.name.endswith(".lock") and not is_whole(p.parent)]


def refused(call: Callable[[], object]) -> ResourceError:
    with pytest.raises(ResourceError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.code == "E-DISK" and message.startswith("Cannot write '") and message.endswith(".")
    assert len(message) < MAX_MESSAGE and "Choose" in message or "Raise" in message or "Stop" in message or "Free" in message
    return caught.value


@pytest.mark.parametrize("writer", WRITERS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("name", NUMBERS)
def test_each_error_at_each_writer(place, made, writer, name):
    (place / "dry").mkdir()
    with failing(place) as counted:
        writer(place / "dry", made)
    steps, number = counted["count"], getattr(errno, name)
    assert steps >= 1
    for path in sorted(place.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    chosen = NUMBERS.index(name) % steps
    for step in {chosen, 0} if steps > 3 else range(steps):
        (place / "folder").mkdir(exist_ok=True)
        with failing(place, number, after=step):
            refused(lambda: writer(place / "folder", made))
        assert leftovers(place) == []
    writer(place / "folder", made)


@pytest.mark.parametrize("writer", WRITERS[:3], ids=lambda w: w.__name__)
@pytest.mark.parametrize("name", NUMBERS)
def test_each_error_that_a_rust_library_meets(place, made, writer, name):
    with failing_rust(getattr(errno, name)):
        refused(lambda: writer(place, made))
    assert leftovers(place) == []


@pytest.mark.parametrize("writer", WRITERS[:4], ids=lambda w: w.__name__)
def test_a_real_limit_of_file_size(place, made, writer):
    """The kernel itself refuses (EFBIG): numpy, safetensors and tokenizers each say it in their own way."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, old[1]))
    try:
        assert "largest size" in str(refused(lambda: writer(place, made)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert leftovers(place) == []


@pytest.mark.parametrize("name", NUMBERS)
def test_a_finished_quantisation_is_usable_and_says_that_it_is_not_saved(place, made, name):
    bench = Workbench()
    with failing_rust(getattr(errno, name)):
        report = bench.quantize(made["recipe"], owner="ann")
    assert report.folder == "" and "usable until this program ends" in report.unsaved and "Cannot write" in report.unsaved
    assert report.layers and leftovers(place) == []
    assert bench.evaluate(report.key, owner="ann", text=TEXT, tokens=64, window=32).perplexity > 1
    assert bench.quantize(made["recipe"], owner="ann").unsaved is None, "the next time it is saved"


def test_a_training_run_goes_on_from_its_last_checkpoint(place, made, monkeypatch):
    config, saves = tiny(made["place"]), []

    def third_fails(*arguments: object, **options: object) -> None:
        saves.append(1)
        if len(saves) == 2:
            with failing_rust(errno.EDQUOT):
                save_latest(*arguments, **options)
        save_latest(*arguments, **options)

    monkeypatch.setattr("training.loop.save_latest", third_fails)
    assert "quota" in str(refused(lambda: train(config, place / "run")))
    monkeypatch.undo()
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(place / "cache"))
    assert train(config, place / "run", resume=True).step == config.steps


def test_errors_of_other_files_and_other_kinds_pass(tmp_path):
    target = tmp_path / "out"
    for error in (
        FileNotFoundError(errno.ENOENT, "no", "/elsewhere/model.gguf"),
        PermissionError(errno.EACCES, "no", "/etc/shadow"),
        ConnectionResetError(errno.ECONNRESET, "no"),
        ValueError("no"),
        RustError("(os error 2)"),
        InputError("No. (os error 28)"),
    ):
        with pytest.raises(type(error)), disk_errors(target):
            raise error
    with pytest.raises(ResourceError), disk_errors(target):
        raise PermissionError(errno.EACCES, "no", str(target) + ".part-0123/x")
    with pytest.raises(FileNotFoundError), atomic_dir(target) as stage:
        (stage / "a").write_bytes(Path("/elsewhere/model.gguf").read_bytes())
    assert list(tmp_path.iterdir()) == []


def test_every_reason_has_a_remedy():
    for reason, remedy in (WRITING | PLACE).values():
        assert reason[0].islower() and remedy[0].isupper() and not remedy.endswith(".")
    assert not WRITING.keys() & PLACE.keys()


def test_what_pip_says_about_a_disk(tmp_path):
    assert "disk is full" in str(disk_error_in("ERROR: OSError: [Errno 28] No space left on device", tmp_path / "w"))
    assert disk_error_in("ERROR: [Errno 2] no such file", tmp_path) is None and disk_error_in("no network", tmp_path) is None


def test_a_json_file_that_cannot_be_written_costs_no_result(place, capsys, monkeypatch):
    from app.cli.output import Console

    console = Console(str(place / "x.json"))
    with failing(place, errno.EIO, after=0):
        refused(lambda: console.finish({"a": 1}, "the table\n"))
    assert capsys.readouterr().out == "the table\n" and os.listdir(place) == []
    console.finish({"a": 1}, "")
    assert json.loads((place / "x.json").read_text()) == {"a": 1}

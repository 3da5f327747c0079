"""The cache stays below its limit: what was used longest ago goes first, what is in use stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from app.settings import Settings
from core import cache
from core.cache import cache_limit, in_use, mark_used, sweep
from core.errors import ArtifactError, InputError
from core.models.tiny import save_tiny
from core.recipe import Calibration, QuantRecipe
from core.storage import atomic_dir, verify
from core.workbench import Workbench

ROOT = Path(__file__).resolve().parents[2]
KB = 1000


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """An empty cache of at most 10 kB, without a time of grace."""
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QUANTSCOPE_CACHE_GB", "0.00001")
    monkeypatch.setattr(cache, "GRACE_S", 0.0)
    return tmp_path / "cache"


def add(folder: Path, size: int = 3 * KB, age: float = 0.0) -> Path:
    """A folder of the cache, used `age` seconds ago."""
    with atomic_dir(folder, replace=True) as stage:
        (stage / "weights").write_bytes(bytes(size))
    os.utime(folder, (time.time() - age, time.time() - age))
    return folder


def test_the_longest_unused_go_first_of_all_kinds(root):
    kinds = ("quantized/a", "hub/owner--name/0123", "gguf/b", "wheel/llm-1.0.2", "text/c", "corpus/d")
    places = [add(root / kind, age=100 - i) for i, kind in enumerate(kinds)]
    assert [p.exists() for p in places] == [False] * 3 + [True] * 3
    mark_used(places[3])
    add(root / "quantized" / "e", age=1)
    assert [p.exists() for p in places[3:]] == [True, False, True], "a use counts, not the age"


def test_what_was_just_added_stays_whatever_its_size(root):
    old, large = add(root / "gguf" / "old", age=9), add(root / "gguf" / "large", size=50 * KB)
    assert large.exists() and not old.exists()
    verify(large, checksums=True)


def test_a_folder_that_is_read_stays(root):
    read = add(root / "gguf" / "read", size=9 * KB, age=50)
    with in_use(read):
        os.utime(read, (1, 1))
        add(root / "gguf" / "other", size=5 * KB, age=10)
        verify(read)
    add(root / "gguf" / "third", size=5 * KB)
    assert not (root / "gguf" / "other").exists(), "it was marked used when it was opened, then forgotten by this test"


def test_a_folder_that_another_process_reads_or_writes_stays(root):
    read = add(root / "gguf" / "read", size=9 * KB, age=50)
    code = "import sys, time; from pathlib import Path; from core.cache import in_use\n" \
           "with in_use(Path(sys.argv[1])): print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, str(read)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        os.utime(read, (1, 1))
        with atomic_dir(root / "gguf" / "slow", replace=True) as stage:
            (stage / "manifest").write_bytes(bytes(9 * KB))
            add(root / "quantized" / "x", size=9 * KB, age=5)
            assert stage.exists() and read.exists()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    add(root / "quantized" / "y")
    assert not read.exists(), "a dead reader holds nothing"


def test_what_was_used_within_the_time_of_grace_stays(root, monkeypatch):
    monkeypatch.setattr(cache, "GRACE_S", 60.0)
    young, old = add(root / "gguf" / "young", size=9 * KB, age=30), add(root / "gguf" / "old", size=9 * KB, age=90)
    add(root / "gguf" / "new", size=9 * KB)
    assert young.exists() and not old.exists()


def test_only_folders_of_the_cache_are_swept(root, tmp_path):
    mine = add(tmp_path / "models" / "mine", size=50 * KB, age=1e6)
    (root / "notes").mkdir(parents=True)
    (root / "notes" / "diary.txt").write_text("x" * 50 * KB)
    add(root / "gguf" / "a", size=20 * KB)
    add(tmp_path / "models" / "other", size=50 * KB)
    assert mine.exists() and (root / "notes" / "diary.txt").exists() and (root / "gguf" / "a").exists()


def test_a_reader_sees_a_whole_folder_or_none(root, monkeypatch):
    """While folders are swept, whoever holds one by `in_use` and finds it whole can read all of it."""
    place, faults, done = root / "gguf" / "a", [], threading.Event()

    def read() -> None:
        while not done.is_set():
            with in_use(place) as locked:
                try:
                    verify(place)
                except (ArtifactError, FileNotFoundError):
                    continue
                if not locked:  # it came after `in_use` had looked; real ones are young then, and not swept
                    continue
                try:
                    verify(place, checksums=True)
                except (ArtifactError, OSError) as error:
                    faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(40):
        if not place.exists():  # a writer may replace what is read: the new folder is young, and not swept for a while
            add(place, size=8 * KB, age=100)
        sweep(keep=root / f"nothing-{turn}")
        add(root / "quantized" / "b", size=8 * KB, age=100)
    done.set()
    for reader in readers:
        reader.join()
    assert not faults


def test_quantised_models_of_the_workbench_are_swept_and_made_again(root, tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "llama", "llama", seed=2)
    recipes = [QuantRecipe(str(model), seed=s, weights="rtn", calibration=Calibration("sotu", 64, 32)) for s in range(2)]
    bench = Workbench()
    first, second = (Path(bench.quantize(recipe).folder) for recipe in recipes)
    assert not first.exists() and second.exists()
    assert Path(Workbench().quantize(recipes[0]).folder) == first and first.exists() and not second.exists()
    assert bench.load(recipes[1].hash).name == recipes[1].hash, "what is in memory is not touched"


@pytest.mark.parametrize("stated", ["zero", "0", "-1", "nan", "inf", "1e12", "10 GB"])
def test_a_limit_that_is_none_is_refused_before_the_work(root, monkeypatch, stated):
    monkeypatch.setenv("QUANTSCOPE_CACHE_GB", stated)
    for call in (cache_limit, Workbench, lambda: Settings.read(model="x"), lambda: add(root / "gguf" / "x")):
        with pytest.raises(InputError, match="positive number of gigabytes") as caught:
            call()
        assert caught.value.code == "E-PARAM-CACHE-GB"
    assert not root.exists()


def test_the_limit_without_a_wish(monkeypatch):
    monkeypatch.delenv("QUANTSCOPE_CACHE_GB")
    assert cache_limit() == 20 * 10**9

"""A grid becomes recipes, each once; rows outlive cut lines, killed processes and interrupted sweeps."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

from core.errors import InputError, ResourceError
from core.models.tiny import save_tiny
from core.sweep.grid import Grid, Measure
from core.sweep.pool import MAX_DEATHS, failures, run_grid
from core.sweep.rows import FACTS, ROWS, open_rows


def test_every_combination_is_a_recipe_and_equal_ones_run_once():
    data = {
        "model": ["a", "b"],
        "method": ["rptq", "rtn", "rotation", "bitnet"],
        "scheme": ["W4A16", "W4A4"],
        "variant": ["default", "sorted"],
        "clusters": [4, "R1=8"],
        "order": ["layer", "shared"],
        "rotation": ["group=32", "group=64"],
        "measure": {"text": "sotu", "tokens": 1024},
    }
    grid = Grid.from_dict(data)
    assert grid.measure == Measure("sotu", 1024, 512)
    own = [recipe for recipe in grid.recipes if recipe.model == "a"]
    # rptq: 2 schemes, 2 variants, 2 clusters, 2 orders; rtn: 2 schemes; rotation: 2 schemes, 2 groups; bitnet: one
    assert [sum(r.method == m for r in own) for m in data["method"]] == [16, 2, 4, 1]
    assert len(grid.recipes) == 46 == len({recipe.hash for recipe in grid.recipes})
    assert [recipe.model for recipe in grid.recipes] == ["a"] * 23 + ["b"] * 23, "a process keeps its model"
    assert {recipe.weights for recipe in own if recipe.method == "rtn"} == {"rtn"}


REFUSED = {
    "no table": [1],
    "unknown field 'modell'": {"modell": "a"},
    "names no model": {"scheme": "W4A4"},
    "scheme must be": {"model": "a", "scheme": {"x": 1}},
    "clusters must be": {"model": "a", "clusters": []},
    "seed must be": {"model": "a", "seed": True},
    "combination scheme W9A9": {"model": "a", "scheme": ["W4A4", "W9A9"]},
    "combinations, at most": {"model": "a", "seed": list(range(101)), "clusters": list(range(1, 101))},
    "measure has other": {"model": "a", "measure": {"token": 3}},
    "use at least one window": {"model": "a", "measure": {"tokens": 100}},
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_grid_that_cannot_be_run_is_refused_before_it(named):
    with pytest.raises(InputError) as caught:
        Grid.from_dict(REFUSED[named])
    assert named in str(caught.value) and len(str(caught.value)) <= 330


def test_a_cut_row_is_dropped_and_later_ones_follow(tmp_path):
    with open_rows(tmp_path / "rows", Measure()) as rows:
        rows.append({"hash": "a", "status": "done"})
        rows.append({"hash": "b", "status": "done"})
    file = tmp_path / "rows" / ROWS
    file.write_bytes(file.read_bytes()[:-5])
    with open_rows(tmp_path / "rows", Measure()) as rows:
        assert set(rows.found) == {"a"}
        rows.append({"hash": "c", "status": "failed"})
    assert [json.loads(line)["hash"] for line in file.read_text().splitlines()] == ["a", "c"]


def test_a_folder_has_one_writer_and_one_way_of_measuring(tmp_path):
    with open_rows(tmp_path / "rows", Measure()):
        second = open_rows(tmp_path / "rows", Measure())
        with pytest.raises(ResourceError, match="In use"):
            second.__enter__()
    with pytest.raises(InputError, match="in another way"), open_rows(tmp_path / "rows", Measure(tokens=512)):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="holds other files"), open_rows(tmp_path / "other", Measure()):
        pass
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [".lock", "file"]


@pytest.fixture
def grid(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    model, text = save_tiny(tmp_path / "model", "llama", seed=3), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    shared = {"model": str(model), "calibration": str(text), "tokens": 64, "window": 32, "clusters": 2}
    measure = {"text": str(text), "tokens": 64, "window": 32}
    return Grid.from_dict(shared | {"scheme": ["W4A16", "W4A8", "W4A4"], "measure": measure})


def test_a_sweep_survives_killed_processes_and_goes_on(grid, tmp_path):
    killed = []

    def kill(text: str, share: float) -> None:
        if not killed:
            victim = multiprocessing.active_children()[-1]
            killed.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    few = Grid(grid.recipes[:2], grid.measure)
    with open_rows(tmp_path / "rows", grid.measure) as rows:
        found = run_grid(few, rows, workers=2, progress=kill)
    assert len(killed) == 1 and not failures(found) and [row["hash"] for row in found] == [recipe.hash for recipe in few.recipes]
    with open_rows(tmp_path / "rows", grid.measure) as rows:
        found = run_grid(grid, rows)
    written = [json.loads(line)["hash"] for line in (tmp_path / "rows" / ROWS).read_text().splitlines()]
    assert sorted(written) == sorted(recipe.hash for recipe in grid.recipes), "each once"
    klds = [row["report"]["kld_mean"] for row in found]
    assert all(row["status"] == "done" and row["seconds"] > 0 for row in found) and klds[2] > klds[0] > 0
    assert not multiprocessing.active_children(), "no process is left"


def test_what_fails_is_a_row_and_runs_again_on_request(grid, tmp_path):
    wrong = Grid.from_dict({"model": str(tmp_path / "none"), "measure": {"text": "sotu", "tokens": 512}})
    for retry, count in ((False, 1), (False, 1), (True, 2)):
        with open_rows(tmp_path / "rows", wrong.measure) as rows:
            found = run_grid(wrong, rows, retry=retry)
        assert [row["code"] for row in failures(found)] == ["E-MODEL-NOTFOUND"]
        assert len((tmp_path / "rows" / ROWS).read_text().splitlines()) == count
    assert json.loads((tmp_path / "rows" / FACTS).read_text())["tokens"] == 512


def test_a_recipe_that_kills_its_processes_is_given_up(grid, tmp_path, monkeypatch):
    monkeypatch.setattr("core.sweep.pool._start", _dying)
    with open_rows(tmp_path / "rows", grid.measure) as rows:
        found = run_grid(Grid(grid.recipes[:1], grid.measure), rows)
    assert f"{MAX_DEATHS} processes died" in found[0]["error"] and found[0]["code"] == "E-WORKER"


def _dying(measure: Measure, threads: int, device: str) -> object:
    """A process that ends as soon as it has a recipe."""
    from core.sweep.pool import _Process

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: (theirs.recv(), os._exit(9)))
    process.start()
    theirs.close()
    return _Process(process, ours)

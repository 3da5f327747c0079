"""The job table: who waits, who runs, how far, and the sentence when it ends badly.

One worker process does one job at a time; the others wait in order of arrival. A job belongs to the session that
submitted it: nobody else can read or cancel it. Cancelling asks the job to stop and kills the worker if it does not;
a dead worker is replaced, and the next job finds a fresh one.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.settings import Settings
from app.worker.process import WorkerProcess
from core.errors import Cancelled, QuantscopeError, ResourceError

PUBLIC = "public"
"""Owner of jobs whose results anyone may read: only the server submits these."""
PER_SESSION = 2
MAX_WAITING = 64
KEEP_SECONDS = 900.0
TICK_SECONDS = 0.05
MEMORY = "E-MEM"
log = logging.getLogger("quantscope.jobs")


@dataclass(frozen=True)
class Step:
    """One call of the workbench: `method(**arguments)`. `weight` is its share of the job's time, for the progress bar."""

    method: str
    arguments: dict[str, Any]
    title: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class JobView:
    """A job as its owner sees it at one moment.

    Attributes:
        state: "waiting", "running", "done", "failed" or "cancelled".
        stage, fraction: what runs, and 0..1 over the whole job (None before the first report).
        ahead: jobs that go first.
        results: one report per finished step.  texts: streamed text per step.
    """

    state: str
    stage: str
    fraction: float | None
    elapsed_s: float
    remaining_s: float | None
    ahead: int
    results: tuple[Any, ...]
    texts: tuple[str, ...]
    error: QuantscopeError | None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "failed", "cancelled")


@dataclass
class _Job:
    owner: str
    steps: tuple[Step, ...]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    state: str = "waiting"
    stage: str = ""
    step: int = 0
    fraction: float | None = None
    results: list[Any] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    error: QuantscopeError | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None
    cancel_at: float | None = None
    cancel_sent: bool = False
    on_done: Callable[[tuple[Any, ...]], None] | None = None

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    def end(self, state: str, error: QuantscopeError | None = None) -> None:
        if not self.ended:
            self.state, self.error, self.ended_at = state, error, time.monotonic()

    def share(self) -> float | None:
        """Fraction of the whole job done, weighing the steps."""
        if self.fraction is None and not self.results:
            return None
        total = sum(s.weight for s in self.steps)
        before = sum(s.weight for s in self.steps[: self.step])
        current = self.steps[self.step].weight * (self.fraction or 0.0) if self.step < len(self.steps) else 0.0
        return min(1.0, (before + current) / total)


class JobRunner:
    """Runs jobs in a worker process. All methods may be called from any thread and return at once."""

    def __init__(self, settings: Settings, start_worker: Callable[[Settings], WorkerProcess] = WorkerProcess) -> None:
        self.settings = settings
        self._start_worker = start_worker
        self._worker: WorkerProcess | None = None
        self._jobs: dict[str, _Job] = {}
        self._waiting: list[_Job] = []
        self._running: _Job | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, daemon=True, name="job-runner")
        self._thread.start()

    # -- what sessions call

    def submit(self, owner: str, steps: Sequence[Step], *, on_done: Callable[[tuple[Any, ...]], None] | None = None) -> str:
        """Queue a job and return its token; `on_done` gets the results if it ends well.

        Raises: ResourceError if the session or the server has too many.
        """
        with self._changed:
            mine = [j for j in self._jobs.values() if j.owner == owner and not j.ended]
            if owner != PUBLIC and len(mine) >= PER_SESSION:
                raise ResourceError(
                    "You already have one job running and one waiting. Wait for them or press Stop.", code="E-BUSY"
                )
            if len(self._waiting) >= MAX_WAITING:
                raise ResourceError(f"{MAX_WAITING} jobs are waiting already. Try again in a few minutes.", code="E-BUSY")
            job = _Job(owner, tuple(steps), stage=steps[0].title, on_done=on_done)
            job.texts = [""] * len(job.steps)
            self._jobs[job.token] = job
            self._waiting.append(job)
            self._forget_old()
            self._changed.notify_all()
            return job.token

    def view(self, owner: str, token: str) -> JobView:
        """How the job stands. Raises ResourceError if it is not this session's."""
        with self._changed:
            job = self._owned(owner, token)
            now = job.ended_at or time.monotonic()
            elapsed = now - (job.started_at or job.submitted_at)
            share = 1.0 if job.state == "done" else job.share()
            remaining = (
                elapsed * (1 - share) / share if job.state == "running" and share and share > 0.02 and elapsed > 1 else None
            )
            ahead = self._waiting.index(job) + (self._running is not None) if job in self._waiting else 0
            return JobView(
                job.state, job.stage, share, elapsed, remaining, ahead, tuple(job.results), tuple(job.texts), job.error
            )

    def cancel(self, owner: str, token: str) -> None:
        """Stop a job of this session: a waiting one at once, a running one within two seconds."""
        with self._changed:
            job = self._owned(owner, token)
            if job.owner != owner:
                return  # a public job goes on for the others
            if job in self._waiting:
                self._waiting.remove(job)
                job.end("cancelled", Cancelled())
            elif not job.ended and job.cancel_at is None:
                job.cancel_at = time.monotonic()
            self._changed.notify_all()

    def cancel_all(self, owner: str) -> int:
        """Stop every job of this session; returns how many were unfinished."""
        with self._changed:
            unfinished = [j.token for j in self._jobs.values() if j.owner == owner and not j.ended]
        for token in unfinished:
            self.cancel(owner, token)
        return len(unfinished)

    def close(self) -> None:
        """End the worker and the table, for tests and shutdown."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(5.0)
        if self._worker:
            self._worker.kill()

    def _owned(self, owner: str, token: str) -> _Job:
        job = self._jobs.get(token) if isinstance(token, str) else None
        if job is None or not (job.owner == PUBLIC or secrets.compare_digest(job.owner, owner)):
            raise ResourceError("This job is no longer known here. Start it again.", code="E-JOB")
        return job

    def _forget_old(self) -> None:
        limit = time.monotonic() - KEEP_SECONDS
        for token in [t for t, j in self._jobs.items() if j.ended_at is not None and j.ended_at < limit]:
            del self._jobs[token]

    # -- the runner's own thread

    def _loop(self) -> None:
        while not self._closing:
            try:
                self._ensure_worker()
                if job := self._take():
                    self._run(job)
            except Exception:  # noqa: BLE001 - thread boundary: a fault in one job must not end the table
                log.exception("fault in the job table")
                time.sleep(1.0)

    def _take(self) -> _Job | None:
        with self._changed:
            if not self._waiting and not self._closing:
                self._changed.wait(0.5)
            if not self._waiting:
                return None
            self._running = self._waiting.pop(0)
            self._running.state, self._running.started_at = "running", time.monotonic()
            return self._running

    def _ensure_worker(self) -> WorkerProcess:
        if self._worker is not None and not self._worker.alive:
            self._worker.kill()
            self._worker = None
        if self._worker is None:
            self._worker = self._start_worker(self.settings)
        return self._worker

    def _run(self, job: _Job) -> None:
        worker = self._ensure_worker()
        try:
            if not worker.send("job", job.token, [(s.method, s.arguments) for s in job.steps]):
                self._died(job, worker)
            while not job.ended and not self._closing:
                message = worker.receive(TICK_SECONDS)
                if message is not None:
                    self._apply(job, worker, message)
                self._enforce(job, worker)
        finally:
            with self._changed:
                self._running = None
                job.end("failed", ResourceError("The server is closing.", code="E-BUSY"))
        if job.error is not None and job.error.code == MEMORY:
            worker.kill()  # it is about to leave by itself; the next job must not be sent to it
        if job.state == "done" and job.on_done:
            job.on_done(tuple(job.results))

    def _apply(self, job: _Job, worker: WorkerProcess, message: tuple) -> None:
        kind, *rest = message
        if kind == "gone":
            self._died(job, worker)
            return
        if kind == "ready" or rest[0] != job.token:
            return
        with self._changed:
            if kind == "progress":
                job.step, job.stage, job.fraction = rest[1:]
            elif kind == "text":
                job.texts[rest[1]] += rest[2]
            elif kind == "result":
                job.results.append(rest[2])
                job.step, job.fraction = rest[1] + 1, None
                job.stage = job.steps[job.step].title if job.step < len(job.steps) else job.stage
            elif kind == "done":
                job.end("done")
            elif kind == "failed":
                self._failed(job, code=rest[1], sentence=rest[2])

    def _failed(self, job: _Job, *, code: str, sentence: str) -> None:
        if code == Cancelled.code:
            job.end("cancelled", Cancelled())
        else:
            job.end("failed", QuantscopeError(sentence, code=code) if sentence else out_of_memory(job.stage))

    def _died(self, job: _Job, worker: WorkerProcess) -> None:
        code = worker.exit_code()
        worker.kill()
        with self._changed:
            if job.cancel_at is not None:
                job.end("cancelled", Cancelled())
            elif code == -9:
                job.end("failed", out_of_memory(job.stage))
            else:
                job.end(
                    "failed",
                    ResourceError(
                        f"The worker stopped unexpectedly{_at(job.stage)}. Your inputs are kept: try again, or a smaller model.",
                        code="E-WORKER",
                    ),
                )

    def _enforce(self, job: _Job, worker: WorkerProcess) -> None:
        """Pass a cancel on, and kill the worker when the job ignores it or takes longer than any may."""
        now = time.monotonic()
        if job.ended:
            return
        if job.cancel_at is not None:
            if not job.cancel_sent:
                job.cancel_sent = True
                worker.send("cancel", job.token)
            elif now - job.cancel_at > self.settings.grace_seconds:
                worker.kill()
                self._finish(job, "cancelled", Cancelled())
        elif now - (job.started_at or now) > self.settings.job_seconds:
            worker.kill()
            self._finish(
                job,
                "failed",
                ResourceError(
                    f"The job took longer than {self.settings.job_seconds / 60:.0f} minutes and was stopped. "
                    "Use fewer tokens or a smaller model.",
                    code="E-TIME",
                ),
            )

    def _finish(self, job: _Job, state: str, error: QuantscopeError) -> None:
        with self._changed:
            job.end(state, error)


def _at(stage: str) -> str:
    return f" at “{stage[:80]}”" if stage else ""


def out_of_memory(stage: str) -> ResourceError:
    """The sentence for a worker that the kernel ended, or that could not allocate."""
    return ResourceError(
        f"Ran out of memory{_at(stage)}. Try a smaller model, fewer calibration tokens or fewer bits.", code=MEMORY
    )

"""A job of a worker: its steps, how far it is, what it has given so far, and how long it will still take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.worker.wire import Malformed
from core.errors import Cancelled, QuantscopeError, ResourceError

FIRST_SHARE, FIRST_SECONDS = 0.1, 3.0
"""The remaining time is unknown before this share of the job is done and before it has run this long."""
RECENT = 0.5
"""The pace is measured over this last part of the time so far: early steps (reading files) say little about later ones."""
MEMORY = "E-MEM"
_names = itertools.count(1)


@dataclass(frozen=True)
class Step:
    """One call of the workbench: `method(**arguments)`.

    Attributes:
        title: what the status line says until the workbench reports a stage of its own.
        weight: the step's share of the job's time, relative to the other steps.
    """

    method: str
    arguments: dict[str, Any]
    title: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class JobView:
    """A job at one moment.

    Attributes:
        state: "waiting", "running" or "done"; "cancelled" for a job that was stopped.
        stage: what runs now.
        fraction: 0 to 1 over the whole job, None before the worker's first report.
        elapsed_s: seconds since the job started, or since it began to wait.
        remaining_s: seconds it will still take, None while that is unknown.
        ahead: number of jobs that go first.
        results: one report per finished step.
        texts: streamed text, one per step.
    """

    state: str
    stage: str = ""
    fraction: float | None = None
    elapsed_s: float = 0.0
    remaining_s: float | None = None
    ahead: int = 0
    results: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.state not in ("waiting", "running")


class Pace:
    """Estimates the remaining time of work from the shares it has reported.

    remaining = (1 - share) / pace, where pace is the share done per second over the last half of the time it has run. The
    pace of the whole run would keep what slow beginnings said; the pace of the last report alone jumps from layer to layer.
    """

    def __init__(self) -> None:
        self.reports: list[tuple[float, float]] = [(0.0, 0.0)]

    def report(self, seconds: float, share: float) -> None:
        """Note that `share` (0 to 1) was done `seconds` after the start. A share below an earlier one is ignored."""
        if share > self.reports[-1][1]:
            self.reports.append((seconds, share))

    def remaining(self, seconds: float) -> float | None:
        """Seconds still to go `seconds` after the start; None while too little is known."""
        at, share = self.reports[-1]
        if share < FIRST_SHARE or seconds < FIRST_SECONDS:
            return None
        since, before = next(r for r in reversed(self.reports[:-1]) if r[0] <= (1 - RECENT) * at)
        return max(0.0, (1 - share) * (at - since) / (share - before) - (seconds - at))


class Job:
    """What the page knows of one job. `take` applies the worker's messages, `view` tells how it stands."""

    def __init__(self, owner: str, steps: Sequence[Step], clock: Callable[[], float] = time.monotonic) -> None:
        self.name = str(next(_names))
        self.owner = owner
        self.steps = tuple(steps)
        self.state = "waiting"
        self.stage = self.steps[0].title
        self.fraction: float | None = None
        self.results: list[Any] = []
        self.texts = [""] * len(self.steps)
        self.out_of_memory = False
        self.pace = Pace()
        self._clock = clock
        self._since = clock()

    def start(self) -> None:
        """Note that the worker has the job now."""
        self.state, self._since = "running", self._clock()

    def take(self, message: tuple) -> bool:
        """Apply one message of the worker; whether it changed this job (it may belong to an earlier one).

        Raises: the error that ended the job; Malformed if the message has no known form.
        """
        match message:
            case ("ready",):
                return False
            case (str(), str(name), *_) if name != self.name:
                return False
            case ("progress", _, int(step), str(stage), None | int() | float() as within) if step in range(len(self.steps)):
                self.stage = stage
                self._reach(step, within or 0.0)
            case ("text", _, int(step), str(chunk)) if step in range(len(self.steps)):
                self.texts[step] += chunk
            case ("result", _, int(step), report) if step == len(self.results) < len(self.steps):
                self.results.append(report)
                self._reach(step + 1, 0.0)
                self.stage = self.steps[step + 1].title if step + 1 < len(self.steps) else self.stage
            case ("done", _) if len(self.results) == len(self.steps):
                self.state, self.fraction = "done", 1.0
            case ("failed", _, str(code), str(sentence)):
                raise self._error(code, sentence)
            case _:
                raise Malformed
        return True

    def view(self, ahead: int = 0) -> JobView:
        """How the job stands now, `ahead` jobs before it."""
        elapsed = self._clock() - self._since
        remaining = self.pace.remaining(elapsed) if self.state == "running" else None
        parts = (tuple(self.results), tuple(self.texts))
        return JobView(self.state, self.stage, self.fraction, elapsed, remaining, ahead, *parts)

    def _reach(self, step: int, within: float) -> None:
        """Note that the steps before `step` and the share `within` of it are done."""
        weights = [s.weight for s in self.steps]
        done = sum(weights[:step]) + min(max(within, 0.0), 1.0) * sum(weights[step : step + 1])
        self.fraction = max(self.fraction or 0.0, done / sum(weights))
        self.pace.report(self._clock() - self._since, self.fraction)

    def _error(self, code: str, sentence: str) -> QuantscopeError:
        if code == Cancelled.code:
            return Cancelled()
        self.out_of_memory = not sentence  # the worker says so without a sentence: it has no memory to make one
        return QuantscopeError(sentence, code=code) if sentence else out_of_memory(self.stage)


def out_of_memory(stage: str) -> ResourceError:
    """The sentence for a worker that the kernel ended, or that could not allocate."""
    return ResourceError(
        f"Ran out of memory{at(stage)}. Try a smaller model, fewer calibration tokens or fewer bits.", code=MEMORY
    )


def at(stage: str) -> str:
    """The stage as a part of a sentence, cut to 80 characters."""
    return f" at “{stage[:80]}”" if stage else ""

"""A job of a worker: its steps, its progress, its results so far, and its remaining time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from app.worker.wire import Malformed
from core.errors import Cancelled, QuantscopeError, ResourceError
from core.progress import Pace

LOAD = "load"
"""The step that does not count for the pace: it may download a model, or find it in memory."""
MEMORY = "E-MEM"
_names = itertools.count(1)


@dataclass(frozen=True)
class Step:
    """One call of the workbench: `method(**arguments)`.

    Attributes:
        title: text of the status line until the workbench reports a stage of its own.
        weight: the step's share of the job's time, relative to the other steps. timed: whether it is an estimate in seconds.
    """

    method: str
    arguments: dict[str, Any]
    title: str = ""
    weight: float = 1.0
    timed: bool = False


@dataclass(frozen=True)
class JobView:
    """The state of a job at one moment.

    Attributes:
        state: "waiting", "running" or "done"; "cancelled" for a job that was stopped.
        stage: text that says what runs now.
        fraction: 0 to 1 over the whole job, None before the worker's first report.
        elapsed_s: seconds since the job started, or since it began to wait.
        remaining_s: seconds it will still take, None while that is unknown.
        ahead: number of jobs before this one in the queue.
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
        """Whether the job has ended."""
        return self.state not in ("waiting", "running")


class Job:
    """The page's record of one job: `take` applies the worker's messages, `view` returns its state."""

    def __init__(
        self, owner: str, steps: Sequence[Step], address: str = "", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = str(next(_names))
        self.owner, self.address = owner, address
        self.steps = tuple(steps)
        self.state = "waiting"
        self.stage = self.steps[0].title
        self.fraction: float | None = None
        self.results: list[Any] = []
        self.texts = [""] * len(self.steps)
        self.out_of_memory = False
        self._pace = Pace(sum(s.weight for s in self.steps) if all(s.timed for s in self.steps) else None)
        self._clock = clock
        self._since = clock()

    def start(self) -> None:
        """Mark the job as running."""
        self.state, self._since = "running", self._clock()

    def take(self, message: tuple) -> bool:
        """Apply one message of the worker. Returns: whether it changed this job (it may belong to an earlier one).

        Raises: the error that ended the job; Malformed if the message has no known form.
        """
        match message:
            case ("ready",) | ("beat",):
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
        """Return the state of the job now, with `ahead` jobs before it."""
        elapsed = self._clock() - self._since
        remaining = self._pace.remaining(self._clock()) if self.state == "running" else None
        parts = (tuple(self.results), tuple(self.texts))
        return JobView(self.state, self.stage, self.fraction, elapsed, remaining, ahead, *parts)

    def _reach(self, step: int, within: float) -> None:
        """Record that the steps before `step` and the share `within` of it are done."""
        weights = [s.weight for s in self.steps]
        done = sum(weights[:step]) + min(max(within, 0.0), 1.0) * sum(weights[step : step + 1])
        self.fraction = max(self.fraction or 0.0, done / sum(weights))
        if any(s.method != LOAD for s in self.steps[step : step + 1]):
            self._pace.report(self._clock(), self.fraction)

    def _error(self, code: str, sentence: str) -> QuantscopeError:
        if code == Cancelled.code:
            return Cancelled()
        self.out_of_memory = not sentence  # a worker without memory for a sentence sends none
        return QuantscopeError(sentence, code=code) if sentence else out_of_memory(self.stage)


def out_of_memory(stage: str) -> ResourceError:
    """Make the error for a worker that the kernel ended, or that could not allocate memory."""
    return ResourceError(
        f"Ran out of memory{at(stage)}. Try a smaller model, fewer calibration tokens or fewer bits.", code=MEMORY
    )


def at(stage: str) -> str:
    """Return the stage as a part of a sentence, cut to 80 characters."""
    return f" at “{stage[:80]}”" if stage else ""

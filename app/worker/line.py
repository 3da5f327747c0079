"""The line of jobs before a worker: fair between addresses, then between the visitors of one address."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable

from app.worker.job import Job
from core.errors import ResourceError

PUBLIC = "public"
"""Owner of jobs that the server starts for everyone, to whom the limit per session does not apply."""
PER_SESSION = 2
PER_ADDRESS = 16
MAX_WAITING = 200
"""Jobs that wait at most: waiting takes no thread and next to no memory, but nobody should wait for hours."""
FIRST_SECONDS = 60.0
"""Guess of a job's time before any has ended."""


class Line:
    """Jobs in the order in which they run; the first one is running.

    Each address has its first job served before any has its second, and so on; within an address, so has each visitor. A job
    can be overtaken by those of others who have fewer before it, but by each of them at most once.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.seconds: deque[float] = deque(maxlen=20)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, place: int) -> Job:
        return self.jobs[place]

    def add(self, job: Job) -> None:
        """Add a job that has just come. Raises: ResourceError E-BUSY if its owner, its address or all have too many."""
        if job.owner != PUBLIC and sum(other.owner == job.owner for other in self.jobs) >= PER_SESSION:
            raise ResourceError("You already have one job running and one waiting. Wait for them or press Stop.", code="E-BUSY")
        same = sum(other.address == job.address for other in self.jobs)
        if same >= PER_ADDRESS or len(self.jobs) > MAX_WAITING:
            count, who = (same, "From your network ") if same >= PER_ADDRESS else (len(self.jobs), "")
            raise ResourceError(
                f"{who}{count} jobs run or wait already, no more are taken. Come back in about {self.minutes(count)} minutes.",
                code="E-BUSY",
            )
        self.jobs.append(job)
        self._order()

    def remove(self, job: Job) -> None:
        """Remove a job that has ended, in whatever way."""
        if job.state != "waiting":
            self.seconds.append(job.view().elapsed_s)
        self.jobs.remove(job)
        self._order()

    def ahead(self, job: Job) -> int:
        """Return how many jobs are before this one."""
        return self.jobs.index(job)

    def minutes(self, count: int) -> int:
        """Estimate the minutes that `count` jobs take, from those that ended last."""
        each = sum(self.seconds) / len(self.seconds) if self.seconds else FIRST_SECONDS
        return max(1, round(count * each / 60))

    def _order(self) -> None:
        """Order the waiting jobs; the running one stays first, and counts as one that its address and owner have had."""
        running = [job for job in self.jobs if job.state != "waiting"]
        waiting = sorted((job for job in self.jobs if job.state == "waiting"), key=lambda job: int(job.name))
        waiting = _in_turn(waiting, running, lambda job: job.address if job.owner == PUBLIC else job.owner)
        self.jobs = running + _in_turn(waiting, running, lambda job: job.address)


def _in_turn(waiting: list[Job], running: list[Job], whose: Callable[[Job], Hashable]) -> list[Job]:
    """Sort jobs by how many of the same `whose` come before, and otherwise keep their order."""
    had = Counter(map(whose, running))
    turn = {}
    for job in waiting:
        turn[job.name] = had[whose(job)]
        had[whose(job)] += 1
    return sorted(waiting, key=lambda job: turn[job.name])

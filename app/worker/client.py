"""The worker processes as the page sees them: lines of jobs, without threads of their own and without polling.

    async for view in workers.run(owner, steps): ...        the job after every change, at last finished

The generator is the job: leaving it in any way (its task is cancelled, the generator is closed) ends the job. A waiting job
leaves the line at once; a running one is asked to stop, and its process is killed if it does not within
`Settings.grace_seconds`. A dead process is replaced by the next job. Used from one event loop.

There are two workers, so that light jobs (a channel, the ranges of a small model) never wait behind a long one: the main worker
takes any job, the light worker takes light jobs while the main one is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence

from app.settings import Settings
from app.worker import wire
from app.worker.environment import worker_environment
from app.worker.job import Job, JobView, Step, at, out_of_memory
from core.errors import QuantscopeError, ResourceError

PUBLIC = "public"
"""Owner of jobs that the server starts for everyone; the limit per session does not hold for it."""
PER_SESSION = 2
MAX_WAITING = 64
BEAT_SECONDS = 1.0
"""A running job is shown again after this long without news, so that its clock goes on."""
EXIT_SECONDS = 2.0
log = logging.getLogger("quantscope.worker")


class Process:
    """One worker process and the stream of its messages. It starts at once; its messages are read from the first job on."""

    def __init__(self, settings: Settings) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.worker.server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=worker_environment(settings),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._closed = False
        self._inbox: asyncio.Queue[tuple | Exception] = asyncio.Queue()
        self._reading: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether a job can be sent to it."""
        return not self._closed and self.process.poll() is None

    async def send(self, *message: object) -> None:
        """Write one message. It is buffered: a worker that does not read blocks nobody."""
        if self._reading is None:
            reader, self._writer = await asyncio.open_connection(sock=self._ours)
            self._reading = asyncio.create_task(self._read(reader))
        self._writer.write(wire.frame(message))

    async def receive(self, seconds: float) -> tuple | None:
        """The next message, or None if none comes within `seconds`.

        Raises: EOFError or OSError when the process is gone; Malformed for a message that cannot be read.
        """
        try:
            async with asyncio.timeout(seconds):
                message = await self._inbox.get()
        except TimeoutError:
            return None
        if isinstance(message, Exception):
            raise message
        return message

    async def _read(self, stream: asyncio.StreamReader) -> None:
        try:
            while True:
                self._inbox.put_nowait(await wire.read(stream))
        except (EOFError, OSError, wire.Malformed) as error:  # nothing that follows could be read either
            self._inbox.put_nowait(error)

    async def exit_code(self) -> int | None:
        """How it ended, waiting a moment for the kernel: negative for a signal, None if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, EXIT_SECONDS)
        return self.process.poll()

    async def kill(self) -> None:
        """End the process and everything it started, and wait a moment until it is gone."""
        self.close()
        await self.exit_code()

    def close(self) -> None:
        """End the process and everything it started."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self._reading is None:
            self._ours.close()
            return
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and the stream with it
            self._reading.cancel()
            self._writer.close()


class Worker:
    """One worker process at a time and the line of jobs before it. `start` or the first job starts the process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.line: list[Job] = []
        self.process: Process | None = None
        self._moved = asyncio.Event()
        self._idle: asyncio.TimerHandle | None = None

    async def run(self, owner: str, steps: Sequence[Step]) -> AsyncIterator[JobView]:
        """Run a job and yield it after every change, at last with state "done".

        Raises: the job's error; ResourceError E-BUSY if this owner or the server has too many jobs.
        """
        self._admit(owner)
        if self._idle is not None:
            self._idle.cancel()
        job = Job(owner, steps)
        self.line.append(job)
        try:
            while (ahead := self.line.index(job)) > 0:
                yield job.view(ahead)
                while self.line.index(job) == ahead:
                    await self._moved.wait()
            job.start()
            yield job.view()
            async with contextlib.aclosing(self._work(job)) as changes:
                async for _ in changes:
                    yield job.view()
        finally:
            self.line.remove(job)
            self._moved.set()  # wakes those that wait now; who waits later waits for an event of his own
            self._moved = asyncio.Event()
            if not self.line and self.settings.idle_seconds:
                self._idle = asyncio.get_running_loop().call_later(self.settings.idle_seconds, self._renew)

    def _admit(self, owner: str) -> None:
        if owner != PUBLIC and sum(job.owner == owner for job in self.line) >= PER_SESSION:
            raise ResourceError("You already have one job running and one waiting. Wait for them or press Stop.", code="E-BUSY")
        if len(self.line) > MAX_WAITING:
            raise ResourceError(f"{MAX_WAITING} jobs are waiting already. Try again in a few minutes.", code="E-BUSY")

    def start(self) -> None:
        """Start the process, if none is alive: it loads its libraries, so that the next job finds it ready."""
        if self.process is None or not self.process.alive:
            self.close()
            self.process = Process(self.settings)

    def close(self) -> None:
        """End the process and everything it started."""
        if self.process is not None:
            self.process.close()

    def _renew(self) -> None:
        """Replace the process by a fresh one: what it had loaded is given back."""
        self.close()
        self.start()

    async def _work(self, job: Job) -> AsyncIterator[None]:
        """Give the process the first job of the line and apply its messages. Yields after each, and every second."""
        self.start()
        process, deadline = self.process, time.monotonic() + self.settings.job_seconds
        try:
            await process.send("job", job.name, [(s.method, s.arguments) for s in job.steps])
            while job.state == "running":
                message = await process.receive(min(BEAT_SECONDS, self.settings.job_seconds))
                if time.monotonic() > deadline:
                    raise await self._late(process)
                if message is None or job.take(message):
                    yield
        except (EOFError, OSError):
            raise await self._died(process, job.stage, await process.exit_code()) from None
        except wire.Malformed as error:
            log.error("the worker sent what cannot be read: %r", error)
            raise await self._died(process, job.stage, None) from None
        except QuantscopeError:
            if job.out_of_memory:
                await process.kill()  # it leaves by itself in a moment; the next job must not be sent to it
            raise
        except (GeneratorExit, asyncio.CancelledError):
            await self._stop(process, job)
            raise

    async def _stop(self, process: Process, job: Job) -> None:
        """Ask a job to end, and kill its process if it does not."""
        ended = False
        try:
            async with asyncio.timeout(self.settings.grace_seconds):
                await process.send("cancel", job.name)
                while not ended:
                    message = await process.receive(self.settings.grace_seconds) or ()
                    ended = message[:2] in (("failed", job.name), ("done", job.name))
        except (TimeoutError, EOFError, OSError, wire.Malformed):
            log.info("a stopped job did not end by itself: its worker is killed")
        finally:
            if not ended:
                await process.kill()

    async def _died(self, process: Process, stage: str, code: int | None) -> ResourceError:
        await process.kill()
        if code == -signal.SIGKILL:
            return out_of_memory(stage)
        return ResourceError(
            f"The worker stopped unexpectedly{at(stage)}. Your inputs are kept: try again, or a smaller model.", code="E-WORKER"
        )

    async def _late(self, process: Process) -> ResourceError:
        await process.kill()
        return ResourceError(
            f"The job took longer than {self.settings.job_seconds / 60:.0f} minutes and was stopped. "
            "Use fewer tokens or a smaller model.",
            code="E-TIME",
        )


class Workers:
    """The main worker and, where memory is enough for two, the light one."""

    def __init__(self, settings: Settings) -> None:
        light = settings.light
        self.main = Worker(settings if light is None else settings.main)
        self.light = Worker(light) if light else self.main

    def run(self, owner: str, steps: Sequence[Step], *, light: bool = False) -> AsyncIterator[JobView]:
        """Run a job as `Worker.run` does: on the main worker, but a light job on the light worker while the main one is busy."""
        return (self.light if light and self.main.line else self.main).run(owner, steps)

    def close(self) -> None:
        """End the processes."""
        self.main.close()
        self.light.close()

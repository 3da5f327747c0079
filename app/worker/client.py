"""Run jobs on the worker processes from the page: a line for each, no extra threads, no polling.

    async for view in workers.run(owner, steps): ...        the job's state after every change, last when finished

Leaving the loop in any way (its task is cancelled, the generator is closed) ends the job. A waiting job leaves the queue at
once; a running one is asked to stop, and its process is killed if it has not stopped after `Settings.grace_seconds`. The next
job replaces a dead process. All calls come from one event loop.

There are two workers, so that light jobs (a channel, the ranges of a small model) need not wait for a long one: the main worker
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

from app.door.visitor import visitor
from app.settings import Settings
from app.worker import wire
from app.worker.environment import worker_environment
from app.worker.job import Job, JobView, Step, at, out_of_memory
from app.worker.line import PUBLIC, Line
from core.errors import QuantscopeError, ResourceError

BEAT_SECONDS = 1.0
"""Seconds without news after which a running job is shown again, so that its clock advances."""
EXIT_SECONDS = 2.0
log = logging.getLogger("quantscope.worker")


class Process:
    """One worker process and its messages. It starts at once; its messages are read from the first job on."""

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
        self.heard_at: float | None = None
        self._inbox: asyncio.Queue[tuple | Exception] = asyncio.Queue()
        self._connecting: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether a job can be sent to the process."""
        return not self._closed and self.process.poll() is None

    async def send(self, *message: object) -> None:
        """Send one message. It is buffered, so the page does not wait for a worker that does not read."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        await asyncio.shield(self._connecting)  # a job that is left meanwhile would close the socket of the next one
        self._writer.write(wire.frame(message))

    async def _connect(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._ours)
        self._reading = asyncio.create_task(self._read(reader))

    async def receive(self, seconds: float) -> tuple | None:
        """Return the next message, or None if none comes within `seconds`.

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
                message = await wire.read(stream)
                self.heard_at = time.monotonic()
                if message != ("beat",):
                    self._inbox.put_nowait(message)
        except (EOFError, OSError, wire.Malformed) as error:  # what follows could not be read either
            self._inbox.put_nowait(error)

    async def exit_code(self) -> int | None:
        """Return the exit code, after at most EXIT_SECONDS: negative for a signal, None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, EXIT_SECONDS)
        return self.process.poll()

    async def kill(self) -> None:
        """End the process and everything it started, and wait up to EXIT_SECONDS for its exit."""
        self.close()
        await self.exit_code()

    def close(self) -> None:
        """End the process and everything it started."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and the stream with it
            if self._reading is None:
                if self._connecting is not None:
                    self._connecting.cancel()
                self._ours.close()
                return
            self._reading.cancel()
            self._writer.close()


class Worker:
    """A queue of jobs and the process that runs them, one at a time. `start` or the first job starts the process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.line = Line()
        self.process: Process | None = None
        self._moved = asyncio.Event()

    async def run(self, owner: str, steps: Sequence[Step]) -> AsyncIterator[JobView]:
        """Run a job and yield it after every change, at last with state "done".

        Raises: the job's error; ResourceError E-BUSY if this owner or the server has too many jobs.
        """
        job = Job(owner, steps, visitor().address)
        self.line.add(job)
        self._move()
        try:
            while (ahead := self.line.ahead(job)) > 0:
                yield job.view(ahead)
                while self.line.ahead(job) == ahead:
                    await self._moved.wait()
            job.start()
            yield job.view()
            async with contextlib.aclosing(self._work(job)) as changes:
                async for _ in changes:
                    yield job.view()
        finally:
            self.line.remove(job)
            self._move()

    def _move(self) -> None:
        """Wake all that wait, as their places may have changed; later ones wait for the new event."""
        self._moved.set()
        self._moved = asyncio.Event()

    def start(self) -> None:
        """Start the process, if none is alive: it loads its libraries, so that the next job finds it ready."""
        if self.process is None or not self.process.alive:
            self.close()
            self.process = Process(self.settings)

    def close(self) -> None:
        """End the process and everything it started."""
        if self.process is not None:
            self.process.close()

    async def _work(self, job: Job) -> AsyncIterator[None]:
        """Send the first job of the queue to the process and apply its messages. Yields after each, and every second."""
        self.start()
        process, deadline = self.process, time.monotonic() + self.settings.job_seconds
        changed_at = time.monotonic()
        process.heard_at = process.heard_at and changed_at  # a process that is still starting gives no sign of life
        pause = min(BEAT_SECONDS, self.settings.job_seconds, self.settings.silent_seconds, self.settings.step_seconds)
        try:
            await process.send("job", job.name, [(s.method, s.arguments) for s in job.steps])
            while job.state == "running":
                message = await process.receive(pause)
                now = time.monotonic()
                if now > deadline:
                    raise await self._late(process)
                if message is not None and job.take(message):
                    changed_at = now
                    yield
                elif message is None:
                    await self._check_alive(process, job.stage, now - (process.heard_at or now), now - changed_at)
                    yield
        except (EOFError, OSError):
            raise await self._died(process, job.stage, await process.exit_code()) from None
        except wire.Malformed as error:
            log.error("the worker sent what cannot be read: %r", error)
            raise await self._died(process, job.stage, None) from None
        except QuantscopeError:
            if job.out_of_memory:
                await process.kill()  # it exits soon by itself, but must not get the next job
            raise
        except (GeneratorExit, asyncio.CancelledError):
            await asyncio.create_task(self._stop(process, job))  # timeouts in a cancelled task fail before Python 3.11.3
            raise

    async def _stop(self, process: Process, job: Job) -> None:
        """Ask a job to end, and kill its process if it does not; one that is still importing ends the job before its start."""
        ended = False
        try:
            async with asyncio.timeout(self.settings.grace_seconds):
                await process.send("cancel", job.name)
                while not ended:
                    message = await process.receive(self.settings.grace_seconds) or ()
                    ended = message[:2] in (("failed", job.name), ("done", job.name))
        except TimeoutError:
            ended = process.heard_at is None
        except (EOFError, OSError, wire.Malformed) as error:
            log.info("the worker of a stopped job is gone: %r", error)
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

    async def _check_alive(self, process: Process, stage: str, silent: float, unchanged: float) -> None:
        """End a process that hangs. Raises: ResourceError E-TIME."""
        if silent <= self.settings.silent_seconds and unchanged <= self.settings.step_seconds:
            return
        await process.kill()
        raise ResourceError(
            f"The job hung{at(stage)}: no sign of progress for {max(silent, unchanged):.0f} seconds, so it was stopped. "
            "Try again, or another model.",
            code="E-TIME",
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
        return (self.light if light and len(self.main.line) else self.main).run(owner, steps)

    async def forget(self, owners: Sequence[str]) -> None:
        """Drop what is the owners' own from the memory of both processes and from the cache. Raises: the job's error."""
        steps = [Step("forget", {"owner": owner}) for owner in owners]
        light = self.light is not self.main and self.light.process is not None and self.light.process.alive
        for worker in (self.main, self.light) if light else (self.main,):
            async for _ in worker.run(PUBLIC, steps):
                pass

    def close(self) -> None:
        """End both processes."""
        self.main.close()
        self.light.close()

"""The worker process: it owns core's workbench and all models, and does one job at a time.

It is started as `python -m app.worker.server FD` by `app.worker.client`; FD is its end of a socket pair. When the other end
closes, it exits. Any exception of a job, `SystemExit` included, becomes a reply: only the kernel or native code can end it early.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import queue
import resource
import sys
import threading
import time
import traceback
import uuid
from multiprocessing.connection import Connection
from typing import Any

from app.view import texts
from app.worker import wire
from core.errors import Cancelled, QuantscopeError
from core.memory import give_back, is_out_of_memory

METHODS = {
    "load",
    "observe",
    "bases",
    "channel",
    "estimate",
    "quantize",
    "forget",
    "open_saved",
    "evaluate",
    "tokens",
    "moved",
    "probe",
    "predict",
    "measure",
    "swap",
    "allocate",
    "smallest_g",
    "curve",
    "calibrations",
    "generate",
    "speed_limit",
    "sparsity",
    "weight_histogram",
    "input_histogram",
}
STREAMING = {"generate"}
EVERY_SECONDS = 0.05
BEAT_SECONDS = 1.0
"""Seconds between two signs of life during a job. A step that keeps Python's lock, as a hung library does, sends none."""
MEMORY_CODE = "E-MEM"
log = logging.getLogger("quantscope.worker")


class Worker:
    """A loop that reads jobs from the socket, runs their steps on the workbench, and sends progress and results back."""

    def __init__(self, connection: Connection, workbench: str, options: dict[str, Any], *, rest_seconds: float) -> None:
        """Store the connection and `workbench`, "module:factory", which is called with `options` as keywords.

        Args:
            rest_seconds: time without a job after which memory is given back.
        """
        self.connection, self.workbench, self.options = connection, workbench, options
        self.rest_seconds = rest_seconds
        self.bench: Any = None
        self.jobs: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.cancelled: set[str] = set()
        self.sending = threading.Lock()
        self.working = False

    def run(self) -> None:
        """Run jobs until the page's end of the socket closes."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        self._warm()
        self._send("ready")
        while True:
            _, job, steps = self._next()
            self.working = True
            self._job(job, steps)
            self.working = False

    def _next(self) -> tuple:
        """Wait for the next job; when none comes for `rest_seconds`, give memory back meanwhile."""
        try:
            return self.jobs.get(timeout=self.rest_seconds)
        except queue.Empty:
            if self.bench is not None:
                self.bench.rest()
            gc.collect()
            give_back()
            return self.jobs.get()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            if self.working:
                self._send("beat")

    def _read(self) -> None:
        while True:
            try:
                message = wire.receive(self.connection)
            except (EOFError, OSError):
                os._exit(0)  # the server is gone: exit at once, even inside native code
            except Exception:  # noqa: BLE001 - process boundary: the page must not wait for an answer that never comes
                log.exception("the page sent what cannot be read")
                os._exit(1)
            if message[0] == "cancel":
                self.cancelled.add(message[1])
            else:
                self.jobs.put(message)

    def _warm(self) -> None:
        """Import the heavy libraries before the first job needs them; if that fails, the first job reports it."""
        try:
            self._ensure_bench()
        except BaseException:  # noqa: BLE001 - process boundary: only the page may end the worker
            log.exception("the workbench could not be built")

    def _ensure_bench(self) -> Any:
        if self.bench is None:
            module, _, name = self.workbench.partition(":")
            self.bench = getattr(importlib.import_module(module), name)(**self.options)
        return self.bench

    def _job(self, job: str, steps: list[tuple[str, dict]]) -> None:
        try:
            for index, (method, arguments) in enumerate(steps):
                self._send("result", job, index, self._step(job, index, method, arguments))
            self._send("done", job)
        except QuantscopeError as error:
            self._send("failed", job, error.code, str(error))
        except BaseException as error:  # noqa: BLE001 - process boundary: every fault becomes a reply
            self._fault(job, error)
        finally:
            self.cancelled.discard(job)

    def _step(self, job: str, index: int, method: str, arguments: dict) -> Any:
        if method not in METHODS:
            raise QuantscopeError("This job is not known to the worker; reload the page.")
        relay = _Relay(self, job, index)
        relay.check()
        if method in STREAMING:
            arguments = {**arguments, "on_text": relay.text}
        result = getattr(self._ensure_bench(), method)(**arguments, progress=relay.progress)
        relay.flush()
        return result

    def _fault(self, job: str, error: BaseException) -> None:
        if is_out_of_memory(error):
            self._send("failed", job, MEMORY_CODE, "")
            os._exit(0)  # half-allocated memory is in an unknown state: the page starts a fresh worker
        name = uuid.uuid4().hex[:6]
        log.error("fault %s in a job\n%s", name, "".join(traceback.format_exception(error)))
        self._send("failed", job, "E-BUG", texts.BUG.format(name))

    def _send(self, *message: object) -> None:
        with self.sending:
            wire.send(self.connection, message)


class _Relay:
    """Sender of one step's progress and text, at most one message per `EVERY_SECONDS`; it raises Cancelled after a cancel."""

    def __init__(self, worker: Worker, job: str, index: int) -> None:
        self.worker, self.job, self.index = worker, job, index
        self.sent_at = 0.0
        self.pending = ""

    def check(self) -> None:
        if self.job in self.worker.cancelled:
            raise Cancelled()

    def progress(self, stage: str, fraction: float | None = None) -> None:
        self.check()
        now = time.monotonic()
        if now - self.sent_at >= EVERY_SECONDS or fraction == 1.0:
            self.sent_at = now
            self.worker._send("progress", self.job, self.index, str(stage)[:200], fraction)

    def text(self, chunk: str) -> None:
        self.pending += chunk
        if time.monotonic() - self.sent_at >= EVERY_SECONDS:
            self.flush()
        self.check()

    def flush(self) -> None:
        if self.pending:
            self.sent_at = time.monotonic()
            self.worker._send("text", self.job, self.index, self.pending)
            self.pending = ""


def limit(memory_bytes: int | None, nice: int) -> None:
    """Limit this process: its priority, its address space, no core dumps, and first to be killed when memory runs out."""
    os.nice(nice)
    try:
        with open("/proc/self/oom_score_adj", "w") as handle:
            handle.write("900")
    except OSError:
        log.info("the memory killer's preference could not be set here")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def main() -> None:
    """Run the worker: `python -m app.worker.server FD`, with choices from the variables of `app.worker.environment`."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    limit(int(os.environ["QUANTSCOPE_LIMIT_BYTES"]) or None, int(os.environ["QUANTSCOPE_NICE"]))
    options = {
        "allow_local": os.environ["QUANTSCOPE_ALLOW_LOCAL"] == "1",
        "device": os.environ["QUANTSCOPE_DEVICE"],
        "max_bytes": int(os.environ["QUANTSCOPE_MODEL_BYTES"]),
    }
    rest_seconds = float(os.environ["QUANTSCOPE_REST_SECONDS"])
    Worker(Connection(int(sys.argv[1])), os.environ["QUANTSCOPE_WORKBENCH"], options, rest_seconds=rest_seconds).run()


if __name__ == "__main__":
    main()

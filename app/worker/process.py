"""Starting, hearing and killing one worker process."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection

from app.settings import ROOT, Settings
from app.worker import wire

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|COOKIE|PRIVATE|API_?KEY|ACCESS_KEY|AUTH", re.IGNORECASE)
SEND_SECONDS = 10
EXIT_SECONDS = 2.0
TERM_SECONDS = 0.3
log = logging.getLogger("quantscope.process")


def worker_environment(settings: Settings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The worker's environment: the server's without anything that looks like a secret, plus its own choices."""
    kept = {name: value for name, value in environment.items() if not SECRET.search(name)}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    kept.pop("OMP_NUM_THREADS", None)
    kept.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # spinning threads take the core the page needs: 2 to 3 times slower when shared
    threads = {"OMP_NUM_THREADS": settings.worker_threads} if settings.worker_threads else {}
    return {
        **kept,
        **threads,
        "PYTHONPATH": path,
        "QUANTSCOPE_WORKBENCH": settings.workbench,
        "QUANTSCOPE_DEVICE": settings.device,
        "QUANTSCOPE_LIMIT_BYTES": str(settings.memory_bytes or 0),
        "QUANTSCOPE_ALLOW_LOCAL": "0" if settings.on_space else "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "2",
    }


class WorkerProcess:
    """A running worker. Messages are read by a thread of their own, so a worker that stops in mid-message blocks nobody."""

    def __init__(self, settings: Settings) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "app.worker.server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=worker_environment(settings),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        self.connection = Connection(ours.detach())
        self.inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        try:
            while True:
                self.inbox.put(wire.receive(self.connection))
        except pickle.UnpicklingError:
            log.exception("the worker sent what may not cross the pipe")
            self.inbox.put(("gone",))
        except (EOFError, OSError):
            self.inbox.put(("gone",))

    def send(self, *message: object) -> bool:
        """Write one message; False if the worker does not take it."""
        try:
            wire.send(self.connection, message)
        except OSError:
            return False
        return True

    def receive(self, seconds: float) -> tuple | None:
        """The next message, or None if none comes in time. ("gone",) means the worker closed its end."""
        try:
            return self.inbox.get(timeout=seconds)
        except queue.Empty:
            return None

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def exit_code(self) -> int | None:
        """How it ended, waiting a moment for the kernel; negative for a signal, None if it still runs."""
        try:
            return self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it and everything it started: politely for `TERM_SECONDS`, then for certain."""
        for sign, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, EXIT_SECONDS)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
                break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # children that outlived it
        self.reader.join(1.0)
        with contextlib.suppress(OSError):
            self.connection.close()

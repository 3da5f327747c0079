"""What sessions share: reports of public models and texts, and what follows from them, each made once.

A result in the making has one task, and everyone who wants it waits for that task. The task is cancelled when nobody waits any
more. If it fails, all who wait get its error, and the next request for its key starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Any

from app.worker.job import JobView

CAPACITY = {"ranges": 24, "bases": 8}
OTHERS = 512
"""Reports kept of each other kind; ranges of a large model take some 10 MB in each basis, any other report a few kilobytes."""

DERIVED_BYTES = 48 * 1024**2
OBJECT_BYTES = 32 * 1024
"""Guess of the memory of anything but text."""


class Derived:
    """What was computed from reports: kept as long as its report lives, and the most recently used of at most `most` bytes.

    Sessions that show one report share it; what was computed from a private report ends with it.
    """

    def __init__(self, most: int = DERIVED_BYTES) -> None:
        self.most, self.bytes = most, 0
        self._kept: OrderedDict[tuple[int, Hashable], tuple[Any, int]] = OrderedDict()
        self._reports: set[int] = set()
        self._lock = threading.RLock()  # a report may end while the lock is held

    def get(self, report: Any, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` computes from a report, called if nothing is kept under this key. Nobody may change it."""
        name = (id(report), key)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name][0]
        made = make()
        size = OBJECT_BYTES + sum(len(v) for v in made.values() if isinstance(v, str)) if isinstance(made, dict) else OBJECT_BYTES
        with self._lock:
            if id(report) not in self._reports:
                self._reports.add(id(report))
                weakref.finalize(report, self._end, id(report)).atexit = False
            self._drop(name)
            self._kept[name] = made, size
            self.bytes += size
            while self.bytes > self.most:
                self._drop(next(iter(self._kept)))
        return made

    def _drop(self, name: tuple[int, Hashable]) -> None:
        self.bytes -= self._kept.pop(name, (None, 0))[1]

    def _end(self, report: int) -> None:
        with self._lock:
            self._reports.discard(report)
            for name in [name for name in self._kept if name[0] == report]:
                self._drop(name)


class Shared:
    """Reports by key, of each kind the most recently used. A key is a tuple that begins with its kind."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[tuple, Any]] = {}
        self._making: dict[tuple, _Making] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple) -> Any:
        """Return the report of that key, or None."""
        with self._lock:
            kept = self._kept.get(key[0], OrderedDict())
            if key in kept:
                kept.move_to_end(key)
            return kept.get(key)

    def put(self, key: tuple, report: Any) -> None:
        """Keep a report for everyone. The caller has checked that it holds nothing private."""
        with self._lock:
            kept = self._kept.setdefault(key[0], OrderedDict())
            kept[key] = report
            kept.move_to_end(key)
            while len(kept) > CAPACITY.get(key[0], OTHERS):
                kept.popitem(last=False)

    async def follow(self, key: tuple, make: Callable[[], AsyncIterator[JobView]]) -> AsyncIterator[JobView]:
        """Yield the state of the job that makes a result, until it is done; the last state has the results.

        Args:
            make: starts the job; called if the result is neither kept nor in the making.
        Raises: the job's error.
        """
        if (results := self.get(key)) is not None:
            yield JobView("done", fraction=1.0, results=results)
            return
        making = self._making.get(key)
        if making is None:
            making = self._making[key] = _Making(make())
            making.task.add_done_callback(lambda task: self._made(key, task))
        making.waiting += 1
        try:
            while not making.task.done():
                news = making.news
                if making.view is not None:
                    yield making.view
                await news.wait()
            yield making.task.result()
        finally:
            making.waiting -= 1
            if not making.waiting and making.task.cancel() and self._making.get(key) is making:
                del self._making[key]  # later callers must not join a task that is ending

    def _made(self, key: tuple, task: asyncio.Task[JobView]) -> None:
        making = self._making.get(key)
        if making is not None and making.task is task:
            del self._making[key]
        if not task.cancelled() and task.exception() is None:
            self.put(key, task.result().results)


class _Making:
    """A result in the making: its task, the job's last state, how many wait for it, and an event set at its next change."""

    def __init__(self, views: AsyncIterator[JobView]) -> None:
        self.view: JobView | None = None
        self.news = asyncio.Event()
        self.waiting = 0
        self.task = asyncio.create_task(self._make(views))
        self.task.add_done_callback(lambda _: self._tell())

    async def _make(self, views: AsyncIterator[JobView]) -> JobView:
        async with contextlib.aclosing(views):
            async for self.view in views:
                self._tell()
        return self.view

    def _tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

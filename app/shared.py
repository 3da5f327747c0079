"""Results that are the same for everyone: reports of public models and texts, kept or in the making, each made once.

One key, one task: who wants a result that is being made waits for the task that makes it. The task ends when nobody waits for it
any more. A task that fails tells its error to all who wait, and its key is forgotten, so that the next one tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Any

from app.worker.job import JobView

CAPACITY = {"ranges": 24}
OTHERS = 512
"""Reports kept of each kind; ranges of a large model take some 10 MB, any other report a few kilobytes."""


class Shared:
    """Reports by key, the least recently used of each kind go first. A key is a tuple that begins with its kind."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[tuple, Any]] = {}
        self._making: dict[tuple, _Making] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple) -> Any:
        """The report of that key, or None."""
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
        """Yield how the job that makes a result stands until it is done; the last one holds the results.

        Args:
            make: starts the job, called if nobody has made the result or is making it.
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
                del self._making[key]  # a task that is ending is not joined by those who come now

    def _made(self, key: tuple, task: asyncio.Task[JobView]) -> None:
        making = self._making.get(key)
        if making is not None and making.task is task:
            del self._making[key]
        if not task.cancelled() and task.exception() is None:
            self.put(key, task.result().results)


class _Making:
    """A result in the making: its task, how it stands, how many wait for it, and an event that is set at its next change."""

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

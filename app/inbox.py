"""Hold the updates of one page of a session until the page fetches them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any


class Inbox:
    """Updates that one page has not fetched yet; for each component only the newest is kept."""

    def __init__(self) -> None:
        self.updates: dict[Any, Any] = {}
        self.arrived = asyncio.Event()
        self.made_at = time.monotonic()

    def put(self, updates: dict[Any, Any]) -> None:
        """Add updates and wake the page's request."""
        self.updates.update(updates)
        if self.updates:
            self.arrived.set()

    async def take(self, seconds: float) -> dict[Any, Any]:
        """Return and remove all updates, waiting up to `seconds` for the first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.arrived.wait()
        taken, self.updates = self.updates, {}
        self.arrived.clear()
        return taken

"""Keep the log short under attack: refusals are counted and told once a minute, repeated lines dropped."""

from __future__ import annotations

import logging
import time
from collections import Counter

EVERY_SECONDS = 60.0
MOST_LINES = 20
"""Lines of one kind that are written per minute."""
log = logging.getLogger("quantscope.door")


class Tally:
    """Counts of refusals by reason, logged in one line per `EVERY_SECONDS`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.logged_at = float("-inf")

    def add(self, reason: str) -> None:
        """Count one refusal."""
        self.counts[reason] += 1
        now = time.monotonic()
        if now - self.logged_at >= EVERY_SECONDS:
            self.logged_at = now
            log.warning("%s", "; ".join(f"{count} {what}" for what, count in self.counts.most_common(8)))
            self.counts.clear()


told = Tally().add
"""Count a refusal for the log. The reasons are a few fixed texts: nothing of a request is written."""


class LineLimit(logging.Filter):
    """A filter of log handlers that passes `MOST_LINES` lines of each kind per minute; a kind is a logger and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.started_at = float("-inf")
        self.lines: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a line is written."""
        now = time.monotonic()
        if now - self.started_at >= EVERY_SECONDS:
            self.started_at = now
            self.lines.clear()
        kind = (record.name, str(record.msg)[:80])
        self.lines[kind] += 1
        if len(self.lines) > 1000:
            self.lines.clear()
        if self.lines[kind] == MOST_LINES:
            record.msg = f"{record.msg} (more lines like this are not written for a minute)"
        return self.lines[kind] <= MOST_LINES


def limit_lines() -> None:
    """Limit the lines of every handler that logging has now."""
    names = list(logging.root.manager.loggerDict)
    handlers = {h for logger in [logging.root, *map(logging.getLogger, names)] for h in logger.handlers}
    for handler in handlers:
        if not any(isinstance(f, LineLimit) for f in handler.filters):
            handler.addFilter(LineLimit())

"""Progress callbacks: given a sentence and the share done, 0 to 1 or None; raising stops the work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None], None]


def silent(stage: str, fraction: float | None = None) -> None:
    """Ignore a report of progress."""


def part(progress: Progress, start: float, end: float) -> Progress:
    """Return a callback for a part of longer work: its shares from 0 to 1 become shares from `start` to `end` of the whole."""

    def scaled(stage: str, fraction: float | None = None) -> None:
        progress(stage, None if fraction is None else start + (end - start) * fraction)

    return scaled

"""Progress callbacks, and the time that remains by their pace.

A callback is given a sentence and the share done, 0 to 1 or None; raising stops the work.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_SHARE, FIRST_SECONDS = 0.1, 3.0
"""Share of the work and seconds that must have passed before a remaining time is shown."""
RECENT = 0.7
"""Last part of the elapsed time over which the pace is measured: long enough that one slow layer does not decide."""

Progress = Callable[[str, float | None], None]


def silent(stage: str, fraction: float | None = None) -> None:
    """Ignore a report of progress."""


def part(progress: Progress, start: float, end: float) -> Progress:
    """Return a callback for a part of longer work: its shares from 0 to 1 become shares from `start` to `end` of the whole."""

    def scaled(stage: str, fraction: float | None = None) -> None:
        progress(stage, None if fraction is None else start + (end - start) * fraction)

    return scaled


class Pace:
    """Estimate of the remaining time of work from the shares it has reported, by the pace of the last `RECENT` of its time.

    remaining = (1 - share) / pace at the last report, minus the time since; but at least half of the estimate that assumes no
    progress since that report, so that work that has slowed down never seems finished. The clock starts at the last report
    before any progress: the time before it (imports, reading the text) is not typical of the rest.

    Where the seconds of the whole were `expected` before it began, they are shown at once; the pace counts as much as is done.
    """

    def __init__(self, expected: float | None = None) -> None:
        self.expected = expected
        self._reports: list[tuple[float, float]] = []

    def report(self, seconds: float, share: float) -> None:
        """Record that `share` (0 to 1) was done at time `seconds`. A share without progress is ignored."""
        if len(self._reports) <= 1 and (not self._reports or share <= self._reports[0][1]):
            self._reports = [(seconds, share)]
        elif share > self._reports[-1][1]:
            self._reports.append((seconds, share))

    def remaining(self, seconds: float) -> float | None:
        """Estimate the remaining seconds at time `seconds`; None while too little is known."""
        found = self._by_pace(seconds)
        if self.expected is None or not self._reports:
            return found
        last, share = self._reports[-1]
        left = (1 - share) * self.expected
        told = max(left - (seconds - last), left / 2)
        return told if found is None else share * found + (1 - share) * told

    def _by_pace(self, seconds: float) -> float | None:
        if len(self._reports) < 2:
            return None
        (start, first), (last, share) = self._reports[0], self._reports[-1]
        if share < first + FIRST_SHARE * (1 - first) or seconds < start + FIRST_SECONDS:
            return None
        horizon = start + (1 - RECENT) * (last - start)
        since, before = next(report for report in reversed(self._reports[:-1]) if report[0] <= horizon)
        left = (1 - share) / (share - before)
        return max(left * (last - since) - (seconds - last), left * (seconds - since) / 2)

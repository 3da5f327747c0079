"""How long work tells how far it is: a sentence, and a share from 0 to 1 where it is known. What the callback raises stops the
work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None], None]


def silent(stage: str, fraction: float | None = None) -> None:
    """A progress callback that shows nothing."""

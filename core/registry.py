"""A table of named things, whose error for an unknown name suggests the closest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from core.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to an entry; an unknown name raises `InputError` with the closest known one."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add `entry` under `name`. Raises: ValueError on a duplicate, which is a programming error."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def get(self, name: str) -> T:
        """Return the entry called `name`. Raises: InputError naming the known ones."""
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(
            f"Unknown {self.kind} {str(name)[:60]!r}: use one of {', '.join(self._entries)}.{hint}",
            code=f"E-PARAM-{self.kind.upper().replace(' ', '-')}",
        )

    def names(self) -> list[str]:
        """Return the registered names in registration order."""
        return list(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

"""Keep windows, probes and statistics of the models and texts used last, within some bytes."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

STORE_BYTES = 2**31
"""A probe of SmolLM2-135M (512 tokens) takes 0.9 GiB, its statistics 0.5 GiB."""
IN_USE = 4
"""What one prediction needs is never dropped for want of bytes: two texts, a probe and statistics."""


class Sized(Protocol):
    """What can be kept: it knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""


Kept = TypeVar("Kept", bound=Sized)


@dataclass(frozen=True)
class Cut:
    """A text cut into windows [S, T] int64, and its name."""

    windows: Tensor
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of the windows."""
        return self.windows.nbytes


class ProbeStore:
    """What was made from models and texts, `max_bytes` in all: the least recently used goes first; what a model gave, with it."""

    def __init__(self, max_bytes: int = STORE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[Hashable, ...], Sized] = OrderedDict()

    def get(self, model: nn.Module, what: Hashable, owner: str | None, make: Callable[[], Kept]) -> Kept:
        """Return what is kept, or what `make` gives, which is kept from then on.

        Args:
            what: everything that it depends on beside the model.
            owner: tag of the one whose private text it was made from; None for a text that is the same for everybody.
        """
        for gone in [key for key in self._kept if key[0]() is None]:
            del self._kept[gone]
        key = (weakref.ref(model), owner, what)
        if key not in self._kept:
            self._kept[key] = make()
        self._kept.move_to_end(key)
        while len(self._kept) > IN_USE and self.nbytes > self.max_bytes:
            self._kept.popitem(last=False)
        return self._kept[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(kept.nbytes for kept in self._kept.values())

    def forget(self, owner: str) -> None:
        """Remove what was made from the private texts of an owner, named by tag."""
        for key in [key for key in self._kept if key[1] == owner]:
            del self._kept[key]

    def clear(self) -> None:
        """Remove everything."""
        self._kept.clear()

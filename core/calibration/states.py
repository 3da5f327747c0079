"""Keep hidden states of recent passes over a text, so that a later look at one layer need not compute all layers before it.

A pass over layers 0 … L − 1 offers what enters each of them; kept are those of every k-th layer, k as small as the budget allows:

    k = ceil(L · bytes of one layer's input / budget)        a look at layer i then computes i mod k layers, and the one it wants

They are kept in the model's own type, so the look gives the same numbers, bit for bit, as a pass from the start.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

KEPT_BYTES = 128 * 2**20
"""30 layers of 1,024 tokens by 576 channels in float32 are 68 MiB."""


class KeptStates:
    """Hidden states of the models and texts used last, `max_bytes` in all; the oldest go first, and those of a model with it."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._passes: OrderedDict[tuple[weakref.ref[nn.Module], bytes], Pass] = OrderedDict()

    def of(self, model: nn.Module, windows: Tensor, layers: int) -> Pass:
        """Find or begin the pass of a model with that many layers on windows [S, T] int64."""
        for gone in [key for key in self._passes if key[0]() is None]:
            del self._passes[gone]
        text = hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.cpu().numpy().tobytes()).digest()
        key = (weakref.ref(model), text)
        self._passes[key] = self._passes.pop(key, None) or Pass(self, layers)
        return self._passes[key]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of all passes."""
        return sum(known.nbytes for known in self._passes.values())

    def trim(self, current: Pass) -> None:
        """Drop the oldest passes but `current` until the budget holds."""
        while self.nbytes > self.max_bytes:
            del self._passes[next(key for key, known in self._passes.items() if known is not current)]


class Pass:
    """One model's hidden states on one text, by the layer that they enter: a tensor [B, T, D] for each batch of windows."""

    def __init__(self, store: KeptStates, layers: int) -> None:
        self.store, self.layers = store, layers
        self.kept: dict[int, list[Tensor]] = {}

    def keep(self, layer: int, hidden: Sequence[Tensor]) -> None:
        """Keep what enters a layer if it is one of every k. The tensors must not be changed afterwards."""
        every = -(-self.layers * sum(h.nbytes for h in hidden) // self.store.max_bytes)
        if layer % every == 0 and layer > 0:  # what enters the first layer is a look-up in a table
            self.kept[layer] = list(hidden)
            self.store.trim(self)

    def nearest(self, layer: int) -> tuple[int, list[Tensor]] | None:
        """Find the last layer up to `layer` whose input is kept: its index and that input; None if there is none."""
        known = max((index for index in self.kept if index <= layer), default=None)
        return None if known is None else (known, self.kept[known])

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(h.nbytes for hidden in self.kept.values() for h in hidden)

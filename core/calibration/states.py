"""Keep hidden states of recent passes over a text: measuring one layer later need not start at the first.

A pass over layers 0 … L − 1 offers the input of each. Every k-th is kept, with k as small as the budget allows:

    k = ceil(L · bytes of one layer's input / budget)        layer i then takes i mod k layers before it, and itself

States are kept in the model's own type, so results are the same, bit for bit, as those of a pass from the start.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

KEPT_BYTES = 128 * 2**20
"""Enough for all layers of a small model: 30 layers of 1,024 tokens by 576 channels in float32 are 68 MiB."""


class KeptStates:
    """Hidden states of the models and texts used last, `max_bytes` in all; the oldest are dropped first."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._passes: OrderedDict[tuple[weakref.ref[nn.Module], bytes], Pass] = OrderedDict()

    def of(self, model: nn.Module, windows: Tensor, layers: int) -> Pass:
        """Find the pass of a model of so many `layers` on windows [S, T] int64, or begin one."""
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
        """Keep the input of a layer if it is one of every k. The tensors must not be changed afterwards."""
        every = -(-self.layers * sum(h.nbytes for h in hidden) // self.store.max_bytes)
        if layer % every == 0 and layer > 0:  # the first layer's is cheap: a table look-up
            self.kept[layer] = list(hidden)
            self.store.trim(self)

    def nearest(self, layer: int) -> tuple[int, list[Tensor]] | None:
        """Find the last layer up to `layer` whose input is kept: (its index, its input), or None."""
        known = max((index for index in self.kept if index <= layer), default=None)
        return None if known is None else (known, self.kept[known])

    @property
    def nbytes(self) -> int:
        """Bytes kept of this pass."""
        return sum(h.nbytes for hidden in self.kept.values() for h in hidden)

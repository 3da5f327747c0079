"""The KV cache: keys and values as packed low-bit codes, or floats where they are not quantised.

Packed keys and values are quantised as they arrive, after the rotation, by the grid of their layer (`kv_grid`). Slots grow by
doubling, so appending a token copies nothing else. Reading dequantises what the attention needs; a single new token attends to
the codes as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.checks import FLOAT_BITS
from core.quant.attention import attend
from core.quant.kv_grid import KVGrid, StaticGrid
from kernels import packed_width
from kernels.kv import PackedHeads


class PackedStates:
    """Store keys or values of one layer, [B, Hkv, S, E]: packed codes in slots, and the first tokens as their grid has them."""

    def __init__(self, grid: KVGrid) -> None:
        self.grid = grid
        self.length = self.dim = 0
        self.first: tuple[Tensor, ...] = ()  # of `grid.store_first`
        self.packed: Tensor | None = None  # [B, Hkv, slots, packed_width(E, bits)] uint8
        self.row_scale: Tensor | None = None  # of a `RowGrid`: [B, Hkv, slots, 1] float16
        self.cursor: tuple[Tensor, Tensor] | None = None  # where the next token goes and the slots filled then, on the device
        self._heads: PackedHeads | None = None  # of `heads`, until a tensor is replaced

    def append(self, states: Tensor) -> Tensor:
        """Quantise and store [B, Hkv, t, E]; returns all states so far, dequantised: [B, Hkv, S, E]."""
        begins = self.length == 0
        self.store(states)
        return self.grid.fake(states, 0) if begins else self.read()

    def store(self, states: Tensor) -> tuple[PackedHeads, int | Tensor]:
        """Quantise and store [B, Hkv, t, E] without reading anything back; returns the store and its filled slots."""
        from kernels import kv_append

        if self.length < self.grid.first_tokens:
            made = self.grid.store_first(states[:, :, : self.grid.first_tokens - self.length])
            self.first = tuple(torch.cat(pair, dim=2) for pair in zip(self.first, made, strict=True)) if self.first else made
            self._heads = None
        self.dim = states.shape[-1]
        apart = max(0, self.grid.apart - self.length)
        start, slots = self.length + apart - self.grid.apart, self.length + states.shape[2] - self.grid.apart
        self._reserve(states, slots)
        heads = self.heads()
        if self.cursor is not None:
            kv_append(states, heads, self.cursor[0])
            return heads, self.cursor[1]
        kv_append(states[:, :, apart:] if apart else states, heads, start)
        self.length += states.shape[2]
        return heads, slots

    def pin(self, room: int, ends: Tensor) -> None:
        """Make room and take the places of new tokens from device tensors: see `KVCache.pin`."""
        filled = self.length - self.grid.apart
        self._reserve(self.packed, filled + room)
        place = 1 - self.grid.apart
        self.cursor = (ends[place : place + 1], ends[place + 1 : place + 2])

    def heads(self) -> PackedHeads:
        """Describe what is stored as kernels take it."""
        if self._heads is None:
            static = self.grid.quantizer.head_grid(self.packed.shape[1]) if isinstance(self.grid, StaticGrid) else (None, None)
            first = self.grid.read_first(self.first, self.dim) if self.first else None
            self._heads = PackedHeads(self.packed, self.grid.bits, self.dim, *static, self.row_scale, first)
        return self._heads

    def read(self) -> Tensor:
        """Dequantise all states: [B, Hkv, S, E] float32."""
        return self.heads().states(self.length - self.grid.apart)

    @property
    def nbytes(self) -> int:
        """Bytes of stored states: codes and scales of the filled slots, and the first tokens."""
        filled = max(0, self.length - self.grid.apart)
        slots = [t[:, :, :filled] for t in (self.packed, self.row_scale) if t is not None]
        return sum(t.numel() * t.element_size() for t in (*slots, *self.first))

    def select(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch."""
        if self.packed is not None:
            self.packed = self.packed.index_select(0, rows)
        if self.row_scale is not None:
            self.row_scale = self.row_scale.index_select(0, rows)
        self.first, self._heads = tuple(t.index_select(0, rows) for t in self.first), None

    def _reserve(self, like: Tensor, slots: int) -> None:
        """Make room for `slots` slots; it doubles when it runs out."""
        held = 0 if self.packed is None else self.packed.shape[2]
        if self.packed is not None and held >= slots:
            return

        def grown(old: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
            new = like.new_empty(*like.shape[:2], max(slots, 2 * held), width, dtype=dtype)
            if held:
                new[:, :, :held] = old
            return new

        self._heads = None
        self.packed = grown(self.packed, packed_width(self.dim, self.grid.bits), torch.uint8)
        if not isinstance(self.grid, StaticGrid):
            self.row_scale = grown(self.row_scale, 1, torch.float16)


class FloatKVLayer:
    """Store keys and values of one layer in their own float type; a grid given for one of the two is applied before."""

    packed = pinned = False

    def __init__(self, keys: KVGrid | None = None, values: KVGrid | None = None) -> None:
        self.length, self.grids = 0, (keys, values)
        self._slots: Tensor | None = None  # [2, B, Hkv, slots, E]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, Hkv, t, E]; returns all stored ones, [B, Hkv, S, E], which later calls may overwrite."""
        stop = self.length + keys.shape[2]
        held = 0 if self._slots is None else self._slots.shape[3]
        if held < stop:
            grown = keys.new_empty(2, *keys.shape[:2], max(stop, 2 * held), keys.shape[3])
            if held:
                grown[:, :, :, : self.length] = self._slots[:, :, :, : self.length]
            self._slots = grown
        for index, (states, grid) in enumerate(zip((keys, values), self.grids, strict=True)):
            self._slots[index, :, :, self.length : stop] = states if grid is None else grid.fake(states, self.length)
        self.length = stop
        return self._slots[0, :, :, :stop], self._slots[1, :, :, :stop]

    def pieces(self, tokens: int) -> list[int]:
        """Return how many of `tokens` new positions may come at once, so that all see what they would one at a time."""
        return [tokens]

    def attends(self, q: Tensor, softmax_bits: int) -> bool:
        """Say no: see `QuantizedKVLayer.attends`."""
        return False

    def select(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch."""
        if self._slots is not None:
            self._slots = self._slots.index_select(1, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return 0 if self._slots is None else self._slots[:, :, :, : self.length].numel() * self._slots.element_size()

    def bytes_per_token(self, heads: int, dim: int, float_bytes: int) -> int:
        """Count the stored bytes of one token's keys and values, `float_bytes` each."""
        return 2 * heads * dim * float_bytes


class QuantizedKVLayer:
    """Store keys and values of one layer as packed codes."""

    packed = True

    def __init__(self, keys: KVGrid, values: KVGrid) -> None:
        self.key_states, self.value_states = PackedStates(keys), PackedStates(values)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new float keys and values [B, Hkv, t, E]; return all stored ones dequantised, [B, Hkv, S, E].

        Raises: RuntimeError while the cache is pinned, as its length is then on the device.
        """
        if self.pinned:
            raise RuntimeError("a pinned cache takes single tokens: unpin it first")
        return self.key_states.append(keys), self.value_states.append(values)

    @property
    def pinned(self) -> bool:
        """Whether the cache is between `KVCache.pin` and `unpin`, when one sequence is decoded a token at a time."""
        return self.key_states.cursor is not None

    def attends(self, q: Tensor, softmax_bits: int) -> bool:
        """Say whether `attend` can run for queries [B, H, T, E] without a dequantised copy: one new token, stored ones before
        it, and a float softmax."""
        return q.shape[2] == 1 and softmax_bits >= FLOAT_BITS and self.length > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, softmax_bits: int) -> Tensor:
        """Store one token's keys and values [B, Hkv, 1, E] and attend to all stored ones, without a mask.

        They stay packed, except for a quantised softmax on a pinned cache, whose step needs all scores before the first
        product: then every slot is dequantised, and empty slots are masked.

        Args:
            q: [B, H, 1, E], scaled.
        Returns: [B, 1, H * E].
        Raises: RuntimeError for more than one token of a pinned cache.
        """
        from kernels import decode_attention

        if q.shape[2] != 1:
            raise RuntimeError("a pinned cache takes single tokens: unpin it first")
        (keys, slots), (values, _) = self.key_states.store(k), self.value_states.store(v)
        if softmax_bits >= FLOAT_BITS:
            return decode_attention(q[:, :, 0], keys, values, slots, scaling=1.0).flatten(1).unsqueeze(1)
        k, v = (heads.states(heads.packed.shape[2]) for heads in (keys, values))
        filled = torch.arange(k.shape[2], device=k.device) < slots
        return attend(q, k, v, filled.view(1, 1, 1, -1), scaling=1.0, softmax_bits=softmax_bits)

    def unsupported_reason(self, softmax_bits: int) -> str | None:
        """Say why the attention of a pinned layer that stores something cannot be captured; None if it can."""
        from kernels.kv.attention import unsupported_reason

        if softmax_bits >= FLOAT_BITS:
            return unsupported_reason(self.key_states.heads(), self.value_states.heads())
        return None if self.key_states.row_scale is None else "the softmax over scales per token is quantised"  # of empty slots

    @property
    def length(self) -> int:
        """Number of stored positions."""
        return self.key_states.length

    def select(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch."""
        self.key_states.select(rows)
        self.value_states.select(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.key_states.nbytes + self.value_states.nbytes

    def bytes_per_token(self, heads: int, dim: int, float_bytes: int) -> int:
        """Count the stored bytes of one token's keys and values; first tokens are left out."""
        return sum(states.grid.bytes_per_token(heads, dim) for states in (self.key_states, self.value_states))


class KVCache:
    """Keys and values of a whole model, one layer per decoder block.

    Args:
        layers: `FloatKVLayer` or `QuantizedKVLayer`.
    """

    def __init__(self, layers: list[FloatKVLayer | QuantizedKVLayer]) -> None:
        self.layers = layers

    def get_seq_length(self) -> int:
        """Count the stored positions. transformers' `generate` requires this name."""
        return self.layers[0].length

    def reorder_cache(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch, int64. The beam search of transformers' `generate` requires this name."""
        for layer in self.layers:
            layer.select(rows)

    def pin(self, room: int) -> None:
        """Make room for `room` more tokens and read their slots from device tensors, as a captured graph needs.

        Until `unpin` every token comes alone, through `QuantizedKVLayer.attend`, and is counted by `advance`. All layers hold
        packed states, with their first tokens stored.
        """
        length, device = self.get_seq_length(), self.layers[0].key_states.packed.device
        self._ends = torch.tensor([length - 1, length, length + 1], dtype=torch.int32, device=device)
        for states in self._states():
            states.pin(room, self._ends)

    def advance(self) -> None:
        """Count the token that every layer has stored since the last call."""
        self._ends += 1
        for states in self._states():
            states.length += 1

    def unpin(self) -> None:
        """Return to any number of tokens per call, with the length on the host."""
        for states in self._states():
            states.cursor = None

    def _states(self) -> list[PackedStates]:
        return [states for layer in self.layers for states in (layer.key_states, layer.value_states)]

    @property
    def nbytes(self) -> int:
        """Measured bytes of all stored keys and values."""
        return sum(layer.nbytes for layer in self.layers)


def new_layer(keys: KVGrid | None, values: KVGrid | None) -> FloatKVLayer | QuantizedKVLayer:
    """Make an empty store for keys and values of these grids, None standing for float: packed where both have one."""
    return FloatKVLayer(keys, values) if keys is None or values is None else QuantizedKVLayer(keys, values)

"""The KV cache: keys and values as packed low-bit codes, or floats where they are not quantised.

Packed keys and values are quantised when they are stored, after the rotation, with the static scales of their sites (RPTQ, R2
and R3); the first `sink_tokens` positions stay in float. Room doubles when it runs out, so that appending a token copies nothing
else. Reading dequantises what the attention needs; a single new token attends to the codes themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.checks import FLOAT_BITS
from core.quant.attention import attend
from core.quant.static import ActivationQuantizer
from kernels import dequantize, pack, packed_width, quantize, unpack
from kernels.backend import triton_runs_on
from kernels.kv import PackedHeads


class PackedStates:
    """Keys or values of one layer, [B, Hkv, S, E]: packed codes, and the first tokens in float.

    Args:
        quantizer: C = Hkv * E channels.
        sink_tokens: how many first positions stay in float.
    """

    def __init__(self, quantizer: ActivationQuantizer, sink_tokens: int) -> None:
        self.quantizer, self.sink_tokens = quantizer, sink_tokens
        self.length = 0
        self.sink: Tensor | None = None
        self.packed: Tensor | None = None
        self.dim = 0
        self._grid: tuple[Tensor, Tensor] | None = None  # the quantiser's, in the form of `PackedHeads`
        self.cursor: tuple[Tensor, Tensor] | None = None  # on the device: the next token's slot, and filled slots with it

    def append(self, states: Tensor) -> Tensor:
        """Quantise and store [B, Hkv, t, E]; return all states so far, dequantised: [B, Hkv, S, E]."""
        if triton_runs_on(states.device):
            self.store(states)
            return self.read()
        first = self.length
        self._prepare(states)
        codes = self._codes(states)
        self.packed[:, :, first : first + states.shape[2]] = pack(codes, self.quantizer.bits)
        self.length = first + states.shape[2]
        return self._decode(codes) if first == 0 else self.read()

    def pin(self, room: int, ends: Tensor) -> None:
        """Prepare these states for a captured graph, as `KVCache.pin` says."""
        self._reserve(self.packed, self.length + room)
        self.cursor = (ends[1:2], ends[2:3])

    def store(self, states: Tensor) -> tuple[PackedHeads, int | Tensor]:
        """Quantise and store [B, Hkv, t, E] without reading anything; return the store and its filled slots."""
        from kernels import kv_append

        self._prepare(states)
        heads = self.heads()
        if self.cursor is not None:
            kv_append(states, heads, self.cursor[0])
            return heads, self.cursor[1]
        kv_append(states, heads, self.length)
        self.length += states.shape[2]
        return heads, self.length

    def heads(self) -> PackedHeads:
        """Return the stored states in the form that kernels take."""
        if self._grid is None:
            self._grid = self.quantizer.head_grid(self.packed.shape[1])
        scale, zero = self._grid
        return PackedHeads(self.packed, self.quantizer.bits, self.dim, scale=scale, zero_point=zero, first=self.sink)

    def read(self, slots: int | None = None) -> Tensor:
        """Dequantise the first `slots` slots, filled or not (None: the filled ones): [B, Hkv, S, E] float32."""
        used = self.packed[:, :, : self.length if slots is None else slots]
        return self._decode(unpack(used, self.quantizer.bits, self.dim))

    @property
    def nbytes(self) -> int:
        """Bytes of stored states: packed codes of the filled slots, and the first tokens in float."""
        if self.packed is None:
            return 0
        sink = 0 if self.sink is None else self.sink.numel() * self.sink.element_size()
        return self.packed[:, :, : self.length].numel() + sink

    def select(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch."""
        if self.packed is not None:
            self.packed = self.packed.index_select(0, rows)
        if self.sink is not None:
            self.sink = self.sink.index_select(0, rows)

    def _per_head(self, values: Tensor, heads: int) -> Tensor:
        return values.view(heads, 1, self.dim)

    def _codes(self, states: Tensor) -> Tensor:
        q, heads = self.quantizer, states.shape[1]
        zero = self._per_head(q.channel_zero, heads) - q.qmin
        return quantize(states, self._per_head(q.channel_scale, heads), zero, 0, q.qmax - q.qmin).to(torch.uint8)

    def _decode(self, codes: Tensor) -> Tensor:
        q, heads = self.quantizer, codes.shape[1]
        out = dequantize(codes, self._per_head(q.channel_scale, heads), self._per_head(q.channel_zero, heads) - q.qmin)
        if self.sink is not None:
            out[:, :, : self.sink.shape[2]] = self.sink
        return out

    def _prepare(self, states: Tensor) -> None:
        """Store the float tokens among new states [B, Hkv, t, E], and make room for all of them."""
        self.dim = states.shape[-1]
        sink = max(0, min(self.sink_tokens - self.length, states.shape[2]))
        if sink:
            part = states[:, :, :sink].clone()
            self.sink = part if self.sink is None else torch.cat([self.sink, part], dim=2)
        self._reserve(states, self.length + states.shape[2])

    def _reserve(self, like: Tensor, slots: int) -> None:
        """Make room for `slots` tokens; the room doubles when it runs out."""
        held = 0 if self.packed is None else self.packed.shape[2]
        if self.packed is None or held < slots:
            width = packed_width(self.dim, self.quantizer.bits)
            grown = like.new_empty(*like.shape[:2], max(slots, 2 * held), width, dtype=torch.uint8)
            if held:
                grown[:, :, : self.length] = self.packed[:, :, : self.length]
            self.packed = grown


class FloatKVLayer:
    """Keys and values of one layer in their own float type."""

    packed = pinned = False

    def __init__(self) -> None:
        self.length = 0
        self._slots: Tensor | None = None  # [2, B, Hkv, slots, E]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, Hkv, t, E]; return all stored ones, [B, Hkv, S, E], which later calls may overwrite."""
        stop = self.length + keys.shape[2]
        held = 0 if self._slots is None else self._slots.shape[3]
        if held < stop:
            grown = keys.new_empty(2, *keys.shape[:2], max(stop, 2 * held), keys.shape[3])
            if held:
                grown[:, :, :, : self.length] = self._slots[:, :, :, : self.length]
            self._slots = grown
        self._slots[0, :, :, self.length : stop], self._slots[1, :, :, self.length : stop] = keys, values
        self.length = stop
        return self._slots[0, :, :, :stop], self._slots[1, :, :, :stop]

    def select(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch."""
        if self._slots is not None:
            self._slots = self._slots.index_select(1, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return 0 if self._slots is None else self._slots[:, :, :, : self.length].numel() * self._slots.element_size()


class QuantizedKVLayer:
    """Keys and values of one layer as packed codes with static scales."""

    packed = True

    def __init__(self, key: ActivationQuantizer, value: ActivationQuantizer, sink_tokens: int) -> None:
        self.key_states, self.value_states = PackedStates(key, sink_tokens), PackedStates(value, sink_tokens)

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
        k, v = (states.read(keys.packed.shape[2]) for states in (self.key_states, self.value_states))
        filled = torch.arange(k.shape[2], device=k.device) < slots
        return attend(q, k, v, filled.view(1, 1, 1, -1), scaling=1.0, softmax_bits=softmax_bits)

    def unsupported_reason(self, softmax_bits: int) -> str | None:
        """Say why the attention of a pinned layer that stores something cannot be captured; None if it can."""
        from kernels.kv.attention import unsupported_reason

        return unsupported_reason(self.key_states.heads(), self.value_states.heads()) if softmax_bits >= FLOAT_BITS else None

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


class KVCache:
    """Keys and values of a whole model, one layer per decoder block.

    Args:
        layers: `FloatKVLayer`, `QuantizedKVLayer` or `core.quant.kv_cache_dynamic.DynamicKVLayer`.
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


def bytes_per_token(heads: int, dim: int, bits: int, *, float_bytes: int = 4) -> int:
    """Count the stored bytes of one token's keys (or values) in one layer."""
    return heads * (packed_width(dim, bits) if bits < 16 else dim * float_bytes)

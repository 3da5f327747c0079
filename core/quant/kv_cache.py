"""A key/value cache that stores packed low-bit codes: a transformers `Cache`, used by `generate` and in prefill.

Keys and values are quantised as they arrive, after the rotation, with the static scales of their sites (RPTQ, R2 and
R3); the first `sink_tokens` positions stay in float. Slots grow by doubling, so appending a token copies nothing else.
Reading dequantises what the attention needs; a single new token attends to the codes as they are. With left-padded
batches the float slots are the first slots, padding included; single sequences and right padding are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from core.checks import FLOAT_BITS
from core.quant.attention import attend
from core.quant.static import ActivationQuantizer
from kernels import dequantize, pack, packed_width, quantize, unpack
from kernels.backend import triton_runs_on
from kernels.kv import PackedHeads


class PackedStates:
    """Keys or values of one layer: [B, Hkv, S, E] as packed codes plus the first tokens in float.

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
        self._grid: tuple[Tensor, Tensor] | None = None  # the quantiser's, as `PackedHeads` takes it
        self.cursor: tuple[Tensor, Tensor] | None = None  # where the next token goes and the slots filled then, on the device

    def append(self, states: Tensor) -> Tensor:
        """Quantise and store [B, Hkv, t, E]; returns all states so far, dequantised: [B, Hkv, S, E]."""
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
        """`QuantizedKVCache.pin` for these states."""
        self._reserve(self.packed, self.length + room)
        self.cursor = (ends[1:2], ends[2:3])

    def store(self, states: Tensor) -> tuple[PackedHeads, int | Tensor]:
        """Quantise and store [B, Hkv, t, E] without reading anything back; returns the store and its filled slots."""
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
        """What is stored, as kernels take it."""
        if self._grid is None:
            self._grid = self.quantizer.head_grid(self.packed.shape[1])
        scale, zero = self._grid
        return PackedHeads(self.packed, self.quantizer.bits, self.dim, scale=scale, zero_point=zero, first=self.sink)

    def read(self, slots: int | None = None) -> Tensor:
        """States of the first `slots` slots, filled or not (None: the filled ones), dequantised: [B, Hkv, S, E] float32."""
        used = self.packed[:, :, : self.length if slots is None else slots]
        return self._decode(unpack(used, self.quantizer.bits, self.dim))

    @property
    def nbytes(self) -> int:
        """Bytes of stored states: packed codes of the filled slots, and the float sink."""
        if self.packed is None:
            return 0
        sink = 0 if self.sink is None else self.sink.numel() * self.sink.element_size()
        return self.packed[:, :, : self.length].numel() + sink

    def crop(self, length: int) -> None:
        """Keep the first `length` positions."""
        self.length = min(self.length, length)
        if self.sink is not None:
            self.sink = self.sink[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep or repeat batch rows."""
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
        """Keep the sinks among new states [B, Hkv, t, E], and make room for all of them."""
        self.dim = states.shape[-1]
        sink = max(0, min(self.sink_tokens - self.length, states.shape[2]))
        if sink:
            part = states[:, :, :sink].clone()
            self.sink = part if self.sink is None else torch.cat([self.sink, part], dim=2)
        self._reserve(states, self.length + states.shape[2])

    def _reserve(self, like: Tensor, slots: int) -> None:
        """Room for `slots` tokens, doubled when it runs out."""
        held = 0 if self.packed is None else self.packed.shape[2]
        if self.packed is None or held < slots:
            width = packed_width(self.dim, self.quantizer.bits)
            grown = like.new_empty(*like.shape[:2], max(slots, 2 * held), width, dtype=torch.uint8)
            if held:
                grown[:, :, : self.length] = self.packed[:, :, : self.length]
            self.packed = grown


class QuantizedKVLayer(CacheLayerMixin):
    """One layer of `QuantizedKVCache`."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, key: ActivationQuantizer, value: ActivationQuantizer, sink_tokens: int) -> None:
        super().__init__()
        self.key_states, self.value_states = PackedStates(key, sink_tokens), PackedStates(value, sink_tokens)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate before the first update."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Store new float keys and values [B, Hkv, t, E]; returns all of them dequantised, [B, Hkv, S, E].

        Raises: RuntimeError while the cache is pinned, when its length is on the device.
        """
        if self.pinned:
            raise RuntimeError("a pinned cache takes single tokens: unpin it first")
        self.is_initialized = True
        return self.key_states.append(key_states), self.value_states.append(value_states)

    @property
    def pinned(self) -> bool:
        """Between `QuantizedKVCache.pin` and `unpin`: one sequence without padding, a token at a time."""
        return self.key_states.cursor is not None

    def attends(self, q: Tensor, softmax_bits: int) -> bool:
        """Whether `attend` does without dequantising for queries [B, H, T, E]: one new token, something to look back at, and a
        softmax that stays in float."""
        return q.shape[2] == 1 and softmax_bits >= FLOAT_BITS and self.get_seq_length() > 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, softmax_bits: int) -> Tensor:
        """Store one token's keys and values [B, Hkv, 1, E] and attend to all stored ones, without a mask.

        They stay packed. Only for a quantised softmax, whose step needs all scores before the first product, every slot of a
        pinned cache is dequantised and the empty ones are masked.

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
        """Why the attention of a pinned layer that stores something cannot be captured, None if it can."""
        from kernels.kv.attention import unsupported_reason

        return unsupported_reason(self.key_states.heads(), self.value_states.heads()) if softmax_bits >= FLOAT_BITS else None

    def get_seq_length(self) -> int:
        """Stored positions."""
        return self.key_states.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys the mask must cover, offset of the first one)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No maximum (older name of `get_max_length`)."""
        return -1

    def crop(self, tokens: int) -> None:
        """Remove -`tokens` positions from the end; a positive number (older transformers) is the length to keep."""
        keep = tokens if tokens > 0 else max(0, self.get_seq_length() + tokens)
        self.key_states.crop(keep)
        self.value_states.crop(keep)

    def reset(self) -> None:
        """Forget everything."""
        for name in ("key_states", "value_states"):
            old = getattr(self, name)
            setattr(self, name, PackedStates(old.quantizer, old.sink_tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.key_states.packed is not None:
            packed = self.key_states.packed
            self.batch_select_indices(torch.arange(len(packed), device=packed.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.key_states.select(indices)
        self.value_states.select(indices)

    @property
    def nbytes(self) -> int:
        """Bytes of stored keys and values."""
        return self.key_states.nbytes + self.value_states.nbytes


class QuantizedKVCache(Cache):
    """Packed cache of a whole model: one layer per decoder block; blocks whose keys and values stay in float get a
    plain dynamic layer.

    Args:
        pairs: per layer (key quantiser, value quantiser), either both or neither None.
        sink_tokens: first positions kept in float.
    """

    def __init__(self, pairs: list[tuple[ActivationQuantizer | None, ActivationQuantizer | None]], sink_tokens: int = 0) -> None:
        layers = [QuantizedKVLayer(k, v, sink_tokens) if k is not None and v is not None else DynamicLayer() for k, v in pairs]
        super().__init__(layers=layers)

    def pin(self, room: int) -> None:
        """Prepare for a captured graph: make room for `room` more tokens now, and take their place from device tensors.

        From here to `unpin` every token comes alone, through `QuantizedKVLayer.attend`, and is counted by `advance`. All layers
        hold packed states, sinks included.
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
        """Back to ordinary use."""
        for states in self._states():
            states.cursor = None

    def _states(self) -> list[PackedStates]:
        return [states for layer in self.layers for states in (layer.key_states, layer.value_states)]

    @property
    def nbytes(self) -> int:
        """Measured bytes of all stored keys and values."""
        return sum(cache_layer_bytes(layer) for layer in self.layers)


def cache_layer_bytes(layer: CacheLayerMixin) -> int:
    """Bytes held by one cache layer, packed or plain."""
    if isinstance(layer, QuantizedKVLayer):
        return layer.nbytes
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values) if t is not None)


def bytes_per_token(heads: int, dim: int, bits: int, *, float_bytes: int = 4) -> int:
    """Stored bytes of one token's keys (or values) in one layer."""
    return heads * (packed_width(dim, bits) if bits < 16 else dim * float_bytes)

"""The KV cache of BitNet a4.8: symmetric unsigned codes, one scale per token and head, not calibrated.

    Q = 2**(b - 1) - 1      s = max |x| / Q over one head of one token, stored in float16
    u = round(x / s) clipped to -Q … Q, plus Q + 1      x ≈ (u - Q - 1) s      (b = 4: u in 1 … 15; code 0 never occurs)

The first token of a sequence (bos) has bits of its own: the paper keeps it at 4 where the others have 3. Codes are written once
and never changed. Source: arXiv:2411.04965, section 2.3, which names absmax and unsigned integers; the offset and the scale per
token and head are our interpretation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.checks import FLOAT_BITS
from core.quant.kv_cache import QuantizedKVLayer
from kernels import dequantize_rows, pack, packed_width, quantize_rows, unpack
from kernels.backend import triton_runs_on
from kernels.kv import PackedHeads

SCALE_BYTES = 2


@dataclass(frozen=True)
class AttentionBits:
    """Bits of keys and values, of the first token's, and of queries: 2 to 8, or 16 for not quantised."""

    kv: int = FLOAT_BITS
    bos: int = 4
    q: int = FLOAT_BITS

    @property
    def packs(self) -> bool:
        """Whether keys and values are stored as codes."""
        return self.kv < FLOAT_BITS

    def fake_states(self, x: Tensor, past: int) -> Tensor:
        """Quantise and dequantise keys or values [B, Hkv, T, E] whose first position is `past`."""
        if not self.packs:
            return x
        out = fake_heads(x, self.kv)
        if past == 0 and self.bos != self.kv:
            out[:, :, :1] = fake_heads(x[:, :, :1], self.bos)
        return out

    def fake_query(self, q: Tensor) -> Tensor:
        """Quantise and dequantise queries [B, H, T, E]."""
        return q if self.q >= FLOAT_BITS else fake_heads(q, self.q)


def fake_heads(x: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise heads x [..., E]; a copy at 16 bits."""
    return x.clone() if bits >= FLOAT_BITS else dequantize_rows(*quantize_rows(x, bits), bits)


class DynamicStates:
    """Keys or values of one layer, [B, Hkv, S, E]: the first token at bits of its own (or in float), the others packed.

    It has the methods of `core.quant.kv_cache.PackedStates`.
    """

    def __init__(self, bits: AttentionBits) -> None:
        self.bits = bits
        self.length = self.dim = 0
        self.first: tuple[Tensor, Tensor | None] | None = None  # packed codes and scale; values and None in float
        self._first_values: Tensor | None = None  # dequantised, for `store`
        self.cursor: tuple[Tensor, Tensor] | None = None  # as `PackedStates.cursor`
        self.packed: Tensor | None = None  # [B, Hkv, slots, packed_width(E)]
        self.scale: Tensor | None = None  # [B, Hkv, slots, 1] float16

    def append(self, states: Tensor) -> Tensor:
        """Quantise and store [B, Hkv, t, E]; return all states so far, dequantised: [B, Hkv, S, E]."""
        self.dim = states.shape[-1]
        stop = self.length + states.shape[2]
        if self.length == 0:
            self.first = self._first(states[:, :, :1])
            states = states[:, :, 1:]
        start = stop - 1 - states.shape[2]
        self._reserve(states, stop - 1)
        if triton_runs_on(states.device):
            from kernels import kv_append

            kv_append(states, self.heads(), start)
        else:
            codes, self.scale[:, :, start : stop - 1] = quantize_rows(states, self.bits.kv)
            self.packed[:, :, start : stop - 1] = pack(codes, self.bits.kv)
        self.length = stop
        return self.read()

    def pin(self, room: int, ends: Tensor) -> None:
        """Prepare these states for a captured graph, as `KVCache.pin` says; the first token has no slot."""
        self._reserve(self.packed, self.length - 1 + room)
        self.cursor = (ends[0:1], ends[1:2])

    def store(self, states: Tensor) -> tuple[PackedHeads, int | Tensor]:
        """Quantise and store [B, Hkv, t, E] after the first token without reading; return the store and its filled slots."""
        from kernels import kv_append

        start, stop = self.length - 1, self.length + states.shape[2]
        self._reserve(states, stop - 1)
        heads = self.heads()
        if self.cursor is not None:
            kv_append(states, heads, self.cursor[0])
            return heads, self.cursor[1]
        kv_append(states, heads, start)
        self.length = stop
        return heads, stop - 1

    def heads(self) -> PackedHeads:
        """Return the stored states in the form that kernels take."""
        if self._first_values is None:
            self._first_values = self._read_first()
        return PackedHeads(self.packed, self.bits.kv, self.dim, row_scale=self.scale, first=self._first_values)

    def read(self) -> Tensor:
        """Dequantise all states: [B, Hkv, S, E] float32."""
        rest = self.length - 1
        codes = unpack(self.packed[:, :, :rest], self.bits.kv, self.dim)
        return torch.cat([self._read_first(), dequantize_rows(codes, self.scale[:, :, :rest], self.bits.kv)], dim=2)

    @property
    def nbytes(self) -> int:
        """Bytes of stored states: codes and scales of the filled slots."""
        if self.first is None:
            return 0
        rest = self.length - 1
        stored = (*self.first, self.packed[:, :, :rest], self.scale[:, :, :rest])
        return sum(t.numel() * t.element_size() for t in stored if t is not None)

    def select(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch."""
        if self.packed is not None:
            self.packed, self.scale = self.packed.index_select(0, rows), self.scale.index_select(0, rows)
        if self.first is not None:
            self.first = tuple(None if t is None else t.index_select(0, rows) for t in self.first)
            self._first_values = None

    def _first(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.bits.bos >= FLOAT_BITS:
            return state.clone(), None
        codes, scale = quantize_rows(state, self.bits.bos)
        return pack(codes, self.bits.bos), scale

    def _read_first(self) -> Tensor:
        codes, scale = self.first
        return codes if scale is None else dequantize_rows(unpack(codes, self.bits.bos, self.dim), scale, self.bits.bos)

    def _reserve(self, like: Tensor, slots: int) -> None:
        """Make room for `slots` tokens after the first; the room doubles when it runs out."""
        if self.packed is not None and self.packed.shape[2] >= slots:
            return
        held = 0 if self.packed is None else self.packed.shape[2]
        room, batch = max(slots, 2 * held), like.shape[:2]
        packed = torch.empty(*batch, room, packed_width(self.dim, self.bits.kv), dtype=torch.uint8, device=like.device)
        scale = torch.empty(*batch, room, 1, dtype=torch.float16, device=like.device)
        if held:
            packed[:, :, :held], scale[:, :, :held] = self.packed, self.scale
        self.packed, self.scale = packed, scale


class DynamicKVLayer(QuantizedKVLayer):
    """Keys and values of one layer as packed codes with a scale per token and head."""

    def __init__(self, bits: AttentionBits) -> None:
        self.key_states, self.value_states = DynamicStates(bits), DynamicStates(bits)

    def unsupported_reason(self, softmax_bits: int) -> str | None:
        """Say why a pinned layer cannot be captured: as `QuantizedKVLayer`, or a quantised softmax: empty slots lack scales."""
        if softmax_bits < FLOAT_BITS:
            return "the softmax over scales per token is quantised"
        return super().unsupported_reason(softmax_bits)


def dynamic_bytes_per_token(heads: int, dim: int, bits: AttentionBits, *, float_bytes: int = 4) -> int:
    """Count the stored bytes of one token's keys (or values) in one layer; the first token of a sequence may differ."""
    if not bits.packs:
        return heads * dim * float_bytes
    return heads * (packed_width(dim, bits.kv) + SCALE_BYTES)

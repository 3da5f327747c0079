"""Grids of keys and values: the one place that quantises them, with and without a cache.

    StaticGrid   scales per channel, known in advance (RPTQ, R2 and R3); the first tokens of a sequence stay in float
    RowGrid      Q = 2**(b - 1) - 1      s = max |x| / Q over one head of one token, stored in float16
                 u = round(x / s) clipped to -Q … Q, plus Q + 1      x ≈ (u - Q - 1) s      (b = 4: u in 1 … 15, never 0)

The first token (bos) of a `RowGrid` has bits of its own: the paper keeps it at 4 where the others have 3. Source of `RowGrid`:
arXiv:2411.04965, section 2.3, which names absmax and unsigned integers; the offset and the scale per token and head are our
reading. The codes themselves are written by `kernels.kv_append`, as the `PackedHeads` of a store describe the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from core.checks import FLOAT_BITS
from core.quant.static import ActivationQuantizer, InputUse
from kernels import dequantize_rows, pack, packed_width, quantize_rows, straight_through, unpack

SCALE_BYTES = 2


@dataclass(frozen=True, eq=False)
class StaticGrid:
    """Quantise by the scales of channels.

    Attributes:
        quantizer: of C = Hkv E channels.
        first_tokens: first positions of a sequence that stay in float; what a cache stores in their slots is not used.
    """

    quantizer: ActivationQuantizer
    first_tokens: int
    apart = 0
    """First tokens that have no slot in a cache."""

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return self.quantizer.bits

    def fake(self, x: Tensor, past: int) -> Tensor:
        """Quantise and dequantise [B, Hkv, T, E] whose first position is `past`; a copy."""
        return self.quantizer.fake_heads(x, InputUse(max(0, self.first_tokens - past)))

    def store_first(self, x: Tensor) -> tuple[Tensor, ...]:
        """Make what a cache holds of first tokens x [B, Hkv, t, E]: tensors whose third dimension is t."""
        return (x.clone(),)

    def read_first(self, stored: tuple[Tensor, ...], dim: int) -> Tensor:
        """Read the first tokens [B, Hkv, t, E], E = `dim`, of what `store_first` made."""
        return stored[0]

    def bytes_per_token(self, heads: int, dim: int) -> int:
        """Count the stored bytes of one token in one layer, first tokens left out."""
        return heads * packed_width(dim, self.bits)


@dataclass(frozen=True)
class RowGrid:
    """Quantise by the largest magnitude of each head of each token.

    Attributes:
        bits: 2 to 8.
        first_bits: those of the first token, 2 to 8, or 16 for float.
    """

    bits: int
    first_bits: int
    first_tokens = apart = 1

    def fake(self, x: Tensor, past: int) -> Tensor:
        """Quantise and dequantise [B, Hkv, T, E] whose first position is `past`; a copy."""
        out = fake_per_row(x, self.bits)
        if past == 0 and self.first_bits != self.bits:
            out[:, :, :1] = fake_per_row(x[:, :, :1], self.first_bits)
        return out

    def store_first(self, x: Tensor) -> tuple[Tensor, ...]:
        """Make what a cache holds of the first token x [B, Hkv, 1, E]: packed codes and scales, or floats."""
        if self.first_bits >= FLOAT_BITS:
            return (x.clone(),)
        codes, scale = quantize_rows(x, self.first_bits)
        return pack(codes, self.first_bits), scale

    def read_first(self, stored: tuple[Tensor, ...], dim: int) -> Tensor:
        """Read the first token [B, Hkv, 1, E], E = `dim`, of what `store_first` made."""
        if self.first_bits >= FLOAT_BITS:
            return stored[0]
        return dequantize_rows(unpack(stored[0], self.first_bits, dim), stored[1], self.first_bits)

    def bytes_per_token(self, heads: int, dim: int) -> int:
        """Count the stored bytes of one token in one layer, the first token left out."""
        return heads * (packed_width(dim, self.bits) + SCALE_BYTES)


KVGrid = StaticGrid | RowGrid


def fake_per_row(x: Tensor, bits: int) -> Tensor:
    """Quantise and dequantise x [..., E] with one scale per row, straight-through for gradients; a copy at 16 bits."""
    return x.clone() if bits >= FLOAT_BITS else straight_through(x, dequantize_rows(*quantize_rows(x.detach(), bits), bits))

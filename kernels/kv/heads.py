"""The stored keys or values of one layer: packed codes, scales, and first tokens in floating point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.codes import dequantize, dequantize_rows
from kernels.packing import unpack


@dataclass(frozen=True)
class PackedHeads:
    """The stored keys or values of one layer.

    Attributes:
        packed: [B, Hkv, slots, packed_width(E, bits)] uint8 of `kernels.pack`.
        bits: 2 to 8.
        dim: E.
        scale, zero_point: STATIC: [Hkv, E] float32, zero points of unsigned codes; the slots of the first tokens are ignored.
        row_scale: DYNAMIC: [B, Hkv, slots, 1] float16; slot 0 is the token after the first ones.
        first: [B, Hkv, F, E] floating, or None.
    """

    packed: Tensor
    bits: int
    dim: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    row_scale: Tensor | None = None
    first: Tensor | None = None

    @property
    def first_tokens(self) -> int:
        """Number of first tokens, F."""
        return 0 if self.first is None else self.first.shape[2]

    @property
    def skipped(self) -> int:
        """Number of slots at the start whose codes are not used."""
        return self.first_tokens if self.row_scale is None else 0

    def states(self, slots: int) -> Tensor:
        """Dequantise the first tokens and the used ones of `slots` slots: [B, Hkv, S, E] float32."""
        codes = unpack(self.packed[:, :, :slots], self.bits, self.dim)
        if self.row_scale is None:
            out = dequantize(codes, self.scale[:, None], self.zero_point[:, None])
            if self.first is not None:
                out[:, :, : self.first_tokens] = self.first
            return out
        rest = dequantize_rows(codes, self.row_scale[:, :, :slots], self.bits)
        return rest if self.first is None else torch.cat([self.first.to(torch.float32), rest], dim=2)

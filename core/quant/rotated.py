"""Rotate the input of a linear layer and quantise it with one scale and zero point per token.

    y = x R                                    R of `kernels.hadamard`; left out where it is folded into weights
    low = c · min(0, min y)    high = c · max(0, max y)          over the channels of one token, c the clip ratio; or given limits
    ŷ = scale (clamp(round(y / scale) + z, qmin, qmax) - z)          scale and z of `core.quant.affine`, the EXACT rule
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.checks import FLOAT_BITS
from core.quant.affine import QParams, exact_qparams
from core.quant.static import PLAIN, InputUse
from kernels import code_limits, fake_quantize, hadamard, quantize


class TokenQuantizer(nn.Module):
    """Quantise [..., C] activations token by token, after a rotation. Nothing is saved but the arguments.

    Args:
        bits: 2 to 8, or 16 to rotate alone.
        block: channels that are rotated together, 0 for all of them; None where the input comes rotated, or is not rotated.
        clip: ratio by which each token's range shrinks, above 0 and up to 1.
        limits: (low, high) of every token where they are known in advance; None takes each token's own.
    Raises: ValueError for values that are out of range.
    """

    def __init__(
        self, bits: int, block: int | None = None, clip: float = 1.0, limits: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        fits = limits is None or limits[0] <= 0 <= limits[1] and limits[0] < limits[1]
        if bits not in (*range(2, 9), FLOAT_BITS) or not 0 < clip <= 1 or not fits or (block is not None and block < 0):
            raise ValueError(f"a quantiser of {bits} bits, blocks of {block}, clip {clip} and limits {limits}")
        self.bits, self.block, self.clip, self.limits = bits, block, clip, limits

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x [..., C]; x itself where nothing is rotated here."""
        return x if self.block is None else hadamard(x, self.block)

    def fake(self, x: Tensor, use: InputUse = PLAIN) -> Tensor:
        """Compute ŷ for x [..., T, C], new memory; the first `use.float_tokens` are only rotated."""
        y = self.rotate(x)
        if self.bits >= FLOAT_BITS:
            return y if y is not x else x.clone()
        grid, (qmin, qmax) = self.grid(y), code_limits(self.bits)
        own = y is not x and not use.float_tokens  # the rotation made a copy, and nobody reads it afterwards
        out = fake_quantize(y, grid.scale, qmin - grid.zero_point, qmax - grid.zero_point, inplace=own)
        if use.float_tokens:
            out[..., : use.float_tokens, :] = y[..., : use.float_tokens, :]
        return out

    fake_heads = fake
    """Heads [B, H, T, E]: every head of a token has a scale of its own."""

    def codes(self, y: Tensor) -> tuple[Tensor, QParams]:
        """Compute the codes [..., C] int8 of a rotated y [..., C], and their scales and zero points [..., 1]."""
        grid = self.grid(y)
        return quantize(y, grid.scale, grid.zero_point, *code_limits(self.bits)), grid

    def grid(self, y: Tensor) -> QParams:
        """Compute scale and zero point of each token of a rotated y [..., C]: [..., 1] each."""
        if self.limits is not None:
            low, high = (torch.full_like(y[..., :1], limit) for limit in self.limits)
        else:
            low, high = y.aminmax(dim=-1, keepdim=True)
            low, high = low.clamp_max(0).mul_(self.clip), high.clamp_min(0).mul_(self.clip)
        return exact_qparams(low, high, bits=self.bits)

    def facts(self) -> dict[str, object]:
        """Return the arguments by name as JSON types: `TokenQuantizer(**facts)` is the same quantiser."""
        limits = None if self.limits is None else list(self.limits)
        return {"bits": self.bits, "block": self.block, "clip": self.clip, "limits": limits}

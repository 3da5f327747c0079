"""Static quantiser of one activation site: contiguous clusters of channels, one scale and zero point each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.quant.affine import QParams
from core.quant.segments import expand
from kernels import code_limits, fake_quantize, quantize

KeepFloat = int | Tensor
"""Tokens that keep their float values: the first n of every sequence, or those marked True in a mask [B or 1, T] bool."""


@dataclass(frozen=True)
class Codes:
    """A quantised input as rows: `codes` [M, K] int8; with dynamic scales `scale` [M, 1] float32 and, where it is known,
    `code_sum` [M] int32, Σ codes. `lead` are the dimensions that became M, None for [M]."""

    codes: Tensor
    scale: Tensor | None = None
    code_sum: Tensor | None = None
    lead: torch.Size | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the input, [..., K]."""
        return self.codes.shape if self.lead is None else torch.Size((*self.lead, self.codes.shape[1]))


def keep_float_rows(keep_float: KeepFloat, x: Tensor) -> tuple | Tensor:
    """What indexes the keep_float tokens of x [..., T, C]: a slice where it can, a mask [..., T] otherwise."""
    return (..., slice(keep_float), slice(None)) if isinstance(keep_float, int) else keep_float.expand(x.shape[:-1])


class ActivationQuantizer(nn.Module):
    """Quantise [..., C] activations whose channels lie in cluster order.

    Buffers (saved): scale [G] float32, zero_point [G] int32, offsets [G + 1] int32. Per-channel copies are derived.
    Raises ValueError if they do not fit each other.

    Args:
        bits: 2 to 8.
        params: scale and zero point per cluster, [G].
        offsets: [G + 1] int64, 0 … C.
    """

    def __init__(self, bits: int, params: QParams, offsets: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.qmin, self.qmax = code_limits(bits)
        self.register_buffer("scale", params.scale.to(torch.float32).contiguous())
        self.register_buffer("zero_point", params.zero_point.to(torch.int32).contiguous())
        self.register_buffer("offsets", offsets.to(torch.int32).contiguous())
        if self.offsets[0] != 0 or bool((self.offsets.diff() < 1).any()) or len(self.scale) != len(self.offsets) - 1:
            raise ValueError("cluster offsets do not fit the scales")
        if not 2 <= bits <= 8 or not bool((self.scale > 0).all()):
            raise ValueError(f"a quantiser of {bits} bits needs 2 to 8 bits and positive scales")
        offsets, zero = self.offsets.to(torch.int64), self.zero_point.to(torch.float32)
        self.register_buffer("channel_scale", expand(self.scale, offsets), persistent=False)
        self.register_buffer("lower", expand(self.qmin - zero, offsets), persistent=False)
        self.register_buffer("upper", expand(self.qmax - zero, offsets), persistent=False)
        self.register_buffer("channel_zero", expand(zero, offsets), persistent=False)

    @property
    def width(self) -> int:
        """C, the number of channels."""
        return self.channel_scale.numel()

    def fake(self, x: Tensor, keep_float: KeepFloat | None = None, *, inplace: bool = False) -> Tensor:
        """x̂ for x [..., T, C]; keep_float tokens come back unchanged. With `inplace` in the place of x."""
        return self._fake(x, (-1,), keep_float, inplace)

    def fake_heads(self, x: Tensor, keep_float: KeepFloat | None = None, *, inplace: bool = False) -> Tensor:
        """x̂ for x [B, H, T, E], C = H * E; keep_float tokens come back unchanged. With `inplace` in the place of x."""
        keep_float = keep_float[:, None] if isinstance(keep_float, Tensor) else keep_float
        return self._fake(x, (x.shape[1], 1, x.shape[3]), keep_float, inplace)

    def _fake(self, x: Tensor, shape: tuple[int, ...], keep_float: KeepFloat | None, inplace: bool) -> Tensor:
        rows = None if keep_float is None else keep_float_rows(keep_float, x)
        kept = None if keep_float is None else x[rows].clone()
        grid = (t.view(shape) for t in (self.channel_scale, self.lower, self.upper))
        out = fake_quantize(x, *grid, inplace=inplace)
        if keep_float is not None:
            out[rows] = kept
        return out

    def head_grid(self, heads: int) -> tuple[Tensor, Tensor]:
        """(scale, zero point) [H, E] float32 of channels that are H heads, for codes 0 … 2**bits - 1."""
        return self.channel_scale.view(heads, -1), self.lower.neg().view(heads, -1)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of x [..., C], int8."""
        return quantize(x, self.channel_scale, self.channel_zero, self.qmin, self.qmax)

    def common_step(self) -> tuple[Tensor, Tensor] | None:
        """One step for all clusters where every scale is the largest divided by 2**e, 0 <= e <= 8 - bits; else None.

        Returns: (step, 0-dim float32; factor [C] int8): codes * factor are int8 codes in units of `step`.
        """
        spare = 8 - self.bits
        mantissa, exponent = torch.frexp(self.scale.max() / self.scale)
        exponent = exponent - 1
        if bool((mantissa != 0.5).any() or (exponent > spare).any()):
            return None
        factor = (2.0 ** (spare - exponent)).to(torch.int8)  # at most 2**6: bits >= 2
        return self.scale.max() * 2.0**-spare, expand(factor, self.offsets.to(torch.int64))

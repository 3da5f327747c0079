"""Quantise the activations of one site with static scales: one scale and zero point per cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.quant.affine import QParams
from core.quant.segments import expand
from kernels import code_limits, fake_quantize, quantize

KeepFloat = int | Tensor
"""Tokens whose activations stay in floating point: the first n of every sequence, or those True in a mask [B or 1, T] bool."""


@dataclass(frozen=True)
class Codes:
    """The input of a linear layer as integer codes.

    Attributes:
        codes: [M, K] int8.
        scale: [M, 1] float32 where scales are dynamic, else None.
        code_sum: [M] int32, Σ_k codes, where it is known.
        lead: the leading dimensions of the input [..., K], whose product is M; None for [M].
    """

    codes: Tensor
    scale: Tensor | None = None
    code_sum: Tensor | None = None
    lead: torch.Size | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the input, [..., K]."""
        return self.codes.shape if self.lead is None else torch.Size((*self.lead, self.codes.shape[1]))


def keep_float_rows(keep_float: KeepFloat, x: Tensor) -> tuple | Tensor:
    """Make the index that selects the tokens of x [..., T, C] that stay in float: a slice for a number, else a mask [..., T]."""
    return (..., slice(keep_float), slice(None)) if isinstance(keep_float, int) else keep_float.expand(x.shape[:-1])


class ActivationQuantizer(nn.Module):
    """A quantiser of [..., C] activations whose channels are in cluster order.

    Saved buffers: scale [G] float32, zero_point [G] int32, offsets [G + 1] int32. Derived and not saved, one value per channel:
    channel_scale, channel_zero, and lower and upper, the code limits minus the zero point, all [C] float32.

    Args:
        bits: 2 to 8.
        params: scale and zero point per cluster, [G].
        offsets: [G + 1] int64, 0 … C.
    Raises: ValueError if they do not fit each other.
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
        """Number of channels, C."""
        return self.channel_scale.numel()

    def fake(self, x: Tensor, keep_float: KeepFloat | None = None, *, inplace: bool = False) -> Tensor:
        """Quantise and dequantise x [..., T, C], except for tokens in `keep_float`. With `inplace` the result overwrites x."""
        return self._fake(x, (-1,), keep_float, inplace)

    def fake_heads(self, x: Tensor, keep_float: KeepFloat | None = None, *, inplace: bool = False) -> Tensor:
        """Quantise and dequantise heads x [B, H, T, E], C = H * E; other arguments as `fake`."""
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
        """Return scale and zero point [H, E] float32 of channels that are H heads, for unsigned codes 0 … 2**bits - 1."""
        return self.channel_scale.view(heads, -1), self.lower.neg().view(heads, -1)

    def codes(self, x: Tensor) -> Tensor:
        """Compute the codes of x [..., C]: int8."""
        return quantize(x, self.channel_scale, self.channel_zero, self.qmin, self.qmax)

    def common_step(self) -> tuple[Tensor, Tensor] | None:
        """Find one step for all clusters: there is one where every scale is the largest divided by 2**e, 0 <= e <= 8 - bits.

        Returns: (step, 0-dim float32; factor [C] int8): codes * factor are int8 codes in units of `step`. None if there is none.
        """
        spare = 8 - self.bits
        mantissa, exponent = torch.frexp(self.scale.max() / self.scale)
        exponent = exponent - 1  # frexp writes 2**e as 0.5 * 2**(e + 1)
        if bool((mantissa != 0.5).any() or (exponent > spare).any()):
            return None
        factor = (2.0 ** (spare - exponent)).to(torch.int8)  # at most 2**6: bits >= 2
        return self.scale.max() * 2.0**-spare, expand(factor, self.offsets.to(torch.int64))

"""Compute affine codes of numbers, and numbers of codes: the only place with this formula.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)          x ≈ scale * (q - zero_point)

Rounding is half to even. Source: RPTQ (arXiv:2304.01089), official quantiser; the field's affine quantisation.
`fake_quantize` clamps round(x / scale) to [qmin - zero_point, qmax - zero_point], the same numbers in exact
arithmetic with two passes fewer: in float32 both agree while |x / scale| and |zero_point| stay below 2**24.

Signed and unsigned codes. A signed code q of b bits is in -2**(b-1) … 2**(b-1) - 1. Stored codes are unsigned,
u = q + 2**(b-1) in 0 … 2**b - 1, so that bytes can be packed; the grid is the same, with its zero point shifted:

    x ≈ scale * (q - zero_point) = scale * (u - (zero_point + 2**(b-1)))

2**(b-1) is `code_offset`, and in Triton kernels `tl_code_offset` of `kernels/_triton.py`; no other code writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
"""Limits of the scales of `quantize_rows`, which are stored in float16: a smaller one would become 0, a larger one infinite."""


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

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.codes.device

    def sums(self) -> Tensor:
        """Return Σ_k codes, [M] int32, computed where it is not known."""
        return self.codes.sum(1, dtype=torch.int32) if self.code_sum is None else self.code_sum


def code_offset(bits: int) -> int:
    """Return 2**(bits - 1), which added to a signed code of `bits` bits makes it unsigned."""
    return 1 << (bits - 1)


def code_limits(bits: int) -> tuple[int, int]:
    """Return (qmin, qmax) of a signed code of `bits` bits."""
    return -code_offset(bits), code_offset(bits) - 1


def signed_codes(codes: Tensor, bits: int) -> Tensor:
    """Convert stored codes [...] uint8 of `bits` bits (1 to 8) to signed ones, int8."""
    return (codes.to(torch.int16) - code_offset(bits)).to(torch.int8)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Compute the codes of `x`.

    Args:
        x: [..., C] floating.
        scale, zero_point: broadcastable to x; scale > 0, zero_point integral.
        qmin, qmax: limits of the code, within int16.
    Returns: [..., C] int8 if the limits fit, else uint8 if they fit, else int16.
    """
    lower, upper = qmin - zero_point, qmax - zero_point
    codes = (x / scale).round_().clamp_(lower, upper).add_(zero_point)
    return codes.to(_code_dtype(qmin, qmax))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Compute scale * (codes - zero_point), in scale's dtype; shapes broadcast."""
    return (codes.to(scale.dtype) - zero_point).mul_(scale)


class _StraightThrough(torch.autograd.Function):
    """The function of `straight_through`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` [...] with the gradient of x [...]: what made it of x, such as rounding, counts as the identity.

    Source: the straight-through estimator, arXiv:1308.3432.
    """
    return _StraightThrough.apply(x, value) if x.requires_grad else value


def fake_quantize(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, *, inplace: bool = False) -> Tensor:
    """Compute dequantize(quantize(x)) without forming codes; where a gradient is wanted, rounding is straight-through.

    Args:
        x: [..., C] float32.
        scale: broadcastable to x, > 0.
        lower, upper: qmin - zero_point and qmax - zero_point, broadcastable, float32.
        inplace: write the result into x where no gradient is wanted, which saves a pass through memory.
    Returns: a tensor like x, new unless `inplace`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        y = x / scale
        return straight_through(y, y.round()).clamp(lower, upper) * scale
    return (x.div_(scale) if inplace else x / scale).round_().clamp_(lower, upper).mul_(scale)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Compute symmetric codes of x [..., C] with one scale per row.

    scale = max |x| / Q, code = clamp(round(x / scale), -Q, Q) + Q + 1, Q = 2**(bits - 1) - 1: code 0 never occurs. Scales are
    kept within float16's normal range: a row of zeros must not divide by zero, nor a row beyond the largest float16 by infinity.

    Returns: (codes 1 … 2Q + 1, uint8; scale [..., 1] float16).
    """
    x, (_, largest) = x.to(torch.float32), code_limits(bits)
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    codes = (x / scale.to(torch.float32)).round_().clamp_(-largest, largest).add_(code_offset(bits))
    return codes.to(torch.uint8), scale


def dequantize_rows(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Compute the values of `quantize_rows`'s codes [..., C] and scale [..., 1]: [..., C] float32."""
    return (codes.to(torch.float32) - code_offset(bits)).mul_(scale.to(torch.float32))


def _code_dtype(qmin: int, qmax: int) -> torch.dtype:
    if qmin >= -128 and qmax <= 127:
        return torch.int8
    if qmin >= 0 and qmax <= 255:
        return torch.uint8
    return torch.int16

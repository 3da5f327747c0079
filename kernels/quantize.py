"""The affine code of a number, the only place that writes this formula.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)          x ≈ scale * (q - zero_point)

Rounding is half to even. Source: RPTQ (arXiv:2304.01089), official quantiser; the field's affine quantisation.
`fake_quantize` clamps round(x / scale) to [qmin - zero_point, qmax - zero_point], the same numbers in exact
arithmetic with two passes fewer: in float32 both agree while |x / scale| and |zero_point| stay below 2**24.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
"""Limits of the scales of `quantize_rows`."""


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes of `x`.

    Args:
        x: [..., C] floating.
        scale, zero_point: broadcastable to x; scale > 0, zero_point integral.
        qmin, qmax: limits of the code, within int16.
    Returns: [..., C] int8 if the limits fit, else uint8 if they fit, else int16.
    """
    lower, upper = qmin - zero_point, qmax - zero_point
    codes = (x / scale).round_().clamp_(lower, upper).add_(zero_point)
    return codes.to(_code_dtype(qmin, qmax))


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes of x [..., C] with one scale per row: scale = max |x| / Q, code = clamp(round(x / scale), -Q, Q) + Q + 1.

    Returns: (codes 1 … 2Q + 1, uint8, with Q = 2**(bits - 1) - 1; scale [..., 1] float16).
    """
    x, largest = x.to(torch.float32), 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    codes = (x / scale.to(torch.float32)).round_().clamp_(-largest, largest).add_(largest + 1)
    return codes.to(torch.uint8), scale


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """scale * (codes - zero_point), in scale's dtype."""
    return (codes.to(scale.dtype) - zero_point).mul_(scale)


def fake_quantize(x: Tensor, scale: Tensor, lower: Tensor, upper: Tensor, *, inplace: bool = False) -> Tensor:
    """dequantize(quantize(x)) without forming codes.

    Args:
        x: [..., C] float32.
        scale: broadcastable to x, > 0.
        lower, upper: qmin - zero_point and qmax - zero_point, broadcastable, float32.
        inplace: put the result into x, which saves a pass through memory.
    Returns: a tensor like x, new unless `inplace`.
    """
    return (x.div_(scale) if inplace else x / scale).round_().clamp_(lower, upper).mul_(scale)


def _code_dtype(qmin: int, qmax: int) -> torch.dtype:
    if qmin >= -128 and qmax <= 127:
        return torch.int8
    if qmin >= 0 and qmax <= 255:
        return torch.uint8
    return torch.int16

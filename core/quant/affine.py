"""Choose scale and zero point for a range: the affine grid.

There are two rules. OFFICIAL is the published code's: the step is the range over 2**bits, so the largest value is one code
beyond the grid and is clipped by up to 1.5 steps; scale and zero point are clipped to 1e-4..1e4. EXACT has
2**bits - 1 steps in the range, so both ends are codes, and constants are represented exactly.

    OFFICIAL   scale = clip((max - min) / 2**bits, 1e-4, 1e4)     zero_point = round(clip(-(max + min) / (2 scale), ±1e4))
    EXACT      scale = (max - min) / (2**bits - 1)                zero_point = qmin - round(min / scale)

Codes are signed, from qmin to qmax of `kernels.code_limits`. Source: RPTQ (arXiv:2304.01089), official quantiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from core.errors import NumericError
from kernels import code_limits

MAX_ZERO_POINT = 2.0**22
"""Largest |zero point| of the EXACT rule: sums of code and zero point stay exact in float32."""

_TINY = torch.finfo(torch.float32).tiny


class Grid(StrEnum):
    """The rules by which a range becomes a grid of 2**bits codes."""

    OFFICIAL = "official"
    EXACT = "exact"


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of x ≈ scale * (q - zero_point): [...] float32 > 0, and [...] float32 holding integers."""

    scale: Tensor
    zero_point: Tensor


def choose_qparams(low: Tensor, high: Tensor, *, bits: int, grid: Grid, clip_zero_point: bool = True) -> QParams:
    """Choose scale and zero point for the range [low, high].

    Args:
        low, high: [...] floating, low <= high, in units of the tensor.
        bits: 2 to 8.
        clip_zero_point: keep the OFFICIAL rule's limit of ±1e4. It never matters for the paper's weights, but would clip weights
            above 1 in clusters of one column to a fraction of their value, so weights are quantised without it (docs/log.md).
    Returns: QParams of the same shape.
    Raises: NumericError if a bound is NaN or infinite.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NumericError(
            "A range to quantise holds NaN or infinity: check the model's weights and the calibration text.", code="E-NUM-NAN"
        )
    if grid is Grid.OFFICIAL:
        scale = ((high - low) * 2.0**-bits).clamp_(1e-4, 1e4)
        zero = -0.5 * (high + low) / scale
        return QParams(scale, (zero.clamp_(-1e4, 1e4) if clip_zero_point else zero).round_())
    return exact_qparams(low, high, bits=bits)


def exact_qparams(low: Tensor, high: Tensor, *, bits: int) -> QParams:
    """Compute the EXACT rule for finite float32 bounds low <= high [...], without looking at them: nothing waits for a device."""
    qmin, qmax = code_limits(bits)
    scale = high / (qmax - qmin) - low / (qmax - qmin)
    largest = torch.maximum(low.abs(), high.abs())
    scale = torch.where(scale > largest / MAX_ZERO_POINT, scale, largest)  # a constant c becomes one step of |c|
    scale = scale.clamp_min(_TINY)
    return QParams(scale, qmin - (low / scale).round_())


def round_scale(params: QParams, low: Tensor, dtype: torch.dtype, *, bits: int) -> QParams:
    """Round a scale to its stored type, and recompute the zero point for the rounded scale (EXACT rule).

    Weights store their scales in float16; codes are made with the rounded scale.

    Args:
        params: [...] of the EXACT rule.
        low: [...], the lower bounds that `params` was made from.
        dtype: floating type of the stored scale.
        bits: 2 to 8.
    Returns: QParams in float32 whose scale is exact in `dtype`.
    """
    scale = stored_scale(params.scale, dtype)
    qmin, _ = code_limits(bits)
    return QParams(scale, qmin - (low / scale).round_())


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales [...] > 0 to a floating type `dtype`: [...] float32.

    Scales below the type's normal range lose significant bits, so no scale becomes smaller than the smallest one with four of
    them, nor 0 (a cluster of one column often holds weights of 1e-4 and less).
    """
    info = torch.finfo(dtype)
    return scale.clamp(16 * info.smallest_normal * info.eps, info.max).to(dtype).to(torch.float32)

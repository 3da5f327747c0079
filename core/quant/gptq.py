"""Weight quantisation with static grouped scales: round-to-nearest and GPTQ, as pure functions of tensors.

GPTQ (Frantar et al., arXiv:2210.17323) rounds one input column after another and lets the columns not yet rounded
absorb the error, weighted by the inverse Hessian H = (2 / M) Xᵀ X. Scales and zero points come from the unmodified
weight, per output row and input cluster (RPTQ's published code), so groups need no re-fitting on the way.

The factor used is U with H⁻¹ = Uᵀ U, U upper triangular. With H = R Rᵀ, R upper triangular (the Cholesky factor of H with
rows and columns reversed), U = R⁻¹: one factorisation and one triangular inverse. Columns are kept as contiguous rows
of Wᵀ, and updates are made in two levels (16 columns inside 128) so that most of the work is matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import NumericError
from core.quant.affine import Grid, choose_qparams, round_scale
from core.quant.linear.quant import QuantizedWeight
from kernels import code_limits

BLOCK = 128
INNER = 16
DAMPING = 0.01
DAMPING_RETRIES = 3


@dataclass(frozen=True)
class WeightResult:
    """A quantised weight and how it came about.

    Attributes:
        method: "gptq" or "rtn".
        fallback: why GPTQ was not used although asked for, else None.
    """

    weight: QuantizedWeight
    method: str
    fallback: str | None = None


@dataclass(frozen=True)
class _Groups:
    """Per output row and cluster: scale and zero point, [N, G] float32, and code limits."""

    scale: Tensor
    zero_point: Tensor
    offsets: Tensor
    qmin: int
    qmax: int


def round_to_nearest(weight: Tensor, offsets: Tensor, *, bits: int, grid: Grid) -> WeightResult:
    """Quantise weight [N, K] per row and input cluster without a Hessian. offsets: [G + 1] int64."""
    groups = _choose_groups(weight, offsets, bits, grid)
    clusters = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=weight.device), offsets.diff())
    scale, zero = groups.scale[:, clusters], groups.zero_point[:, clusters]
    codes = torch.clamp((weight / scale).round_(), groups.qmin - zero, groups.qmax - zero).add_(zero)
    return WeightResult(_finish(codes, groups, bits, grid), "rtn")


def quantize_weight(weight: Tensor, hessian: Tensor | None, offsets: Tensor, *, bits: int, grid: Grid) -> WeightResult:
    """Quantise a weight with GPTQ, or round to nearest when `hessian` is None or cannot be factorised.

    Args:
        weight: [N, K] float32, columns in cluster order.
        hessian: [K, K] float32, proportional to Xᵀ X in the same order.
        offsets: [G + 1] int64.
        bits: 2 to 8.
    Raises: NumericError if the weight holds NaN or infinity.
    """
    if not _all_finite(weight):
        raise NumericError(
            f"A weight of shape {tuple(weight.shape)} holds {int((~torch.isfinite(weight)).sum())} NaN or "
            "infinite values: the checkpoint is damaged, download it again.",
            code="E-NUM-NAN",
        )
    if hessian is None:
        return round_to_nearest(weight, offsets, bits=bits, grid=grid)
    factor, problem = inverse_factor(hessian)
    if factor is None:
        result = round_to_nearest(weight, offsets, bits=bits, grid=grid)
        return WeightResult(result.weight, "rtn", problem)
    groups = _choose_groups(weight, offsets, bits, grid)
    dead = hessian.diagonal() <= 0
    columns = weight.t().contiguous()
    columns[dead] = 0
    codes = _gptq_columns(columns, factor, groups)
    return WeightResult(_finish(codes.t(), groups, bits, grid), "gptq")


def inverse_factor(hessian: Tensor) -> tuple[Tensor | None, str | None]:
    """U [K, K] upper triangular with (H + damping)⁻¹ = Uᵀ U, or (None, reason).

    Inputs that never fire (zero diagonal) are masked; damping starts at 1 % of the mean diagonal and grows tenfold up
    to three times while the factorisation fails.
    """
    if not _all_finite(hessian):
        return None, "the Hessian holds NaN or infinity"
    diagonal = hessian.diagonal()
    largest = float(diagonal.max())
    if largest <= 0:
        return None, "no input of this layer ever fired"
    dead = diagonal.flip(0) <= 0
    mean = float(diagonal.mean()) / largest
    for attempt in range(DAMPING_RETRIES + 1):
        damped = hessian.flip(0, 1).div_(largest)
        damped.diagonal()[dead] = 1.0
        damped.diagonal().add_(mean * DAMPING * 10**attempt)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            factor = _inverse_upper(lower.flip(0, 1))
            if _all_finite(factor):
                return factor, None
    return None, f"the Hessian is not positive definite even with {DAMPING * 10**DAMPING_RETRIES:g} damping"


def _all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: finite if their sum is, otherwise looked up one by one."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _inverse_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix by halves, n³ / 3 operations instead of the n³ of solving for the identity:
    the inverse of [[A, B], [0, C]] is [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]]."""
    size = len(upper)
    if size <= BLOCK:
        return torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype, device=upper.device), upper=True)
    half = size // 2
    out = torch.zeros_like(upper)
    out[:half, :half], out[half:, half:] = _inverse_upper(upper[:half, :half]), _inverse_upper(upper[half:, half:])
    out[:half, half:] = (out[:half, :half] @ upper[:half, half:] @ out[half:, half:]).neg_()
    return out


def _choose_groups(weight: Tensor, offsets: Tensor, bits: int, grid: Grid) -> _Groups:
    runs = weight.t().contiguous().split(offsets.diff().tolist())  # [columns of a cluster, N] each
    low, high = (torch.stack([reduce(run, 0) for run in runs], dim=1) for reduce in (torch.amin, torch.amax))
    if grid is Grid.EXACT:  # zero is a code, so zero points fit the code's own width
        low, high = low.clamp_max(0), high.clamp_min(0)
    params = choose_qparams(low, high, bits=bits, grid=grid, clip_zero_point=False)
    if grid is Grid.EXACT:
        params = round_scale(params, low, torch.float16, bits=bits)
    qmin, qmax = code_limits(bits)
    return _Groups(params.scale, params.zero_point, offsets, qmin, qmax)


def _gptq_columns(columns: Tensor, factor: Tensor, groups: _Groups) -> Tensor:
    """Codes [K, N] float of Wᵀ `columns` [K, N] (overwritten), rows rounded in order."""
    width = len(columns)
    codes = torch.empty_like(columns)
    clusters = torch.arange(len(groups.offsets) - 1, device=columns.device)
    channel_cluster = torch.repeat_interleave(clusters, groups.offsets.diff())
    zero = groups.zero_point.t().contiguous()  # [G, N]
    grids = list(zip(groups.scale.t().contiguous(), groups.qmin - zero, groups.qmax - zero, strict=True))
    factor = factor / factor.diagonal()[:, None]  # an error enters undivided
    errors = torch.empty(min(BLOCK, width), columns.shape[1], device=columns.device)
    rows = list(zip(columns, codes, (grids[c] for c in channel_cluster.tolist()), strict=True))
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        for inner in range(start, stop, INNER):
            end = min(inner + INNER, stop)
            for i in range(inner, end):
                column, rounded, (scale, lower, upper) = rows[i]
                torch.div(column, scale, out=rounded).round_().clamp_(lower, upper)
                error = torch.addcmul(column, rounded, scale, value=-1.0, out=errors[i - start])
                if i + 1 < end:
                    columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1.0)
            if end < stop:
                columns[end:stop].addmm_(factor[inner:end, end:stop].t(), errors[inner - start : end - start], alpha=-1.0)
        if stop < width:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1.0)
    return codes.add_(zero[channel_cluster])


def _finish(codes: Tensor, groups: _Groups, bits: int, grid: Grid) -> QuantizedWeight:
    """Signed float codes [N, K] -> stored types."""
    zero = groups.zero_point
    fits = (t for t in (torch.int8, torch.int16) if torch.iinfo(t).min <= zero.min() and zero.max() <= torch.iinfo(t).max)
    stored = next(fits, torch.int32)
    return QuantizedWeight(
        codes=(codes - groups.qmin).to(torch.uint8).contiguous(),
        scale=groups.scale.to(torch.float16 if grid is Grid.EXACT else torch.float32),
        zero_point=zero.to(stored),
        offsets=groups.offsets,
        bits=bits,
    )

"""Quantise weights with static grouped scales: round-to-nearest and GPTQ, as pure functions of tensors.

GPTQ (Frantar et al., arXiv:2210.17323) rounds one input column after another and corrects the columns not yet rounded
for its error, weighted by the inverse Hessian H = (2 / M) Xᵀ X. Scales and zero points come from the unmodified
weight, per output row and input cluster (RPTQ's published code); or, with `shrink`, of each cluster when its first column is
reached, from the corrected columns, by a search whose errors count as GPTQ counts them: (w - ŵ)² / U[i, i]².

The factor used is U with H⁻¹ = Uᵀ U, U upper triangular. With H = R Rᵀ, R upper triangular (the Cholesky factor of H with
rows and columns reversed), U = R⁻¹: one factorisation and one triangular inverse. Columns are kept as contiguous rows
of Wᵀ, and updates are made in two levels (16 columns inside 128) so that most of the work is matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import NumericError
from core.quant.affine import Grid, QParams, choose_qparams, round_scale
from core.quant.linear.quant import QuantizedWeight
from kernels import code_limits, fake_quantize

BLOCK = 128
"""Columns of the outer level: their effect on later columns is one matrix product per block."""
INNER = 16
"""Columns of the inner level: inside them every rounded column updates the others one by one."""
DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal, as in the published code."""
DAMPING_RETRIES = 3
"""Number of times that the damping grows tenfold before the layer falls back to round-to-nearest."""


@dataclass(frozen=True)
class WeightResult:
    """A quantised weight and the method that made it.

    Attributes:
        method: "gptq" or "rtn".
        fallback: why GPTQ was not used although asked for, else None.
    """

    weight: QuantizedWeight
    method: str
    fallback: str | None = None


@dataclass(frozen=True)
class _Groups:
    """Grid of a weight per output row and cluster: scale and zero point, [N, G] float32, and the code limits."""

    scale: Tensor
    zero_point: Tensor
    offsets: Tensor
    qmin: int
    qmax: int


def round_to_nearest(
    weight: Tensor, offsets: Tensor, *, bits: int, grid: Grid, shrink: tuple[float, ...] = (1.0,)
) -> WeightResult:
    """Quantise a weight to the nearest codes, without a Hessian.

    Args:
        weight: [N, K] float32, columns in cluster order.
        offsets: [G + 1] int64.
        bits: 2 to 8.
        grid: the rule that makes scales and zero points of ranges.
        shrink: factors of the range, of which each row and cluster takes that with the smallest squared error.
    """
    groups = _choose_groups(weight.t().contiguous(), offsets, bits, grid, shrink)
    clusters = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=weight.device), offsets.diff())
    scale, zero = groups.scale[:, clusters], groups.zero_point[:, clusters]
    codes = torch.clamp((weight / scale).round_(), groups.qmin - zero, groups.qmax - zero).add_(zero)
    return WeightResult(_finish(codes, groups, bits, grid), "rtn")


def fake_columns(
    columns: Tensor, offsets: Tensor, *, bits: int, grid: Grid, shrink: tuple[float, ...] = (1.0,)
) -> Tensor:
    """Compute what `round_to_nearest` makes of a weight, dequantised, without forming codes.

    Args:
        columns: Wᵀ [K, N] float32, in cluster order, so that a cluster is a contiguous run; overwritten.
        Others: as `round_to_nearest`.
    Returns: Ŵᵀ [K, N], in the memory of `columns`.
    """
    groups = _choose_groups(columns, offsets, bits, grid, shrink)
    scale, zero = groups.scale.t().contiguous(), groups.zero_point.t().contiguous()  # [G, N]
    for run, s, lower, upper in zip(
        columns.split(offsets.diff().tolist()), scale, groups.qmin - zero, groups.qmax - zero, strict=True
    ):
        fake_quantize(run, s, lower, upper, inplace=True)
    return columns


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    offsets: Tensor,
    *,
    bits: int,
    grid: Grid,
    shrink: tuple[float, ...] = (1.0,),
    order: Tensor | None = None,
) -> WeightResult:
    """Quantise a weight with GPTQ, or round to nearest when `hessian` is None or cannot be factorised.

    Args:
        weight: [N, K] float32, columns in cluster order.
        hessian: [K, K] float32, proportional to Xᵀ X in the same order, or in the one before `order`.
        offsets: [G + 1] int64.
        bits: 2 to 8.
        grid: the rule that makes scales and zero points of ranges.
        shrink: as in `round_to_nearest`; with more than one factor clusters are fitted while rounding.
        order: [K] int64, the weight's column i is the Hessian's column order[i]; None where they are in one order.
    Returns: the weight; method "rtn" and a reason in `fallback` where the Hessian could not be factorised.
    Raises: NumericError if the weight holds NaN or infinity.
    """
    if not _all_finite(weight):
        raise NumericError(
            f"A weight of shape {tuple(weight.shape)} holds {int((~torch.isfinite(weight)).sum())} NaN or "
            "infinite values: the checkpoint is damaged, download it again.",
            code="E-NUM-NAN",
        )
    if hessian is None:
        return round_to_nearest(weight, offsets, bits=bits, grid=grid, shrink=shrink)
    factor, problem = inverse_factor(hessian, order)
    if factor is None:
        result = round_to_nearest(weight, offsets, bits=bits, grid=grid, shrink=shrink)
        return WeightResult(result.weight, "rtn", problem)
    columns = weight.t().contiguous()
    groups = _choose_groups(columns, offsets, bits, grid)
    columns[_in_order(hessian.diagonal(), order) <= 0] = 0  # inputs that never fire
    importance = factor.diagonal() ** -2

    def fit(run: slice) -> _Groups:
        whole = torch.tensor([0, run.stop - run.start])
        return _choose_groups(columns[run], whole, bits, grid, shrink, importance[run])

    codes = _gptq_columns(columns, factor, groups, fit if len(shrink) > 1 else None)
    return WeightResult(_finish(codes.t(), groups, bits, grid), "gptq")


def inverse_factor(hessian: Tensor, order: Tensor | None = None) -> tuple[Tensor | None, str | None]:
    """Factorise the inverse of a damped Hessian: U [K, K] upper triangular with (H / max H + d I)⁻¹ = Uᵀ U.

    d starts at DAMPING times the mean diagonal and grows tenfold up to DAMPING_RETRIES times while the factorisation fails.

    Args:
        hessian: [K, K] float32, symmetric; its scale does not matter, because only ratios of U's entries are used.
        order: [K] int64, U's column i is the Hessian's column order[i]; None where they are in one order.
    Returns: (U, None), or (None, why there is none).
    """
    if not _all_finite(hessian):
        return None, "the Hessian holds NaN or infinity"
    diagonal = _in_order(hessian.diagonal(), order)
    largest = float(diagonal.max())
    if largest <= 0:
        return None, "no input of this layer ever fired"
    dead = diagonal.flip(0) <= 0  # inputs that are always 0: 1 on the diagonal keeps the matrix invertible
    mean = float(diagonal.mean()) / largest
    for attempt in range(DAMPING_RETRIES + 1):
        # lower factor of the reversed matrix, reversed back: R of H = R Rᵀ
        damped = hessian.flip(0, 1) if order is None else hessian[order.flip(0)][:, order.flip(0)]
        damped.div_(largest)
        damped.diagonal()[dead] = 1.0
        damped.diagonal().add_(mean * DAMPING * 10**attempt)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped  # each of these matrices has K² elements: no more than two of them live at once
        if int(info) == 0:
            upper = lower.flip(0, 1)
            del lower
            factor = _invert_upper(upper)
            if _all_finite(factor):
                return factor, None
    return None, f"the Hessian is not positive definite even with {DAMPING * 10**DAMPING_RETRIES:g} damping"


def _in_order(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else values[order]


def _all_finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite; each value is only tested if their sum is not finite, which may be an overflow."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _invert_upper(upper: Tensor) -> Tensor:
    """Invert an upper triangular matrix in place, by halves: the inverse of [[A, B], [0, C]] is [[A⁻¹, -A⁻¹ B C⁻¹], [0, C⁻¹]].

    n³ / 3 operations, most of them matrix products, instead of the n³ of solving for the identity.
    """
    size = len(upper)
    if size <= BLOCK:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
    half = size // 2
    first, last = _invert_upper(upper[:half, :half]), _invert_upper(upper[half:, half:])
    upper[:half, half:] = (first @ upper[:half, half:] @ last).neg_()
    return upper


def _choose_groups(
    columns: Tensor,
    offsets: Tensor,
    bits: int,
    grid: Grid,
    shrink: tuple[float, ...] = (1.0,),
    importance: Tensor | None = None,
) -> _Groups:
    """Choose scales and zero points from the ranges of the unmodified weight, per output row and cluster.

    Args: importance: [K], factors of the columns' squared errors while `shrink` is searched; None for equal ones.
    """
    sizes = offsets.diff().tolist()
    runs = columns.split(sizes)  # [columns of a cluster, N] each
    low, high = (torch.stack([reduce(run, 0) for run in runs], dim=1) for reduce in (torch.amin, torch.amax))
    if grid is Grid.EXACT:  # zero is a code, so zero points fit the width of a code
        low, high = low.clamp_max(0), high.clamp_min(0)
    qmin, qmax = code_limits(bits)

    def params_of(factor: float) -> QParams:
        params = choose_qparams(low * factor, high * factor, bits=bits, grid=grid, clip_zero_point=False)
        return round_scale(params, low * factor, torch.float16, bits=bits) if grid is Grid.EXACT else params

    def error_of(params: QParams) -> Tensor:
        weights = [None] * len(runs) if importance is None else importance[:, None].split(sizes)
        scale, zero = params.scale.t(), params.zero_point.t()  # [G, N]
        errors = []
        for run, weight, s, z in zip(runs, weights, scale, zero, strict=True):
            squared = fake_quantize(run, s, qmin - z, qmax - z).sub_(run).square_()
            errors.append((squared if weight is None else squared.mul_(weight)).sum(0))
        return torch.stack(errors, dim=1)

    best = params_of(shrink[0])
    least = error_of(best) if len(shrink) > 1 else None
    for factor in shrink[1:]:
        tried = params_of(factor)
        error = error_of(tried)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero_point, best.zero_point)
        best = QParams(scale, zero)
    return _Groups(best.scale, best.zero_point, offsets, qmin, qmax)


def _gptq_columns(
    columns: Tensor, factor: Tensor, groups: _Groups, fit: Callable[[slice], _Groups] | None = None
) -> Tensor:
    """Round the input columns one after another, each time correcting the columns that are not rounded yet.

    Args:
        columns: Wᵀ [K, N], so that an input column is a contiguous row; overwritten.
        factor: U [K, K] of `inverse_factor`; overwritten.
        groups: fitted again, in place, by `fit`, which is given a cluster's columns when the first of them is reached.
    Returns: signed codes [K, N] float.
    """
    width = len(columns)
    codes = torch.empty_like(columns)
    clusters = torch.arange(len(groups.offsets) - 1, device=columns.device)
    channel_cluster = torch.repeat_interleave(clusters, groups.offsets.diff())
    zero = groups.zero_point.t().contiguous()  # [G, N]
    grids = list(zip(groups.scale.t().contiguous(), groups.qmin - zero, groups.qmax - zero, strict=True))
    starts = {} if fit is None else {start: g for g, start in enumerate(groups.offsets.tolist()[:-1])}
    ends = groups.offsets.tolist()[1:]
    factor.div_(factor.diagonal()[:, None].clone())  # GPTQ divides the error by U[i, i]; with these rows it need not
    errors = torch.empty(min(BLOCK, width), columns.shape[1], device=columns.device)
    rows = list(zip(columns, codes, channel_cluster.tolist(), strict=True))
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        for inner in range(start, stop, INNER):
            end = min(inner + INNER, stop)
            for i in range(inner, end):  # round column i to x̂ = s clamp(round(x / s)), zero point added at the end
                column, rounded, cluster = rows[i]
                if i in starts:
                    own = fit(slice(i, ends[cluster]))
                    groups.scale[:, cluster], groups.zero_point[:, cluster] = own.scale[:, 0], own.zero_point[:, 0]
                    zero[cluster] = own.zero_point[:, 0]
                    grids[cluster] = own.scale[:, 0].contiguous(), own.qmin - zero[cluster], own.qmax - zero[cluster]
                scale, lower, upper = grids[cluster]
                torch.div(column, scale, out=rounded).round_().clamp_(lower, upper)
                error = torch.addcmul(column, rounded, scale, value=-1.0, out=errors[i - start])
                if i + 1 < end:  # the inner block is rounded next: update it at once
                    columns[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1.0)
            if end < stop:  # the rest of the block gets the errors of 16 columns in one product
                columns[end:stop].addmm_(factor[inner:end, end:stop].t(), errors[inner - start : end - start], alpha=-1.0)
        if stop < width:  # all later columns get the errors of the whole block in one large product
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1.0)
    return codes.add_(zero[channel_cluster])


def _finish(codes: Tensor, groups: _Groups, bits: int, grid: Grid) -> QuantizedWeight:
    """Convert signed float codes [N, K] and their grid to the types they are stored in."""
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

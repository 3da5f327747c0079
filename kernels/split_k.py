"""Finish a product whose reduction is split over programs: sum the parts, then scale and add a bias.

    y = ((Σ_s partial[s] - shift) · row) · column + bias

Partials are added in the order of s, so the result does not depend on which program ends first. Integer partials are
added as integers. Shapes: partial [S, M, N] float32 or int32; shift [M], int32; row [M] and column [N], float32.
Cost: 4 S bytes read per output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import on_its_device, tl, triton


@triton.jit
def _finish_kernel(
    partial_ptr, shift_ptr, row_ptr, column_ptr, bias_ptr, out_ptr, M, N, SPLIT,
    SHIFTED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    # In the order of s, not in the order in which programs end: float sums are then equal in every run.
    total = tl.load(partial_ptr + m * N + n, mask=inside, other=0)
    for s in range(1, SPLIT):
        total += tl.load(partial_ptr + (s * M + m) * N + n, mask=inside, other=0)
    if SHIFTED:
        total -= tl.load(shift_ptr + m)
    y = total.to(tl.float32)
    if SCALED:
        y = (y * tl.load(row_ptr + m)) * tl.load(column_ptr + n, mask=inside, other=0.0)
    if BIASED:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, y.to(out_ptr.dtype.element_ty), mask=inside)


@on_its_device
def finish(
    partial: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    shift: Tensor | None = None,
    row: Tensor | None = None,
    column: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Add the partial sums, then apply shift, factors and bias.

    Args:
        partial: [S, M, N] float32 or int32, contiguous.
        dtype: of the result.
        shift: [M] int32, subtracted from integer sums.
        row, column: [M] and [N] float32 factors, both or neither.
        bias: [N], added last.
    Returns: [M, N].
    """
    split, rows, width = partial.shape
    out = torch.empty(rows, width, dtype=dtype, device=partial.device)
    block = 1024
    _finish_kernel[(rows, triton.cdiv(width, block))](
        partial, shift, row, column, bias, out, rows, width, split,
        SHIFTED=shift is not None, SCALED=row is not None, BIASED=bias is not None, BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip
    return out

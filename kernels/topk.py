"""Quantise the k largest entries of a row by magnitude to INT8, and set the others to 0, in one pass.

    γ = max(max |x|, 1e-5)      code = round(127 x / γ) where |x| is among the k largest, else 0      value = code · γ / 127

k = max(1, int(keep · D)); among equal magnitudes the lowest index wins. The k-th largest magnitude is found bit by bit: the bits
of magnitudes, read as integers, sort like the magnitudes, so 31 counts over the row give it exactly (15 for bfloat16 and 18 for
float16, whose low bits are zero); a running count decides among equals. Source: BitNet a4.8 (arXiv:2411.04965), equation 1,
Q-Sparse (arXiv:2407.10969).
Cost: x read once, one byte written per entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import next_power, on_its_device, round_even, rows_strided, tl, triton
from kernels.backend import Backend, use_triton
from kernels.codes import Codes
from kernels.tiles import row_warps

EPS = 1e-5
_ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def reference(x: Tensor, count: int) -> Codes:
    """Compute `topk_quant` by a stable sort; `count` entries keep their code."""
    x = x.to(torch.float32)
    size = x.abs()
    largest = size.amax(-1, keepdim=True).clamp(min=EPS)
    first = size.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    kept = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, first, True)
    codes = ((x * (127.0 / largest)).round() * kept).to(torch.int8)
    return Codes(codes, largest / 127.0, codes.sum(-1, dtype=torch.int32))


@triton.jit
def _topk_kernel(x_ptr, codes_ptr, scale_ptr, sum_ptr, D, COUNT, stride_x, ZERO_BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < D
    x = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(x)
    # The bits of non-negative floats, read as integers, sort like the floats. Build the k-th largest magnitude from the highest
    # bit down: a bit stays set if at least k entries are at least the number so far. Entries beyond D are -1: never counted.
    bits = tl.where(inside, size.to(tl.int32, bitcast=True), -1)
    threshold = 0
    for i in tl.static_range(31 - ZERO_BITS):
        raised = threshold | (1 << (30 - i))
        enough = tl.sum((bits >= raised).to(tl.int32), axis=0) >= COUNT
        threshold = tl.where(enough, raised, threshold)
    # Entries above the threshold are fewer than k; those equal to it fill the remaining places, in order of their index.
    above = bits > threshold
    equal = bits == threshold
    room = COUNT - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
    largest = tl.maximum(tl.max(size, axis=0), 1e-5)
    code = tl.where(kept, round_even(x * tl.div_rn(127.0, largest)), 0.0).to(tl.int32)
    tl.store(codes_ptr + row * D + k, code.to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, tl.div_rn(largest, 127.0))
    tl.store(sum_ptr + row, tl.sum(code, axis=0))


@on_its_device
def launch(x: Tensor, count: int) -> Codes:
    """Run the kernel, one row per program."""
    x = rows_strided(x)
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    code_sum = torch.empty(rows, dtype=torch.int32, device=x.device)
    block = next_power(width)
    _topk_kernel[(rows,)](
        x, codes, scale, code_sum, width, count, x.stride(0), ZERO_BITS=_ZERO_BITS[x.dtype], BLOCK=block,
        num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return Codes(codes, scale, code_sum)


def topk_quant(x: Tensor, *, keep: float = 0.5, backend: Backend = Backend.AUTO) -> Codes:
    """Quantise rows and keep the largest entries.

    Args:
        x: [M, D] float32, bfloat16 or float16.
        keep: share of the entries that keep their code, 0 < keep <= 1.
        backend: AUTO takes Triton for CUDA tensors.
    Returns: codes [M, D] int8, their scale [M, 1] float32 and sums [M] int32; both paths give the same bits.
    Raises: ValueError for another share, or if TRITON is asked for where it cannot run.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"a share of {keep} cannot be kept: use a number above 0, at most 1")
    count = max(1, int(x.shape[1] * keep))
    unsupported_reason = None if x.dtype in _ZERO_BITS else f"inputs of {x.dtype} are not taken"
    run = use_triton(backend, x, unsupported_reason=unsupported_reason) and x.numel()
    return (launch if run else reference)(x, count)

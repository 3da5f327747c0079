"""Multiply packed ternary weights with integer inputs: the op `ternary_linear`, in Triton or torch.

    y[m, n] = ((Σ_k c[m, k] u[n, k] - Σ_k c[m, k]) s[m]) α[n]          u = t + 1, two bits, kept packed in memory

Using u instead of t leaves no subtraction in the inner loop; Σ c is given by the caller or computed here. The weight is the left
operand (see `kernels.linear.weight_only`), unpacked in registers; sums are int32, and programs that share a row add integers, so
every split gives the same result. Columns beyond K are masked in the codes. Cost: N K / 4 bytes of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import on_its_device, rows_strided, tl, triton
from kernels.backend import Backend, use_triton
from kernels.codes import Codes
from kernels.split_k import finish
from kernels.ternary.reference import reference
from kernels.tiles import DECODE_ROWS, Tile, decode_tile


@triton.jit
def _ternary_kernel(
    codes_ptr, packed_ptr, sum_ptr, input_scale_ptr, weight_scale_ptr, out_ptr,
    M, N, K, ROW_BYTES, stride_c,
    SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    share = tl.program_id(2)
    rows, tokens = n < N, m < M
    line = packed_ptr + n.to(tl.int64)[:, None] * ROW_BYTES
    token = codes_ptr + m.to(tl.int64)[None, :] * stride_c
    acc = tl.zeros((BN, BM), tl.int32)
    per_share = tl.cdiv(tl.cdiv(ROW_BYTES, BK), SPLIT) * BK
    for start in range(share * per_share, tl.minimum((share + 1) * per_share, ROW_BYTES), BK):
        j = start + tl.arange(0, BK)
        inside = j < ROW_BYTES
        packed = tl.load(line + j[None, :], mask=rows[:, None] & inside[None, :], other=0)
        for part in tl.static_range(4):
            k = part * ROW_BYTES + j
            codes = tl.load(token + k[:, None], mask=(inside & (k < K))[:, None] & tokens[None, :], other=0)
            acc = tl.dot(((packed >> (2 * part)) & 3).to(tl.int8), codes, acc, out_dtype=tl.int32)
    inside = rows[:, None] & tokens[None, :]
    out = out_ptr + (share * M + m).to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT == 1:
        acc -= tl.load(sum_ptr + m, mask=tokens, other=0)[None, :]
        y = acc.to(tl.float32) * tl.load(input_scale_ptr + m, mask=tokens, other=0.0)[None, :]
        tl.store(out, y * tl.load(weight_scale_ptr + n, mask=rows, other=0.0)[:, None], mask=inside)
    else:
        tl.store(out, acc, mask=inside)


@on_its_device
def launch(x: Codes, packed: Tensor, weight_scale: Tensor) -> Tensor:
    """Run the kernel; arguments as `ternary_linear`."""
    codes, code_sum = rows_strided(x.codes), x.sums()
    (tokens, width), (rows, row_bytes) = codes.shape, packed.shape
    row, column = x.scale.reshape(-1).contiguous(), weight_scale.reshape(-1).expand(rows).contiguous()
    tile = _tile(tokens, rows, row_bytes, codes.device)
    dtype = torch.float32 if tile.split == 1 else torch.int32
    out = torch.empty(tile.split, tokens, rows, dtype=dtype, device=codes.device)
    _ternary_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.columns), tile.split)](
        codes, packed.contiguous(), code_sum, row, column, out, tokens, rows, width, row_bytes, codes.stride(0),
        SPLIT=tile.split, BN=tile.rows, BM=tile.columns, BK=tile.block,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out[0] if tile.split == 1 else finish(out, shift=code_sum, row=row, column=column)


def _tile(tokens: int, rows: int, row_bytes: int, device: torch.device) -> Tile:
    if tokens <= DECODE_ROWS:
        return decode_tile(rows, row_bytes, block=128, device=device)
    return Tile(rows=128, columns=128, block=32, warps=8, stages=3)


def ternary_linear(x: Codes, packed: Tensor, weight_scale: Tensor, *, backend: Backend = Backend.AUTO) -> Tensor:
    """Apply a layer of packed ternary weights to integer codes.

    Args:
        x: codes [M, K] int8, -127 … 127 (8-bit) or -8 … 7 (4-bit inputs), and their scale [M, 1] float32.
        packed: [N, ceil(K / 4)] uint8 of `pack_ternary`.
        weight_scale: [N] float32, or 0-dim for all rows.
        backend: AUTO takes Triton for CUDA tensors.
    Returns: [M, N] float32; both paths give the same bits.
    Raises: ValueError if the shapes do not fit, or TRITON is asked for where it cannot run.
    """
    codes = x.codes
    if packed.shape[1] != -(-codes.shape[1] // 4) or codes.dtype is not torch.int8:
        raise ValueError(f"codes of {codes.shape[1]} columns ({codes.dtype}) do not fit packed rows of {packed.shape[1]} bytes")
    if use_triton(backend, codes) and len(codes):
        return launch(x, packed, weight_scale)
    return reference(x, packed, weight_scale)

"""Skip channels that are zero in ternary feed-forward layers, for one or two tokens: two ops.

    gated_up      h[m, f] = g[m, f] · up[m, f]     reads only rows f of W_up where some g is not 0
        sparse_down   y[m, n] = Σ_f c[m, f] t[n, f]    reads only columns f of W_down where some code is not 0

With ReLU² most of g is 0, and INT8 rounds more of h to 0; both skips are exact. The device writes the list of channels to keep,
indices in ascending order and their count: the host never waits for it, and programs beyond the count end at once. W_down is
stored a second time, transposed, so that a channel is one contiguous row. Partial sums of the down projection are added as
integers, atomically: the order does not matter. Two tokens take the union of their channels; from three tokens on the union is
nearly everything and the dense layer (`linear.py`) is used. Source: BitNet a4.8 (arXiv:2411.04965), section 2.1.
Cost: K / 4 bytes of W_up per non-zero gate and N / 4 bytes of W_down per non-zero code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import on_its_device, rows_strided, tl, triton
from kernels.backend import Backend, use_triton
from kernels.codes import Codes
from kernels.split_k import finish
from kernels.ternary.linear import ternary_linear
from kernels.tiles import multiprocessors

MAX_TOKENS = 2
"""Largest number of tokens for which a call skips channels."""


@triton.jit
def _compact_kernel(x_ptr, index_ptr, count_ptr, M, F, stride_x, BLOCK: tl.constexpr):
    # One program goes over all columns: the number of non-zero ones before a column is its place in the list.
    found = 0
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        live = tl.zeros((BLOCK,), tl.int32)
        for m in range(0, M):
            live |= (tl.load(x_ptr + m * stride_x + f, mask=f < F, other=0) != 0).to(tl.int32)
        place = found + tl.cumsum(live, axis=0) - 1
        tl.store(index_ptr + place, f, mask=live != 0)
        found += tl.sum(live, axis=0)
    tl.store(count_ptr, found)


@triton.jit
def _up_kernel(
    codes_ptr, packed_ptr, index_ptr, count_ptr, gate_ptr, sum_ptr, input_scale_ptr, weight_scale_ptr, out_ptr,
    K, F, ROW_BYTES, stride_c, stride_g, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1)
    place = tl.program_id(0) * BR + tl.arange(0, BR)
    count = tl.load(count_ptr)  # programs are launched for every channel: those beyond the count do nothing
    if tl.program_id(0) * BR < count:
        live = place < count
        f = tl.load(index_ptr + place, mask=live, other=0)
        line = packed_ptr + f.to(tl.int64)[:, None] * ROW_BYTES
        acc = tl.zeros((BR, BK), tl.int32)
        for start in range(0, ROW_BYTES, BK):
            j = start + tl.arange(0, BK)
            packed = tl.load(line + j[None, :], mask=live[:, None] & (j < ROW_BYTES)[None, :], other=0).to(tl.int32)
            for part in tl.static_range(4):
                k = part * ROW_BYTES + j
                codes = tl.load(codes_ptr + m * stride_c + k, mask=(j < ROW_BYTES) & (k < K), other=0).to(tl.int32)
                acc += ((packed >> (2 * part)) & 3) * codes[None, :]
        total = tl.sum(acc, axis=1) - tl.load(sum_ptr + m)
        y = (total.to(tl.float32) * tl.load(input_scale_ptr + m)) * tl.load(weight_scale_ptr + f, mask=live, other=0.0)
        y *= tl.load(gate_ptr + m * stride_g + f, mask=live, other=0.0)
        tl.store(out_ptr + m * F + f, y, mask=live)


@triton.jit
def _down_kernel(
    codes_ptr, transposed_ptr, index_ptr, count_ptr, out_ptr, N, ROW_BYTES, stride_c,
    SPLIT: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    share, m = tl.program_id(1), tl.program_id(2)
    count = tl.load(count_ptr)
    per_share = tl.cdiv(tl.cdiv(count, BF), SPLIT) * BF
    # A byte of W^T holds the weights of output channels j, j + n, j + 2n and j + 3n, n being ROW_BYTES: one sum for each.
    first = tl.zeros((BN,), tl.int32)
    second, third, fourth = first, first, first
    for start in range(share * per_share, tl.minimum((share + 1) * per_share, count), BF):
        place = start + tl.arange(0, BF)
        f = tl.load(index_ptr + place, mask=place < count, other=0)
        code = tl.load(codes_ptr + m * stride_c + f, mask=place < count, other=0).to(tl.int32)[:, None]
        mask = (place < count)[:, None] & (j < ROW_BYTES)[None, :]
        packed = tl.load(transposed_ptr + f.to(tl.int64)[:, None] * ROW_BYTES + j[None, :], mask=mask, other=0).to(tl.int32)
        first += tl.sum((packed & 3) * code, axis=0)
        second += tl.sum(((packed >> 2) & 3) * code, axis=0)
        third += tl.sum(((packed >> 4) & 3) * code, axis=0)
        fourth += tl.sum((packed >> 6) * code, axis=0)
    out = out_ptr + m * N + j
    inside = j < ROW_BYTES
    tl.atomic_add(out, first, mask=inside & (j < N))
    tl.atomic_add(out + ROW_BYTES, second, mask=inside & (ROW_BYTES + j < N))
    tl.atomic_add(out + 2 * ROW_BYTES, third, mask=inside & (2 * ROW_BYTES + j < N))
    tl.atomic_add(out + 3 * ROW_BYTES, fourth, mask=inside & (3 * ROW_BYTES + j < N))


@on_its_device
def compact(x: Tensor, *, backend: Backend = Backend.AUTO) -> tuple[Tensor, Tensor]:
    """List the columns of x that are not 0 in every row.

    Args:
        x: [M, F].
    Returns: (index [F] int32, ascending, of which the first `count` are set; count [1] int32).
    """
    x = rows_strided(x)
    index = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    if use_triton(backend, x):
        count = torch.empty(1, dtype=torch.int32, device=x.device)
        _compact_kernel[(1,)](x, index, count, len(x), x.shape[1], x.stride(0), BLOCK=4096, num_warps=8)
        return index, count
    live = (x != 0).any(dim=0).nonzero().flatten().to(torch.int32)
    index[: len(live)] = live
    return index, torch.tensor([len(live)], dtype=torch.int32, device=x.device)


@on_its_device
def gated_up(x: Codes, packed: Tensor, gate: Tensor, weight_scale: Tensor, *, backend: Backend = Backend.AUTO) -> Tensor:
    """Compute g · (x̂ Ŵ_upᵀ) without reading the rows of W_up whose gates are all 0.

    Args:
        x: codes [M, K] int8, scale [M, 1] float32.
        packed: [F, ceil(K / 4)] uint8 of `pack_ternary`; weight_scale: [F] float32 or 0-dim.
        gate: [M, F] float32, after its activation.
        backend: AUTO and TRITON skip for up to MAX_TOKENS tokens and are dense above; TRITON runs kernels in both cases.
    Returns: [M, F] float32; every path gives the same bits.
    """
    if not (use_triton(backend, x.codes) and 0 < len(x.codes) <= MAX_TOKENS):
        return ternary_linear(x, packed, weight_scale, backend=backend).mul_(gate)
    codes, gate = rows_strided(x.codes), rows_strided(gate)
    (tokens, width), (rows, row_bytes) = codes.shape, packed.shape
    index, count = compact(gate, backend=backend)
    out = torch.zeros(tokens, rows, dtype=torch.float32, device=codes.device)
    block = 16
    _up_kernel[(triton.cdiv(rows, block), tokens)](
        codes, packed.contiguous(), index, count, gate, x.sums(), x.scale.reshape(-1).contiguous(),
        weight_scale.reshape(-1).expand(rows).contiguous(), out, width, rows, row_bytes, codes.stride(0), gate.stride(0),
        BR=block, BK=256, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@on_its_device
def sparse_down(
    x: Codes, packed: Tensor, transposed: Tensor, weight_scale: Tensor, *, backend: Backend = Backend.AUTO
) -> Tensor:
    """Compute x̂ Ŵᵀ without reading the columns of W whose codes are all 0.

    Args:
        x: codes [M, F] int8, scale [M, 1] float32.
        packed: [N, ceil(F / 4)] uint8 of `pack_ternary`, for the dense path.
        transposed: [F, ceil(N / 4)] uint8, the same weight transposed and packed.
        weight_scale: [N] float32 or 0-dim.
        backend: as `gated_up`.
    Returns: [M, N] float32; every path gives the same bits.
    """
    if not (use_triton(backend, x.codes) and 0 < len(x.codes) <= MAX_TOKENS):
        return ternary_linear(x, packed, weight_scale, backend=backend)
    codes = rows_strided(x.codes)
    tokens, rows, row_bytes = len(codes), len(packed), transposed.shape[1]
    index, count = compact(codes, backend=backend)
    block, channels = 256, 16
    split = max(1, min(-(-len(transposed) // (4 * channels)), 2 * multiprocessors(codes.device) // triton.cdiv(row_bytes, block)))
    total = torch.zeros(1, tokens, rows, dtype=torch.int32, device=codes.device)
    _down_kernel[(triton.cdiv(row_bytes, block), split, tokens)](
        codes, transposed.contiguous(), index, count, total, rows, row_bytes, codes.stride(0),
        SPLIT=split, BF=channels, BN=block, num_warps=4,
    )  # fmt: skip
    column = weight_scale.reshape(-1).expand(rows).contiguous()
    return finish(total, shift=x.sums(), row=x.scale.reshape(-1).contiguous(), column=column)

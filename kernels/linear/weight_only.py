"""TRITON: packed weights of 2, 3, 4 or 8 bits and a floating-point input: y = x Ŵᵀ + b.

    Ŵ[n, k] = s[n, c] (u[n, k] - z[n, c])           u the stored code, z = zero point + code_offset(bits), c = cluster of column k
    y[m, n] = Σ_c s[n, c] ( Σ_k u[n, k] x[m, k]  -  z[n, c] Σ_k x[m, k] ) + b[n]

Clusters are contiguous runs of columns at any boundaries. Codes are small integers, exact in bfloat16: weights are never
rounded, and scale and zero point are applied to sums in float32. A quantised input is dequantised before.

The weight is the left operand of the product, so that unpacked codes go from registers directly into the matrix
instruction. The layout is that of `kernels.packing`: one byte holds columns j, j + n, j + 2n, ..., so a block of bytes
unpacks into one tile per part of the row, each multiplied with its own part of x. 3 bits are a plane of 2 and a plane of 1.
At 2 to 4 bits and bfloat16, OR 0x4300 makes the number 128 + u; z grows by 128, and Σ x is that of the rounded x.
A run of blocks may cross cluster boundaries: `_pieces` cuts the row wherever a part does, and x is masked to the columns
of the piece. Cost: N K bits / 8 bytes of weights, read once while M <= 16.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._triton import INTERPRET, matrix_operand, on_its_device, rows_strided, tl, tl_code_offset, triton
from kernels.backend import Backend, use_triton
from kernels.codes import code_offset, dequantize
from kernels.linear.operands import LinearOperands
from kernels.packing import packed_width, unpack
from kernels.split_k import finish
from kernels.tiles import DECODE_ROWS, Tile, decode_tile

PARTS = {2: 4, 3: 8, 4: 2, 8: 1}
"""Columns of a row that one step of the kernel covers for every byte that it loads."""

MAX_ROWS = 256
"""Number of rows above which AUTO takes a dequantised weight and torch's matrix product. Published weight-only kernels lose to
cuBLAS from about 64 to 256 rows on Hopper (GemLite, Marlin: 0.3x to 0.5x at 512); ours is not measured."""


def reference(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, offsets: tuple[int, ...], bias: Tensor | None
) -> Tensor:
    """Compute the layer by torch: Ŵ in float32, rounded to x's type, and its product with x."""
    wide = [t.to(torch.float32) for t in (scale, zero_point)]  # [N, 1]: broadcast
    if len(offsets) > 2:
        lengths = _lengths(offsets, x.device)
        wide = [t.repeat_interleave(lengths, dim=1, output_size=offsets[-1]) for t in wide]
    weight = dequantize(unpack(packed, bits, offsets[-1]), wide[0], wide[1] + code_offset(bits))
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@triton.jit
def _codes(first, second, high, PART: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Make a matrix operand of the codes of one part of a block of bytes: u, or 128 + u where dtype is bfloat16 and BITS < 8."""
    if BITS == 3:
        low = first if PART % 2 == 0 else second
        code = ((low >> (2 * (PART // 2))) & 3) | (((high >> PART) & 1) << 2)
    elif BITS == 8:
        code = first
    else:
        code = (first >> (BITS * PART)) & (2**BITS - 1)
    if dtype == tl.bfloat16 and BITS < 8:
        return matrix_operand((code | 0x4300).to(tl.bfloat16, bitcast=True))
    if INTERPRET:
        return code.to(tl.float32)
    return code.to(dtype)


@triton.jit
def _weight_only_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, pieces_ptr, bias_ptr, out_ptr,
    M, N, K, PART_BYTES, ROW_BYTES, CLUSTERS, STEPS, stride_x,
    BITS: tl.constexpr, PARTS: tl.constexpr, CLUSTERED: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    share = tl.program_id(2)
    rows, tokens = n < N, m < M
    token = x_ptr + m.to(tl.int64)[None, :] * stride_x
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offset = tl_code_offset(BITS)
    if dtype == tl.bfloat16 and BITS < 8:
        offset += 128.0
    byte = tl.arange(0, BK)
    line = packed_ptr + n.to(tl.int64)[:, None] * ROW_BYTES
    acc = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    per_share = tl.cdiv(STEPS, SPLIT)
    for step in range(share * per_share, tl.minimum((share + 1) * per_share, STEPS)):
        if CLUSTERED:
            piece = pieces_ptr + step * (3 + PARTS)
            j = tl.load(piece) * BK + byte
            used = (j >= tl.load(piece + 1)) & (j < tl.load(piece + 2))
        else:
            j = step * BK + byte
            used = j < PART_BYTES
        inside = j < PART_BYTES
        here = rows[:, None] & inside[None, :]
        first = tl.load(line + j[None, :], mask=here, other=0).to(tl.int16)
        second, high = first, first
        if BITS == 3:
            second = tl.load(line + PART_BYTES + j[None, :], mask=here, other=0).to(tl.int16)
            high = tl.load(line + 2 * PART_BYTES + j[None, :], mask=here, other=0).to(tl.int16)
        for part in tl.static_range(PARTS):
            k = part * PART_BYTES + j
            x = tl.load(token + k[:, None], mask=(inside & (k < K))[:, None] & tokens[None, :], other=0.0)
            if CLUSTERED:  # not in the load's mask, which would then not vectorise
                x = tl.where(used[:, None], x, 0.0)
            x = matrix_operand(x)
            w = _codes(first, second, high, part, BITS, dtype)
            if CLUSTERED:
                s = tl.load(scale_ptr + n * CLUSTERS + tl.load(piece + 3 + part), mask=rows, other=0.0).to(tl.float32)
                z = tl.load(zero_ptr + n * CLUSTERS + tl.load(piece + 3 + part), mask=rows, other=0).to(tl.float32) + offset
                product = tl.dot(w, x, input_precision="tf32x3")
                acc += s[:, None] * (product - z[:, None] * tl.sum(x.to(tl.float32), axis=0)[None, :])
            else:
                acc = tl.dot(w, x, acc, input_precision="tf32x3")
                sums += tl.sum(x.to(tl.float32), axis=0)
    if not CLUSTERED:
        s = tl.load(scale_ptr + n, mask=rows, other=0.0).to(tl.float32)
        z = tl.load(zero_ptr + n, mask=rows, other=0).to(tl.float32) + offset
        acc = s[:, None] * (acc - z[:, None] * sums[None, :])
    if BIASED:
        acc += tl.load(bias_ptr + n, mask=rows, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (share * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=rows[:, None] & tokens[None, :])


@on_its_device
def launch(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, offsets: tuple[int, ...], bias: Tensor | None
) -> Tensor:
    """Run the kernel, and the sum over shares where the reduction is split; arguments as `weight_only_linear`."""
    x = rows_strided(x)
    (tokens, width), rows, parts = x.shape, packed.shape[0], PARTS[bits]
    part_bytes, clustered = -(-width // parts), len(offsets) > 2
    tile = _tile(tokens, rows, part_bytes, bits, clustered=clustered, wide=x.dtype is torch.float32, device=x.device)
    pieces = _pieces(offsets, parts, tile.block, x.device) if clustered else None
    steps = len(pieces) if clustered else -(-part_bytes // tile.block)
    split = min(tile.split, steps)
    partial = torch.empty(split, tokens, rows, dtype=torch.float32 if split > 1 else x.dtype, device=x.device)
    _weight_only_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.columns), split)](
        x, packed.contiguous(), scale.contiguous(), zero_point.contiguous(), pieces, bias if split == 1 else None, partial,
        tokens, rows, width, part_bytes, packed.shape[1], len(offsets) - 1, steps, x.stride(0),
        BITS=bits, PARTS=parts, CLUSTERED=clustered, BIASED=bias is not None and split == 1, SPLIT=split,
        BN=tile.rows, BM=tile.columns, BK=tile.block, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial[0] if split == 1 else finish(partial, dtype=x.dtype, bias=bias)


def _tile(tokens: int, rows: int, part_bytes: int, bits: int, *, clustered: bool, wide: bool, device: torch.device) -> Tile:
    """Choose a tile. Float32 inputs (`wide`), several clusters and 3 bits need more registers per step: smaller steps."""
    block = {2: 64, 3: 32, 4: 128, 8: 64}[bits]
    if clustered:
        block = 64 if bits == 4 else 32
    if wide:
        block = 16 if bits == 3 or tokens > DECODE_ROWS else 32
    if tokens <= DECODE_ROWS:
        return decode_tile(rows, part_bytes, block=block, device=device)
    narrow = wide or clustered or bits == 3
    return Tile(
        rows=64 if narrow else 128, columns=64, block=min(block, 16 if bits == 3 else 32 if narrow else 64), warps=4, stages=3
    )


@functools.cache
def _lengths(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Count the columns of each cluster, [G]; cached, because a copy to the device makes the host wait."""
    return torch.tensor(offsets, device=device).diff()


@functools.cache  # never freed: captured graphs keep reading it
def _pieces(offsets: tuple[int, ...], parts: int, block: int, device: torch.device) -> Tensor:
    """Cut a row of bytes so that inside a piece every part belongs to one cluster and one block.

    Returns: [P, 3 + parts] int32: number of the block, first and last + 1 byte of the piece, cluster of each part.
    """
    width = offsets[-1]
    size = -(-width // parts)
    cuts = {*range(0, size, block), size}
    cuts |= {o % size for o in offsets if o < width}
    cuts = sorted(cuts)
    table = [
        [lo // block, lo, hi, *(bisect_right(offsets, min(p * size + lo, width - 1)) - 1 for p in range(parts))]
        for lo, hi in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


def unsupported_reason(bits: int, width: int) -> str | None:
    """Say why the kernel cannot take packed weights of `width` columns, None if it can."""
    if bits not in PARTS:
        return f"{bits}-bit weights have no kernel"
    if bits == 3 and width % 8:
        return f"the planes of {width} 3-bit columns do not line up; a multiple of 8 is needed"
    return None


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    offsets: tuple[int, ...],
    bias: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Apply a layer of packed weights to floats.

    Args:
        x: [M, K] float32, bfloat16 or float16, any strides.
        packed: [N, packed_width(K, bits)] uint8 of `kernels.pack`.
        scale: [N, G] floating; zero_point: [N, G] integer; Ŵ = scale * (code - code_offset(bits) - zero_point).
        bits: 2 to 8; the kernel takes 2, 3, 4 and 8.
        offsets: boundaries of the G clusters of columns, 0 … K.
        bias: [N] or None.
        backend: AUTO takes Triton for CUDA tensors of up to MAX_ROWS rows.
    Returns: [M, N] in x's type.
    Raises: ValueError if the shapes do not fit, or TRITON is asked for where it cannot run.
    """
    width = offsets[-1]
    if x.shape[1] != width or packed.shape[1] != packed_width(width, bits) or scale.shape != (len(packed), len(offsets) - 1):
        raise ValueError(f"an input of {x.shape[1]} columns and weights of {width} columns at {bits} bits do not fit each other")
    taken = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    reason = unsupported_reason(bits, width) if taken else f"inputs of {x.dtype} are not taken"
    run = use_triton(backend, x, unsupported_reason=reason)
    if backend is Backend.AUTO and len(x) > MAX_ROWS:
        run = False
    function = launch if run and len(x) else reference
    return function(x, packed, scale, zero_point, bits=bits, offsets=offsets, bias=bias)


@dataclass(frozen=True)
class WeightOnlyOperands(LinearOperands):
    """Operands of TRITON for float inputs: the stored weight itself, with the arguments of `weight_only_linear`.

    `backend` is TRITON where it was asked for by name, so that no call falls back to torch, else AUTO.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    bits: int
    offsets: tuple[int, ...]
    backend: Backend = Backend.AUTO

    def product(self, x: Tensor) -> Tensor:
        """Compute the layer for x [..., K] floating: [..., N] in x's type."""
        y = weight_only_linear(
            x.reshape(-1, x.shape[-1]), self.packed, self.scale, self.zero_point,
            bits=self.bits, offsets=self.offsets, bias=self.bias, backend=self.backend,
        )  # fmt: skip
        return y.view(*x.shape[:-1], len(self.packed))

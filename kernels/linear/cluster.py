"""TRITON: 4-bit weights and integer inputs, one scale per cluster of whole blocks of columns.

    y[m, n] = Σ_b o[n, c(b)] ( Σ_{k in b} qx qw ) - Σ_b r[n, c(b)] Σ_{k in b} qx  +  b'[n]
    o = sx sw        r = sx sw zw        b' = b - Σ_c sx zx Σ_k Ŵ[n, k]       (the integer identity of kernels/linear/__init__.py)

b runs over blocks of BK columns, and `block_clusters` gives the cluster of each. The loop over K is flat and needs no table of
segments: with one cluster everything is summed in int32 and scaled once, with several each block is converted to float32. The
activations' zero points are constants in b'; the weights' need Σ qx per block, computed in one pass over the codes.

Weights stay packed (layout of `kernels.packing`): byte ^ 0x88 makes both nibbles two's complement, and the int8 operands are 16
times the code, (p << 4) and (p & 0xF0), so that no nibble has to be moved down and sign-extended; 1/16 is part of the scale.
They are the left operand of the product (see `kernels.linear.weight_only`). With few tokens several programs share the blocks
of a tile: each applies the scales and zero points of its own blocks, and their sums are added in a fixed order. Clusters with
other boundaries, and widths that are not two halves of whole blocks, are not supported: `unsupported_reason` says so, and AUTO
runs the reference.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels._triton import on_its_device, rows_strided, tl, triton
from kernels.backend import Backend, use_triton
from kernels.codes import signed_codes
from kernels.linear.operands import LinearOperands
from kernels.packing import unpack
from kernels.split_k import finish
from kernels.tiles import DECODE_ROWS, Tile, decode_tile

BLOCKS = (128, 64, 32)
"""Block sizes that the kernel is compiled for, largest first: smaller blocks are converted to float32 more often."""


def reference(
    codes: Tensor, packed: Tensor, output_scale: Tensor, zero_rows: Tensor | None, bias: Tensor | None, offsets: tuple[int, ...]
) -> Tensor:
    """Compute the layer by torch, cluster by cluster in float64: exact before the scales."""
    weight = signed_codes(unpack(packed, 4, offsets[-1]), 4).to(torch.float64)
    y = torch.zeros(len(codes), len(packed), dtype=torch.float64, device=codes.device)
    for c, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        part = codes[:, start:stop].to(torch.float64)
        y += (part @ weight[:, start:stop].T) * output_scale[c]
        if zero_rows is not None:
            y -= part.sum(1, keepdim=True) * zero_rows[c]
    return (y if bias is None else y + bias).to(torch.float32)


@triton.jit
def _sums_kernel(codes_ptr, sums_ptr, M, K, stride_c, BK: tl.constexpr, BM: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    k = block * BK + tl.arange(0, BK)
    codes = tl.load(
        codes_ptr + m.to(tl.int64)[:, None] * stride_c + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0
    )
    tl.store(sums_ptr + block * M + m, tl.sum(codes.to(tl.int32), axis=1).to(tl.float32), mask=m < M)


@triton.jit
def _cluster_kernel(
    codes_ptr, packed_ptr, scale_ptr, zero_ptr, sums_ptr, clusters_ptr, bias_ptr, out_ptr,
    M, N, HALF, stride_c,
    CLUSTERED: tl.constexpr, ZEROS: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    share = tl.program_id(2)
    rows, tokens = n < N, m < M
    line = packed_ptr + n.to(tl.int64)[:, None] * HALF
    token = codes_ptr + m.to(tl.int64)[None, :] * stride_c
    blocks = HALF // BK
    per_share = tl.cdiv(blocks, SPLIT)
    first = share * per_share
    last = tl.minimum(first + per_share, blocks)
    y = tl.zeros((BN, BM), tl.float32)
    acc = tl.zeros((BN, BM), tl.int32)
    for b in range(first, last):
        j = b * BK + tl.arange(0, BK)
        packed = tl.load(line + j[None, :], mask=rows[:, None], other=0) ^ 0x88
        for part in tl.static_range(2):
            codes = tl.load(token + (part * HALF + j)[:, None], mask=tokens[None, :], other=0)
            nibble = packed & 0xF0 if part == 1 else packed << 4
            weight = nibble.to(tl.int8, bitcast=True)
            block = part * blocks + b
            if CLUSTERED:
                c = tl.load(clusters_ptr + block)
                product = tl.dot(weight, codes, out_dtype=tl.int32)
                y += product.to(tl.float32) * tl.load(scale_ptr + c * N + n, mask=rows, other=0.0)[:, None]
            else:
                acc = tl.dot(weight, codes, acc, out_dtype=tl.int32)
    if not CLUSTERED:
        y = acc.to(tl.float32) * tl.load(scale_ptr + n, mask=rows, other=0.0)[:, None]
    y *= 0.0625
    if ZEROS:
        own = last - first
        for i in range(0, 2 * own):  # its blocks in both halves
            block = first + i + tl.where(i < own, 0, blocks - own)
            c = tl.load(clusters_ptr + block)
            r = tl.load(zero_ptr + c * N + n, mask=rows, other=0.0)
            y -= r[:, None] * tl.load(sums_ptr + block * M + m, mask=tokens, other=0.0)[None, :]
    if BIASED:
        y += tl.load(bias_ptr + n, mask=rows, other=0.0)[:, None]
    tl.store(out_ptr + (share * M + m).to(tl.int64)[None, :] * N + n[:, None], y, mask=rows[:, None] & tokens[None, :])


@on_its_device
def launch(
    codes: Tensor, packed: Tensor, output_scale: Tensor, zero_rows: Tensor | None, bias: Tensor | None, offsets: tuple[int, ...]
) -> Tensor:
    """Run the kernels; arguments as `cluster_linear`."""
    codes = rows_strided(codes)
    (tokens, width), rows, size = codes.shape, len(packed), block_size(offsets)
    clusters = _block_clusters(offsets, size, codes.device)
    sums = None
    if zero_rows is not None:
        sums = torch.empty(width // size, tokens, dtype=torch.float32, device=codes.device)
        _sums_kernel[(triton.cdiv(tokens, 16), width // size)](codes, sums, tokens, width, codes.stride(0), BK=size, BM=16)
        zero_rows = zero_rows.contiguous()
    tile = _tile(tokens, rows, width // 2, size, codes.device)
    out = torch.empty(tile.split, tokens, rows, dtype=torch.float32, device=codes.device)
    _cluster_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.columns), tile.split)](
        codes, packed.contiguous(), output_scale.contiguous(), zero_rows, sums, clusters, bias if tile.split == 1 else None, out,
        tokens, rows, width // 2, codes.stride(0),
        CLUSTERED=len(offsets) > 2, ZEROS=zero_rows is not None, BIASED=bias is not None and tile.split == 1, SPLIT=tile.split,
        BN=tile.rows, BM=tile.columns, BK=tile.block, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out[0] if tile.split == 1 else finish(out, bias=bias)


def _tile(tokens: int, rows: int, half: int, size: int, device: torch.device) -> Tile:
    if tokens <= DECODE_ROWS:
        return decode_tile(rows, half, block=size, device=device)
    return Tile(rows=128, columns=128, block=size, warps=8, stages=3)


def block_size(offsets: tuple[int, ...]) -> int | None:
    """Return the largest block that divides every boundary and half the width; None if there is none."""
    return next((b for b in BLOCKS if offsets[-1] % (2 * b) == 0 and all(o % b == 0 for o in offsets)), None)


@functools.cache  # never freed: captured graphs keep reading it
def _block_clusters(offsets: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """List the cluster of each block, [K / size] int32."""
    clusters = [bisect_right(offsets, start) - 1 for start in range(0, offsets[-1], size)]
    return torch.tensor(clusters, dtype=torch.int32, device=device)


def unsupported_reason(offsets: tuple[int, ...]) -> str | None:
    """Say why the kernel cannot take clusters with these boundaries, None if it can."""
    if block_size(offsets) is None:
        return f"clusters of {offsets[-1]} columns must begin at multiples of {BLOCKS[-1]}, and so must half the width"
    return None


def cluster_linear(
    codes: Tensor,
    packed: Tensor,
    output_scale: Tensor,
    zero_rows: Tensor | None,
    bias: Tensor | None,
    *,
    offsets: tuple[int, ...],
    backend: Backend = Backend.AUTO,
) -> Tensor:
    """Apply a layer of 4-bit weights to integer codes.

    Args:
        codes: [M, K] int8, the input's codes qx (8 bits or fewer).
        packed: [N, K / 2] uint8 of `kernels.pack` at 4 bits, unsigned codes qw + code_offset(4).
        output_scale: [G, N] float32, sx sw.
        zero_rows: [G, N] float32, sx sw zw; None where every weight zero point is 0.
        bias: [N] float32, b', or None.
        offsets: boundaries of the G clusters of columns, 0 … K.
        backend: AUTO takes Triton for CUDA tensors and clusters of whole blocks.
    Returns: [M, N] float32.
    Raises: ValueError if the shapes do not fit, or TRITON is asked for where it cannot run.
    """
    width = offsets[-1]
    if codes.shape[1] != width or packed.shape[1] != -(-width // 2) or output_scale.shape != (len(offsets) - 1, len(packed)):
        raise ValueError(f"codes of {codes.shape[1]} columns and weights of {width} columns do not fit each other")
    run = use_triton(backend, codes, unsupported_reason=unsupported_reason(offsets)) and len(codes)
    return (launch if run else reference)(codes, packed, output_scale, zero_rows, bias, offsets)


@dataclass(frozen=True)
class ClusterOperands(LinearOperands):
    """Operands of TRITON for integer inputs: the stored weight itself, with the other arguments of `cluster_linear`.

    `backend` is TRITON where it was asked for by name, so that no call falls back to torch, else AUTO.
    """

    takes_codes: ClassVar[bool] = True
    packed: Tensor
    output_scale: Tensor
    zero_rows: Tensor | None
    bias: Tensor | None
    offsets: tuple[int, ...]
    backend: Backend = Backend.AUTO

    def product(self, x: Tensor) -> Tensor:
        """Compute the layer for codes x [M, K] int8: [M, N] float32."""
        scales = self.output_scale, self.zero_rows, self.bias
        return cluster_linear(x, self.packed, *scales, offsets=self.offsets, backend=self.backend)

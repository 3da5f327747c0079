"""Store ternary weights and multiply with them in plain torch: y[m, n] = (Σ c[m, k] t[n, k]) s[m] α[n].

Codes c are int8 (-127 … 127), t is -1, 0 or 1 and stored as t + 1 in two bits: byte j of a row holds columns j, j + n, j + 2n and
j + 3n, n being the row's bytes (the layout of `kernels.packing`). The sum is exact, in int32 or in float32 alike: |Σ| <= 127 K
stays below 2**24 for K < 132,104. Every path below therefore gives the same bits, and the scales are applied in one order.

    REFERENCE  codes and t in float32, float32 matrix product
    INT8       `torch._int_mm` on int8 codes and int8 t

Skipping rows of W whose output will be multiplied by zero is exact too, but the gather copies the kept rows, and on CPUs with
VNNI the dense product of one row takes less time than that copy: see ROW_DENSITY. Source: BitNet b1.58 (arXiv:2402.17764),
BitNet a4.8 (arXiv:2411.04965).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.codes import Codes
from kernels.packing import pack, unpack

ROW_DENSITY = 0.08
"""Share of rows up to which a gathered product of one token is cheaper than the dense one (one thread, VNNI, 6912 x 2560: gather
and product of 20 % of the rows 2.5 ms, dense 1.3 ms; equal near 10 %). Gathering columns never is: every row is touched."""


def pack_ternary(ternary: Tensor) -> Tensor:
    """Pack t [N, K] int8 in {-1, 0, 1}: [N, ceil(K / 4)] uint8. Columns beyond K are packed as zero bits."""
    return pack((ternary + 1).to(torch.uint8), 2)


def unpack_ternary(packed: Tensor, width: int) -> Tensor:
    """Unpack the result of `pack_ternary`: [N, ceil(width / 4)] uint8 -> [N, width] int8."""
    return unpack(packed, 2, width).to(torch.int8).sub_(1)


def reference(x: Codes, packed: Tensor, weight_scale: Tensor) -> Tensor:
    """Apply a layer from its stored form: by `torch._int_mm` on CPUs, where it takes every shape, elsewhere in float32.

    Args:
        x: codes [M, K] int8, scale [M, 1] float32.
        packed: [N, ceil(K / 4)] uint8 of `pack_ternary`.
        weight_scale: [N] float32, or one number for all rows (0-dim).
    Returns: [M, N] float32.
    """
    weight, backend = unpack_ternary(packed, x.codes.shape[1]), Backend.INT8
    if x.device.type != "cpu":
        weight, backend = weight.to(torch.float32), Backend.REFERENCE
    return apply_scales(ternary_product(x.codes, weight, backend), x.scale, weight_scale)


def ternary_product(codes: Tensor, ternary: Tensor, backend: Backend) -> Tensor:
    """Compute Σ_k c t, exactly.

    Args:
        codes: [M, K] int8.
        ternary: [N, K], int8 for INT8 and float32 for REFERENCE.
    Returns: [M, N] float32 holding integers.
    """
    if backend is Backend.REFERENCE:
        return torch.nn.functional.linear(codes.to(torch.float32), ternary)
    if codes.shape[1] == 1 or len(ternary) == 1:  # torch._int_mm misreads the stride of a single row or column
        return (codes.to(torch.int32).unsqueeze(1) * ternary.to(torch.int32)).sum(-1).to(torch.float32)
    if len(codes) == 1:
        codes = codes.clone(memory_format=torch.contiguous_format)
    return torch._int_mm(codes.contiguous(), ternary.t()).to(torch.float32)


def apply_scales(product: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute (product · s) · α, in this order everywhere; `product` [M, N] float32 is overwritten."""
    return product.mul_(input_scale).mul_(weight_scale)

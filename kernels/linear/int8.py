"""INT8: integer codes of inputs and weights, by `torch._int_mm` (exact int32) cluster by cluster, on CPUs.

The formula is the integer identity of `kernels/linear/__init__.py`. Where qw - zw fits int8 (4-bit weights whose range includes
zero) the stored codes are qw - zw, and the sums Σ qx are not needed.

Two defects of `torch._int_mm` on CPUs are worked around. Without VNNI instructions its inner loop adds pairs of products in
int16, which saturates with 8-bit weights (`exact_int8_products` tests it; 7 bits and fewer fit). And it reads the row stride as a
leading dimension, so a single row or column whose stride is smaller than its length comes back uninitialised.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.linear.operands import WHOLE, PartwiseOperands
from kernels.threads import in_threads

TILE = (128, 1024)
"""Rows and output channels computed at a time, so that the accumulator is still in cache when the scales are applied. One thread
with AMX, 512 x 576 -> 3072: 4.5 ms with one segment and 10.9 ms with four, 9.5 and 25 ms untiled, 13.2 ms in float32."""

FEW_ROWS = 32
"""Number of rows up to which the weight is the left operand of `torch._int_mm`: 0.75 of the time at 1 row, 0.6 at 32, 1.0 at 64
(576 -> 1536, one thread with AMX)."""

ROWS_TO_SHARE = 256
"""Number of rows from which each tile has one thread for all its operations. An operation that several threads share ends when
the last of them is scheduled, and a tile has four operations per cluster: beside other busy processes that is 1.3 to 1.6 times
as slow (docs/log.md). Below, the tiles are too few."""


@functools.cache
def exact_int8_products() -> bool:
    """Say whether `torch._int_mm` is exact for weights of 8 bits on this processor (tested once)."""
    extreme = torch.full((8, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.t()) == 64 * 127 * 127).all())


@dataclass(frozen=True)
class Int8Operands(PartwiseOperands):
    """Operands of INT8: int8 codes of the weight, and the scales to apply to the sums.

    Attributes:
        codes: [N, K] int8, qw, or qw - zw where `zero_rows` is None.
        output_scale: [G, N] float32, sx sw.
        zero_rows: [G, N] float32, sx sw zw; None where the zero points are part of the codes.
        bias: [N] float32, b', or None.
        offsets: boundaries of the G clusters of columns, 0 … K.
    """

    takes_codes: ClassVar[bool] = True
    codes: Tensor
    output_scale: Tensor
    zero_rows: Tensor | None
    bias: Tensor | None
    offsets: tuple[int, ...]

    def product(self, x: Tensor, outputs: slice = WHOLE) -> Tensor:
        """Compute the layer for codes x [M, K] int8: [M, n] float32."""
        first, last, _ = outputs.indices(len(self.codes))
        y = torch.empty(len(x), last - first)
        rows, columns = TILE if len(x) > TILE[0] else (TILE[0], y.shape[1])
        tiles = [(m, n) for m in range(0, len(x), rows) for n in range(first, last, columns)]

        def compute(tile: tuple[int, int]) -> None:
            m, n = tile
            stop = min(n + columns, last)
            self._tile(x[m : m + rows], slice(n, stop), y[m : m + rows, n - first : stop - first])

        for _ in in_threads(compute, tiles) if len(x) >= ROWS_TO_SHARE else map(compute, tiles):
            pass
        return y

    def _tile(self, x: Tensor, outputs: slice, y: Tensor) -> None:
        """Compute the output channels `outputs` of rows x [m, K] into y."""
        offsets, codes, scales = self.offsets, self.codes[outputs], self.output_scale[:, outputs]
        if len(x) == 1:
            x = x.clone(memory_format=torch.contiguous_format)  # a single row counts as contiguous whatever its stride
        for c, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            if stop - start == 1 or len(codes) == 1:
                part = (x[:, None, start:stop].to(torch.int32) * codes[:, start:stop].to(torch.int32)).sum(2)
            elif len(x) <= FEW_ROWS:
                part = torch._int_mm(codes[:, start:stop], x[:, start:stop].t()).t()
            else:
                part = torch._int_mm(x[:, start:stop].contiguous(), codes[:, start:stop].t())  # [m, n] int32, exact
            part = part.to(torch.float32)
            if c > 0:
                y.addcmul_(part, scales[c])
            elif self.bias is None:
                torch.mul(part, scales[c], out=y)
            else:
                torch.addcmul(self.bias[outputs], part, scales[c], out=y)
        if self.zero_rows is not None:
            y.addmm_(_segment_sums(x, offsets), self.zero_rows[:, outputs], alpha=-1.0)


def float_rows(x: Tensor, operands: Int8Operands) -> Tensor:
    """Multiply a few float rows with INT8's integer weights, without dequantising them.

    Each row is written as three int8 digits, x = s (d1 + d2 / 254 + d3 / 254²) with s = max |x| / 127: 23 bits of the row's
    largest value, the precision of a float32 product.

    Args:
        x: [M, K] float32.
        operands: their `output_scale` and `zero_rows` are those of the weight alone, sw and sw zw, and they have no bias.
    Returns: [M, N] float32.
    """
    step = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    digits, steps = [], []
    for _ in range(3):
        digit = (x / step).round_()
        x = x - digit * step  # the rest is at most half a step: 127 steps of the next digit
        digits.append(digit.to(torch.int8))
        steps.append(step)
        step = step / 254
    y = operands.product(torch.cat(digits)).mul_(torch.cat(steps))
    return y.unflatten(0, (3, -1)).sum(0)


def _segment_sums(x: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Compute Σ_k qx over each cluster: [M, K] int8 -> [M, G] float32 (exact: |sum| < 2**24 for K < 2**17)."""
    sums = [x[:, start:stop].sum(dim=1, dtype=torch.int32) for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    return torch.stack(sums, dim=1).to(torch.float32)

"""INT4: 4-bit weights, at most MAX_ROWS rows of floats, on CPUs: `torch._weight_int4pack_mm_for_cpu`.

    y = x Ŵᵀ + b       Ŵ[n, k] = scale[n, g] (u[n, k] - 8) + zero[n, g]       u in 0 … 15, g = group of 32, 64 or 128 columns

The operation reads half a byte per weight and computes in bfloat16: inputs, outputs, scales and zeros have 8 significant bits.
One scale per row is applied outside, in float32, so that such weights stay exact; with several groups per row their scales
are rounded to bfloat16. Inputs are converted to bfloat16: with others torch runs scalar code, hundreds of times slower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.codes import code_offset
from kernels.linear.operands import LinearOperands

MAX_ROWS = 4
"""Number of rows above which integer or float32 products are as fast. One thread, AVX-512 and AMX, ratio to float32 at
576 x 3072 and 4096 x 4096: 1 row 4.2 and 3.9, 4 rows 6.0 and 5.1, 8 rows 4.4 and 4.1, 16 rows 2.0 and 2.1
(`python -m benchmarks linear`)."""

GROUPS = (128, 64, 32)


def unsupported_reason(weight_bits: int, offsets: tuple[int, ...], rows: int) -> str | None:
    """Say why INT4 cannot run with a weight of `rows` rows and clusters `offsets` [G + 1], None if it can."""
    if weight_bits > 4:
        return f"{weight_bits}-bit weights do not fit 4-bit products"
    if any(o % GROUPS[-1] for o in offsets):
        return f"cluster boundaries are not multiples of {GROUPS[-1]}"
    if rows % 16:
        return f"{rows} output channels are not a multiple of 16"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "this processor has no AVX-512"
    return None


@dataclass(frozen=True)
class Int4Operands(LinearOperands):
    """Operands of INT4: a weight in the layout of torch's operation.

    Attributes:
        packed: [N, K / 2] uint8.
        scales_and_zeros: [K / group, N, 2] bfloat16.
        group: columns that share a scale.
        row_scale: [N] float32 multiplying the result, or None where the scales are inside.
        bias: [N] or None.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    group: int
    row_scale: Tensor | None
    bias: Tensor | None

    @classmethod
    def prepare(
        cls, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, bits: int, offsets: tuple[int, ...]
    ) -> Int4Operands:
        """Make the operands of a weight.

        Args:
            codes: [N, K] uint8, 0 … 2**bits - 1, bits <= 4.
            scale: [N, G] floating; zero_point: [N, G] integer; Ŵ = scale * (codes - code_offset(bits) - zero_point).
            bias: [N] or None.
            offsets: multiples of 32, [G + 1].
        """
        group = next(g for g in GROUPS if all(o % g == 0 for o in offsets))
        lengths = torch.tensor(offsets).diff() // group
        codes = codes.to(torch.int32) + (code_offset(4) - code_offset(bits))  # u: Ŵ = scale ((u - 8) - zero_point)
        scale, zero = scale.to(torch.float32), -zero_point.to(torch.float32)
        row_scale = None
        if len(offsets) == 2:
            row_scale, scale = scale[:, 0].contiguous(), torch.ones_like(scale)
        scale, zero = (t.repeat_interleave(lengths, dim=1) for t in (scale, scale * zero))
        pairs = torch.stack([scale.t(), zero.t()], dim=2).to(torch.bfloat16).contiguous()
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
        return cls(packed, pairs, group, row_scale, bias)

    def product(self, x: Tensor) -> Tensor:
        """Compute the layer for x [..., K] float32: [..., N] float32."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scales_and_zeros)
        y = y.to(torch.float32) if self.row_scale is None else torch.mul(y, self.row_scale)  # both give a new float32 tensor
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

"""Low-bit linear layer with one scale per input cluster: y = x̂ Ŵᵀ + b.

    x̂[m, k] = sx[c] (qx[m, k] - zx[c])          Ŵ[n, k] = sw[n, c] (qw[n, k] - zw[n, c])          c = cluster of column k

Clusters are contiguous runs of columns given by `offsets` [G + 1]. Activation scales are static, so their zero points
fold into a bias computed once, and only Σ qx per cluster is left for the weights' zero points:

    y[m, n] = Σ_c sx[c] sw[n, c] ( Σ_k qx qw  -  zw[n, c] Σ_k qx )  +  b'[n]
    b'[n]   = b[n] - Σ_c sx[c] zx[c] Σ_k Ŵ[n, k]                                       (docs/rptq.md, integer identity)

REFERENCE forms x̂ and Ŵ in float32 and multiplies; INT8 multiplies codes with `torch._int_mm` (exact int32) cluster by
cluster and applies the scales in the epilogue. Where qw - zw fits int8 (4-bit weights whose range holds zero) those are the
codes, and the sums Σ qx are not needed. INT4 is for float inputs of few rows: `kernels/int4_rows.py`.

Two defects of `torch._int_mm` on CPUs are kept out. Without VNNI instructions its inner loop adds pairs of products in int16,
which saturates with 8-bit weights (`exact_int8_products` finds out; 7 bits and fewer fit). And it reads the row stride as a
leading dimension, so a single row or column whose stride is smaller than its length comes back uninitialised.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import int4_rows
from kernels.backend import Backend, Choice, triton_unsupported_reason

TILE = (128, 1024)
"""Rows and output channels that INT8 takes at a time, so that the accumulator is still in cache when the epilogue reads it. One
thread with AMX, 512 x 576 -> 3072: 4.5 ms with one segment and 10.9 ms with four, 9.5 and 25 ms untiled, 13.2 ms in float32."""

FEW_ROWS = 32
"""Up to so many rows the weight is the left operand of `torch._int_mm`: 0.75 of the time at 1 row, 0.6 at 32, 1.0 at 64 (576 ->
1536, one thread with AMX)."""

MIN_COLUMNS_PER_SEGMENT = 192
"""INT8 pays one GEMM call and one float epilogue of [M, N] per cluster: below about this many columns each, float32 on
dequantised weights is faster (benchmarks: `python -m benchmarks linear`)."""


@dataclass(frozen=True)
class LinearOperands:
    """What one backend needs of a quantised linear layer, precomputed from its packed tensors.

    REFERENCE fills `weight` [N, K] float32 = Ŵ; INT4 fills `int4`. INT8 fills `codes` [N, K] int8, `output_scale` [G, N] = sx sw,
    `bias` = b', and where zero points are not part of the codes `zero_rows` [G, N] = sx sw zw. TRITON takes the layer's own
    `packed` of `bits` with either INT8's scales and bias (see `kernels_take_codes`) or `scale` and `zero_point` [N, G]; `by_name`
    where it was asked for, so that no call falls back.
    """

    backend: Backend
    offsets: tuple[int, ...]
    bias: Tensor | None
    weight: Tensor | None = None
    codes: Tensor | None = None
    output_scale: Tensor | None = None
    zero_rows: Tensor | None = None
    packed: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    bits: int = 16
    by_name: bool = False
    int4: int4_rows.Int4Weight | None = None

    @property
    def takes_codes(self) -> bool:
        """Whether the input is int8 codes (True) or float, already x̂."""
        return self.output_scale is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the working copy (not part of the packed model)."""
        tensors = (self.weight, self.codes, self.output_scale, self.zero_rows)
        held = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return held + (0 if self.int4 is None else self.int4.nbytes)


@functools.cache
def exact_int8_products() -> bool:
    """Whether `torch._int_mm` is exact for weights of 8 bits on this processor (measured once)."""
    extreme = torch.full((8, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.t()) == 64 * 127 * 127).all())


def select_linear_backend(
    requested: Backend, *, weight_bits: int, activation_bits: int, offsets: tuple[int, ...], rows: int, device: torch.device
) -> Choice:
    """Choose the implementation of one layer.

    Args:
        requested: AUTO or an explicit backend. AUTO takes TRITON on cuda where a kernel fits the weights.
        weight_bits: 2 to 8, or 16 for a float weight.
        activation_bits: 2 to 8, or 16 when the input stays in floating point.
        offsets: cluster boundaries of the input channels, [G + 1].
        rows: N, output channels.
        device: where the layer is.
    Raises: ValueError if INT8, INT4 or TRITON is requested where it cannot run, saying why.
    """
    clusters, width = len(offsets) - 1, offsets[-1]
    columns = width // clusters
    if requested is Backend.TRITON or (requested is Backend.AUTO and device.type == "cuda" and weight_bits <= 8):
        return _triton_choice(requested, weight_bits, activation_bits, offsets, device)
    if requested is Backend.INT8:
        if activation_bits > 8:
            raise ValueError("int8 needs activations of 8 bits or fewer; this layer keeps 16: use reference")
        if weight_bits > 8:
            raise ValueError("int8 needs weights of 8 bits or fewer; this layer keeps 16: use reference")
        if device.type != "cpu":
            raise ValueError(f"int8 runs on cpu, not on {device}: use reference")
        if weight_bits == 8 and not exact_int8_products():
            raise ValueError("int8 with 8-bit weights saturates on this processor (it has no VNNI): use reference")
        return Choice(Backend.INT8, "asked for")
    if requested is Backend.REFERENCE:
        return Choice(Backend.REFERENCE, "asked for")
    if requested is Backend.INT4 or activation_bits > 8 >= weight_bits:
        return _int4_choice(requested, weight_bits, activation_bits, offsets, rows, device)
    if activation_bits > 8:
        return Choice(Backend.REFERENCE, "activations stay in float, so the product does too")
    if weight_bits > 8:
        return Choice(Backend.REFERENCE, "weights stay in float, so the product does too")
    if device.type != "cpu":
        return Choice(Backend.REFERENCE, f"no integer path on {device} yet")
    if weight_bits == 8 and not exact_int8_products():
        return Choice(Backend.REFERENCE, "integer products of 8-bit weights saturate on this processor (it has no VNNI)")
    if columns < MIN_COLUMNS_PER_SEGMENT:
        return Choice(
            Backend.REFERENCE,
            f"{clusters} clusters of about {columns} columns: separate integer products would be slower than one float32 product",
        )
    return Choice(Backend.INT8, f"{clusters} cluster{'s' if clusters > 1 else ''} of about {columns} columns fill torch._int_mm")


def _int4_choice(
    requested: Backend, weight_bits: int, activation_bits: int, offsets: tuple[int, ...], rows: int, device: torch.device
) -> Choice:
    reason = "its input is quantised" if activation_bits <= 8 else int4_rows.unsupported_reason(weight_bits, offsets, rows)
    if device.type != "cpu":
        reason = f"it runs on cpu, not on {device}"
    if requested is Backend.INT4:
        if reason is not None:
            raise ValueError(f"int4 cannot run this layer ({reason}): use reference")
        return Choice(Backend.INT4, "asked for")
    if reason is not None:
        return Choice(Backend.REFERENCE, f"activations stay in float, so the product does too; no 4-bit products: {reason}")
    few = f"up to {int4_rows.MAX_ROWS} rows (decoding) are 4-bit products in bfloat16"
    return Choice(Backend.INT4, f"{few}, more rows float32 products of dequantised weights")


def kernels_take_codes(weight_bits: int, activation_bits: int, offsets: tuple[int, ...]) -> bool:
    """Whether TRITON multiplies integer codes of a layer's input (True), or x̂ in floating point."""
    from kernels import cluster

    return weight_bits == 4 and activation_bits <= 8 and cluster.unsupported_reason(offsets) is None


def _triton_choice(
    requested: Backend, weight_bits: int, activation_bits: int, offsets: tuple[int, ...], device: torch.device
) -> Choice:
    unsupported_reason = triton_unsupported_reason(device)
    if unsupported_reason is None:
        from kernels import weight_only

        unsupported_reason = weight_only.unsupported_reason(weight_bits, offsets[-1])
    if unsupported_reason is not None and requested is Backend.TRITON:
        raise ValueError(f"triton cannot run this layer ({unsupported_reason}): use reference")
    if unsupported_reason is not None:
        return Choice(Backend.REFERENCE, f"no kernel runs this layer: {unsupported_reason}")
    if requested is Backend.TRITON:
        return Choice(Backend.TRITON, "asked for")
    if kernels_take_codes(weight_bits, activation_bits, offsets):
        return Choice(Backend.TRITON, "its kernel multiplies packed weights and integer codes on the GPU")
    rest = f"more than {weight_only.MAX_ROWS} rows are float products of dequantised weights"
    return Choice(Backend.TRITON, f"its kernel multiplies the packed weights on the GPU; {rest}")


def int_linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """Apply the layer.

    Args:
        x: [M, K] int8 codes qx where the operands take codes, else [..., K] float32, already x̂.
        operands: of the backend that x was prepared for.
    Returns: [M, N] float32, or [..., N].
    """
    return next(int_linear_parts(x, operands, None))


def int_linear_parts(x: Tensor, operands: LinearOperands, sizes: tuple[int, ...] | None) -> Iterator[Tensor]:
    """`int_linear`, its output channels in parts of `sizes` (None: one part), one after another.

    INT8 and REFERENCE compute a part when it is asked for, contiguously: what follows finds it in cache (SiLU of 1536 of 3072
    channels, 512 rows, two threads: 0.28 ms; after both parts 0.68 ms).
    """
    if operands.backend is Backend.TRITON:
        y = _triton_linear(x, operands)
    elif operands.backend is Backend.INT4:
        y = int4_rows.product(x.reshape(-1, x.shape[-1]), operands.int4, operands.bias).view(*x.shape[:-1], -1)
    else:
        one = _float_part if operands.backend is Backend.REFERENCE else _int8_linear
        return (one(x, operands, rows) for rows in output_parts(sizes))
    return iter((y,) if sizes is None else y.split(sizes, dim=-1))


def output_parts(sizes: tuple[int, ...] | None) -> list[slice]:
    """The slices of output channels with these sizes; None is one slice of all."""
    if sizes is None:
        return [slice(None)]
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _float_part(x: Tensor, operands: LinearOperands, outputs: slice) -> Tensor:
    bias = None if operands.bias is None else operands.bias[outputs]
    return torch.nn.functional.linear(x, operands.weight[outputs], bias)


def _triton_linear(x: Tensor, o: LinearOperands) -> Tensor:
    from kernels import cluster, weight_only

    backend = Backend.TRITON if o.by_name else Backend.AUTO
    if o.takes_codes:
        return cluster.cluster_linear(x, o.packed, o.output_scale, o.zero_rows, o.bias, offsets=o.offsets, backend=backend)
    rows = x.reshape(-1, x.shape[-1])
    y = weight_only.weight_only_linear(
        rows, o.packed, o.scale, o.zero_point, bits=o.bits, offsets=o.offsets, bias=o.bias, backend=backend
    )
    return y.view(*x.shape[:-1], len(o.packed))


def _int8_linear(x: Tensor, operands: LinearOperands, outputs: slice = slice(None)) -> Tensor:
    first, last, _ = outputs.indices(len(operands.codes))
    y = torch.empty(len(x), last - first)
    rows, columns = TILE if len(x) > TILE[0] else (TILE[0], y.shape[1])
    for m in range(0, len(x), rows):
        for n in range(first, last, columns):
            stop = min(n + columns, last)
            _int8_tile(x[m : m + rows], operands, slice(n, stop), y[m : m + rows, n - first : stop - first])
    return y


def _int8_tile(x: Tensor, operands: LinearOperands, outputs: slice, y: Tensor) -> None:
    """The layer's `outputs` for rows x [m, K], written to y."""
    offsets, codes, scales = operands.offsets, operands.codes[outputs], operands.output_scale[:, outputs]
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
        elif operands.bias is None:
            torch.mul(part, scales[c], out=y)
        else:
            torch.addcmul(operands.bias[outputs], part, scales[c], out=y)
    if operands.zero_rows is not None:
        y.addmm_(_segment_sums(x, offsets), operands.zero_rows[:, outputs], alpha=-1.0)


def float_rows(x: Tensor, operands: LinearOperands) -> Tensor:
    """A few float rows through INT8's integer weights, without dequantising them.

    Each row is written as three int8 digits, x = s (d1 + d2 / 254 + d3 / 254²) with s = max |x| / 127: 23 bits of the row's
    largest value, the precision of a float32 product.

    Args:
        x: [M, K] float32.
        operands: INT8, its `output_scale` and `zero_rows` those of the weight alone and no bias.
    Returns: [M, N] float32.
    """
    step = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    digits, steps = [], []
    for _ in range(3):
        digit = (x / step).round_()
        x = x - digit * step
        digits.append(digit.to(torch.int8))
        steps.append(step)
        step = step / 254
    y = _int8_linear(torch.cat(digits), operands).mul_(torch.cat(steps))
    return y.unflatten(0, (3, -1)).sum(0)


def _segment_sums(x: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Σ_k qx over each cluster: [M, K] int8 -> [M, G] float32 (exact: |sum| < 2**24 for K < 2**17)."""
    sums = [x[:, start:stop].sum(dim=1, dtype=torch.int32) for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    return torch.stack(sums, dim=1).to(torch.float32)

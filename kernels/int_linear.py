"""Low-bit linear layer with one scale per input cluster: y = x̂ Ŵᵀ + b.

    x̂[m, k] = sx[c] (qx[m, k] - zx[c])          Ŵ[n, k] = sw[n, c] (qw[n, k] - zw[n, c])          c = cluster of column k

Clusters are contiguous runs of columns given by `offsets` [G + 1]. Activation scales are static, so their zero points
fold into a bias computed once, and only Σ qx per cluster is left for the weights' zero points:

    y[m, n] = Σ_c sx[c] sw[n, c] ( Σ_k qx qw  -  zw[n, c] Σ_k qx )  +  b'[n]
    b'[n]   = b[n] - Σ_c sx[c] zx[c] Σ_k Ŵ[n, k]                                       (docs/rptq.md, integer identity)

Two implementations with one signature. REFERENCE forms x̂ and Ŵ in float32 and multiplies; INT8 multiplies codes with
`torch._int_mm` (exact int32) cluster by cluster and applies the scales in the epilogue.

Two defects of `torch._int_mm` on CPUs are kept out. Without VNNI instructions its inner loop adds pairs of products in int16,
which saturates with 8-bit weights (`exact_int8_products` finds out; 7 bits and fewer fit). And it reads the row stride as a
leading dimension, so a single row or column whose stride is smaller than its length comes back uninitialised.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Backend, Choice

MIN_COLUMNS_PER_SEGMENT = 128
"""INT8 pays one GEMM call and one float epilogue of [M, N] per cluster: below about this many columns each, float32 on
dequantised weights is faster (benchmarks: `python -m benchmarks linear`)."""


@dataclass(frozen=True)
class LinearOperands:
    """What one backend needs of a quantised linear layer, precomputed from its packed tensors.

    REFERENCE fills `weight` [N, K] float32 = Ŵ. INT8 fills `codes` [N, K] int8 (codes minus 2**(bits-1)),
    `output_scale` [G, N] = sx sw, `zero_rows` [G, N] = sx sw zw, and `bias` = b'. TRITON takes the layer's own `packed` of `bits`
    with either INT8's scales and bias (clusters of whole blocks: see `whole_blocks`) or `scale` and `zero_point` [N, G].
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

    @property
    def takes_codes(self) -> bool:
        """Whether the input is int8 codes (True) or float, already x̂."""
        return self.output_scale is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the working copy (not part of the packed model)."""
        tensors = (self.weight, self.codes, self.output_scale, self.zero_rows)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@functools.cache
def exact_int8_products() -> bool:
    """Whether `torch._int_mm` is exact for weights of 8 bits on this processor (measured once)."""
    extreme = torch.full((8, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, extreme.t()) == 64 * 127 * 127).all())


def select_linear_backend(
    requested: Backend, *, weight_bits: int, activation_bits: int, offsets: tuple[int, ...], device: str
) -> Choice:
    """Choose the implementation of one layer.

    Args:
        requested: AUTO or an explicit backend. AUTO takes TRITON on cuda where a kernel fits the weights.
        weight_bits: 2 to 8, or 16 for a float weight.
        activation_bits: 2 to 8, or 16 when the input stays in floating point.
        offsets: cluster boundaries of the input channels, [G + 1].
        device: torch device type.
    Raises: ValueError if INT8 or TRITON is requested where it cannot run, saying why.
    """
    clusters, width = len(offsets) - 1, offsets[-1]
    columns = width // clusters
    if requested is Backend.TRITON or (requested is Backend.AUTO and device == "cuda" and weight_bits <= 8):
        obstacle = _triton_obstacle(weight_bits, width, device)
        if obstacle is None:
            reason = "its kernels multiply the packed weights on the GPU"
            return Choice(Backend.TRITON, "asked for" if requested is Backend.TRITON else reason)
        if requested is Backend.TRITON:
            raise ValueError(f"triton cannot run this layer ({obstacle}): use reference")
        return Choice(Backend.REFERENCE, f"no kernel runs this layer: {obstacle}")
    if requested is Backend.INT8:
        if activation_bits > 8:
            raise ValueError("int8 needs activations of 8 bits or fewer; this layer keeps 16: use reference")
        if weight_bits > 8:
            raise ValueError("int8 needs weights of 8 bits or fewer; this layer keeps 16: use reference")
        if device != "cpu":
            raise ValueError(f"int8 runs on cpu, not on {device}: use reference")
        if weight_bits == 8 and not exact_int8_products():
            raise ValueError("int8 with 8-bit weights saturates on this processor (it has no VNNI): use reference")
        return Choice(Backend.INT8, "asked for")
    if requested is Backend.REFERENCE:
        return Choice(Backend.REFERENCE, "asked for")
    if activation_bits > 8:
        return Choice(Backend.REFERENCE, "activations stay in float, so the product does too")
    if weight_bits > 8:
        return Choice(Backend.REFERENCE, "weights stay in float, so the product does too")
    if device != "cpu":
        return Choice(Backend.REFERENCE, f"no integer path on {device} yet")
    if weight_bits == 8 and not exact_int8_products():
        return Choice(Backend.REFERENCE, "integer products of 8-bit weights saturate on this processor (it has no VNNI)")
    if columns < MIN_COLUMNS_PER_SEGMENT:
        return Choice(
            Backend.REFERENCE,
            f"{clusters} clusters of about {columns} columns: separate integer products would be slower than one float32 product",
        )
    return Choice(Backend.INT8, f"{clusters} cluster{'s' if clusters > 1 else ''} of about {columns} columns fill torch._int_mm")


def whole_blocks(offsets: tuple[int, ...]) -> bool:
    """Whether the integer kernel on CUDA takes clusters with these boundaries [G + 1]."""
    from kernels import cluster

    return cluster.obstacle(offsets) is None


def _triton_obstacle(weight_bits: int, width: int, device: str) -> str | None:
    if device != "cuda":
        return f"it runs on cuda, not on {device}"
    from kernels import _triton, weight_only

    return weight_only.obstacle(weight_bits, width) if _triton.available() else "Triton is not installed"


def int_linear(x: Tensor, operands: LinearOperands) -> Tensor:
    """Apply the layer.

    Args:
        x: [M, K] int8 codes qx where the operands take codes, else [..., K] float32, already x̂.
        operands: of the backend that x was prepared for.
    Returns: [M, N] float32, or [..., N].
    """
    if operands.backend is Backend.TRITON:
        return _triton_linear(x, operands)
    if operands.backend is Backend.REFERENCE:
        return torch.nn.functional.linear(x, operands.weight, operands.bias)
    return _int8_linear(x, operands)


def _triton_linear(x: Tensor, o: LinearOperands) -> Tensor:
    from kernels import cluster, weight_only

    if o.takes_codes:
        return cluster.cluster_linear(x, o.packed, o.output_scale, o.zero_rows, o.bias, offsets=o.offsets)
    rows = x.reshape(-1, x.shape[-1])
    y = weight_only.weight_only_linear(rows, o.packed, o.scale, o.zero_point, bits=o.bits, offsets=o.offsets, bias=o.bias)
    return y.view(*x.shape[:-1], len(o.packed))


def _int8_linear(x: Tensor, operands: LinearOperands) -> Tensor:
    offsets, codes = operands.offsets, operands.codes
    y = None
    if len(x) == 1:
        x = x.clone(memory_format=torch.contiguous_format)  # a single row counts as contiguous whatever its stride
    for c, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if stop - start == 1:
            part = x[:, start:stop].to(torch.int32) * codes[:, start].to(torch.int32)
        else:
            part = torch._int_mm(x[:, start:stop].contiguous(), codes[:, start:stop].t())  # [M, N] int32, exact
        part = part.to(torch.float32).mul_(operands.output_scale[c])
        y = part if y is None else y.add_(part)
    sums = _segment_sums(x, offsets)  # [M, G]
    y.addmm_(sums, operands.zero_rows, alpha=-1.0)
    return y if operands.bias is None else y.add_(operands.bias)


def _segment_sums(x: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Σ_k qx over each cluster: [M, K] int8 -> [M, G] float32 (exact: |sum| < 2**24 for K < 2**17)."""
    sums = [x[:, start:stop].sum(dim=1, dtype=torch.int32) for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    return torch.stack(sums, dim=1).to(torch.float32)

"""Add a residual, normalise, reorder and quantise in one kernel, as the input of a linear layer.

    h = x + r                y[j] = norm(h)[order[j]] · weight[j] + bias[j]         (weight and bias already in the new order)

    static     code = clamp(round(y / s[j]) + z[j], qmin, qmax)                     s, z per channel, i.e. per cluster
    "int8"     code = round(127 y / γ)                      γ = max |y|             value = code · γ / 127
    "int4"     code = clamp(round(√7 y / β), -8, 7)         β = mean |y|            value = code · β / √7
    "int4x2"   the same with β = 2 mean |y|

Mean and variance do not depend on the order, so the reorder is a gather from the row just written, in cache. h is rounded to
x's type before it is normalised, as separate operations would do. Sums and codes are computed in float32.
Cost: 2 bytes read and 1 written per entry in bfloat16; 4 more with the residual. Codes of 4 bits take a byte too, as products
a linear layer reads them. Sources: RPTQ (arXiv:2304.01089) for the reorder in the norm, BitNet a4.8 (arXiv:2411.04965,
equations 1-3) for the scales per token, clamped at 1e-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels._triton import next_power, on_its_device, round_even, rows_strided, tl, tl_code_offset, triton
from kernels.backend import Backend, use_triton
from kernels.codes import Codes, code_limits, quantize
from kernels.tiles import row_warps

KINDS = ("int8", "int4", "int4x2")
NORMS = ("rms", "layer")


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm that stores its output in another order.

    Attributes:
        kind: one of NORMS.
        eps: added to the variance or mean square.
        weight, bias: [D] in the stored order, or None.
        order: [D] integer, or None: output j is channel order[j].
    """

    kind: str
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    order: Tensor | None = None


def normalized(x: Tensor, norm: Norm) -> Tensor:
    """Compute the norm by torch: [M, D] -> [M, D] float32, in the stored order."""
    x = x.to(torch.float32)
    if norm.kind == "layer":
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        y = (x - mean) * torch.rsqrt(variance + norm.eps)
    else:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    y = y if norm.order is None else y.index_select(-1, norm.order)
    y = y if norm.weight is None else y * norm.weight.to(torch.float32)
    return y if norm.bias is None else y + norm.bias.to(torch.float32)


def _reference(x: Tensor, norm: Norm, residual: Tensor | None, kind: str, static: tuple | None) -> tuple[Tensor, Codes]:
    hidden = x if residual is None else x + residual
    y = normalized(hidden, norm)
    if static is not None:
        scale, zero, bits = static
        codes = quantize(y, scale.to(torch.float32), zero.to(torch.float32), *code_limits(bits))
        return hidden, Codes(codes)
    if kind == "int8":
        size, top, low, high = y.abs().amax(-1, keepdim=True), 127.0, -127, 127
    else:
        size, top, low, high = (2.0 if kind == "int4x2" else 1.0) * y.abs().mean(-1, keepdim=True), math.sqrt(7.0), -8, 7
    size = size.clamp(min=1e-5)
    codes = (y * (top / size)).round_().clamp_(low, high).to(torch.int8)
    return hidden, Codes(codes, size / top, codes.sum(-1, dtype=torch.int32))


@triton.jit
def _entries(h_ptr, weight_ptr, bias_ptr, order_ptr, mean, factor, j, D, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
             ORDERED: tl.constexpr):  # fmt: skip
    """Compute the normalised entries j of the row at h_ptr, 0 beyond D."""
    inside = j < D
    source = j
    if ORDERED:
        source = tl.load(order_ptr + j, mask=inside, other=0)
    y = (tl.load(h_ptr + source, mask=inside, other=0.0).to(tl.float32) - mean) * factor
    if WEIGHTED:
        y *= tl.load(weight_ptr + j, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias_ptr + j, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, y, 0.0)


@triton.jit
def _static_codes(y, scale_ptr, zero_ptr, j, D, BITS: tl.constexpr):
    s = tl.load(scale_ptr + j, mask=j < D, other=1.0)
    z = tl.load(zero_ptr + j, mask=j < D, other=0.0)
    v = tl.div_rn(y, s)
    v = tl.minimum(tl.maximum(v, -tl_code_offset(BITS) - z), tl_code_offset(BITS) - 1.0 - z)
    return (round_even(v) + z).to(tl.int32)


@triton.jit
def _norm_quant_kernel(
    x_ptr, residual_ptr, hidden_ptr, weight_ptr, bias_ptr, order_ptr, scale_ptr, zero_ptr, codes_ptr, row_scale_ptr, sum_ptr,
    D, stride_x, stride_r, eps, TOP, FACTOR,
    LAYER: tl.constexpr, ADD: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ORDERED: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < D
    h_ptr = x_ptr + row * stride_x
    h = tl.load(h_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual_ptr + row * stride_r + k, mask=inside, other=0.0).to(tl.float32)
        h_ptr = hidden_ptr + row * D
        rounded = h.to(hidden_ptr.dtype.element_ty)
        tl.store(h_ptr + k, rounded, mask=inside)
        h = rounded.to(tl.float32)
        tl.debug_barrier()  # the gather below reads what other threads of this program have just written
    mean = 0.0
    if LAYER:
        mean = tl.sum(h, axis=0) / D
    centred = tl.where(inside, h - mean, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    y = _entries(h_ptr, weight_ptr, bias_ptr, order_ptr, mean, factor, k, D, WEIGHTED, BIASED, ORDERED)
    if KIND == "static":
        code = _static_codes(y, scale_ptr, zero_ptr, k, D, BITS)
    else:
        if KIND == "int8":
            size = tl.maximum(tl.max(tl.abs(y), axis=0), 1e-5)
            code = round_even(y * tl.div_rn(TOP, size)).to(tl.int32)
        else:
            size = tl.maximum(FACTOR * (tl.sum(tl.abs(y), axis=0) / D), 1e-5)
            code = round_even(tl.minimum(tl.maximum(y * tl.div_rn(TOP, size), -8.0), 7.0)).to(tl.int32)
        tl.store(row_scale_ptr + row, tl.div_rn(size, TOP))
        tl.store(sum_ptr + row, tl.sum(code, axis=0))
    tl.store(codes_ptr + row * D + k, code.to(tl.int8), mask=inside)


@on_its_device
def _launch(x: Tensor, norm: Norm, residual: Tensor | None, kind: str, static: tuple | None) -> tuple[Tensor, Codes]:
    x = rows_strided(x)
    rows, width = x.shape
    new = {"device": x.device}
    hidden, residual_stride = x, 0
    if residual is not None:
        residual = rows_strided(residual)
        hidden, residual_stride = torch.empty(rows, width, dtype=x.dtype, **new), residual.stride(0)
    codes = torch.empty(x.shape, dtype=torch.int8, **new)
    scale = zero = row_scale = code_sum = None
    bits, top, factor = 8, 127.0 if kind == "int8" else math.sqrt(7.0), 2.0 if kind == "int4x2" else 1.0
    if static is None:
        row_scale, code_sum = torch.empty(rows, 1, **new), torch.empty(rows, dtype=torch.int32, **new)
    else:
        scale, zero, bits = static[0].to(torch.float32).contiguous(), static[1].to(torch.float32).contiguous(), static[2]
    block = max(2, next_power(width))
    _norm_quant_kernel[(rows,)](
        x, residual, hidden, norm.weight, norm.bias, norm.order, scale, zero, codes, row_scale, code_sum,
        width, x.stride(0), residual_stride, norm.eps, top, factor,
        LAYER=norm.kind == "layer", ADD=residual is not None, WEIGHTED=norm.weight is not None, BIASED=norm.bias is not None,
        ORDERED=norm.order is not None, KIND="static" if static is not None else kind, BITS=bits, BLOCK=block,
        num_warps=row_warps(block), enable_fp_fusion=False,
    )  # fmt: skip
    return hidden, Codes(codes, row_scale, code_sum)


def _run(
    x: Tensor, norm: Norm, residual: Tensor | None, kind: str, static: tuple | None, backend: Backend
) -> tuple[Tensor, Codes]:
    """Check what both ops share, and run one of them."""
    if norm.kind not in NORMS:
        raise ValueError(f"norm {norm.kind[:20]!r} is unknown: use one of {', '.join(NORMS)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"a residual of {tuple(residual.shape)} {residual.dtype} does not fit {tuple(x.shape)} {x.dtype}")
    run = _launch if use_triton(backend, x) and x.numel() else _reference
    hidden, codes = run(x.flatten(0, -2), norm, None if residual is None else residual.flatten(0, -2), kind, static)
    return hidden.view(x.shape), replace(codes, lead=x.shape[:-1])


def norm_quantize(
    x: Tensor,
    norm: Norm,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    residual: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> tuple[Tensor, Codes]:
    """Normalise, reorder and quantise rows with static scales.

    Args:
        x: [..., D] floating; residual: the same, added first.
        scale, zero_point: [D] in the stored order; codes lie within code_limits(bits).
        bits: 2 to 8.
        backend: AUTO takes Triton for CUDA tensors.
    Returns: (x, or x + residual; codes of its norm).
    Raises: ValueError for other norms, shapes or widths, or if TRITON is asked for where it cannot run.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits do not fit bytes: use 2 to 8")
    return _run(x, norm, residual, "static", (scale, zero_point, bits), backend)


def norm_quantize_dynamic(
    x: Tensor, norm: Norm, kind: str, *, residual: Tensor | None = None, backend: Backend = Backend.AUTO
) -> tuple[Tensor, Codes]:
    """Normalise, reorder and quantise rows with one scale per token.

    Args:
        x: [..., D] floating; residual: the same, added first.
        kind: one of KINDS.
        backend: as `norm_quantize`.
    Returns: as `norm_quantize`, scales and sums of codes with them.
    Raises: ValueError for other norms, shapes or kinds, or if TRITON is asked for where it cannot run.
    """
    if kind not in KINDS:
        raise ValueError(f"input quantiser {kind[:20]!r} is unknown: use one of {', '.join(KINDS)}")
    return _run(x, norm, residual, kind, None, backend)

"""Choose the backend of a linear layer, and say why."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.backend import Backend, Choice, triton_unsupported_reason
from kernels.linear import int4
from kernels.linear.int8 import exact_int8_products

MIN_COLUMNS_PER_SEGMENT = 192
"""Columns per cluster below which INT8 is slower than float32 on dequantised weights, about: each cluster costs one GEMM call
and one float pass over [M, N] (benchmarks: `python -m benchmarks linear`). `core.pace` gives AUTO this processor's own number."""


def select_linear_backend(
    requested: Backend,
    *,
    weight_bits: int,
    activation_bits: int,
    offsets: tuple[int, ...],
    rows: int,
    device: torch.device,
    least_columns: Callable[[], int] = lambda: MIN_COLUMNS_PER_SEGMENT,
) -> Choice:
    """Choose the implementation of one layer of packed weights.

    Args:
        requested: AUTO or an explicit backend. AUTO takes TRITON on cuda where a kernel fits the weights.
        weight_bits: 2 to 8, or 16 for a float weight.
        activation_bits: 2 to 8, or 16 when the input stays in floating point.
        offsets: cluster boundaries of the input channels, [G + 1].
        rows: N, output channels.
        device: of the layer.
        least_columns: gives the columns per cluster from which AUTO takes INT8; called only where that decides.
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
    if columns < least_columns():
        return Choice(
            Backend.REFERENCE,
            f"{clusters} clusters of about {columns} columns: separate integer products would be slower than one float32 product",
        )
    return Choice(Backend.INT8, f"{clusters} cluster{'s' if clusters > 1 else ''} of about {columns} columns fill torch._int_mm")


def _int4_choice(
    requested: Backend, weight_bits: int, activation_bits: int, offsets: tuple[int, ...], rows: int, device: torch.device
) -> Choice:
    reason = "its input is quantised" if activation_bits <= 8 else int4.unsupported_reason(weight_bits, offsets, rows)
    if device.type != "cpu":
        reason = f"it runs on cpu, not on {device}"
    if requested is Backend.INT4:
        if reason is not None:
            raise ValueError(f"int4 cannot run this layer ({reason}): use reference")
        return Choice(Backend.INT4, "asked for")
    if reason is not None:
        return Choice(Backend.REFERENCE, f"activations stay in float, so the product does too; no 4-bit products: {reason}")
    few = f"up to {int4.MAX_ROWS} rows (decoding) are 4-bit products in bfloat16"
    return Choice(Backend.INT4, f"{few}, more rows float32 products of dequantised weights")


def kernels_take_codes(weight_bits: int, activation_bits: int, offsets: tuple[int, ...]) -> bool:
    """Say whether TRITON multiplies integer codes of a layer's input (True), or x̂ in floating point."""
    from kernels.linear import cluster

    return weight_bits == 4 and activation_bits <= 8 and cluster.unsupported_reason(offsets) is None


def _triton_choice(
    requested: Backend, weight_bits: int, activation_bits: int, offsets: tuple[int, ...], device: torch.device
) -> Choice:
    unsupported_reason = triton_unsupported_reason(device)
    if unsupported_reason is None:
        from kernels.linear import weight_only

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

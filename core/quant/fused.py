"""Residual sum, norm, reorder and quantisation in one kernel, for the linear layer that reads the codes; on CUDA only.

A layer that multiplies floats (clusters that are no whole blocks, a float input, a ternary input that keeps the top K) gets no
codes: then only the gather and the norm are left, where plain torch is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from core.quant.linear.quant import QuantLinear
from core.quant.linear.ternary import TernaryLinear
from core.quant.static import Codes
from kernels import Backend

if TYPE_CHECKING:
    from kernels.norm_quant import Norm


def norm_codes(x: Tensor, norm: Norm, reader: nn.Module, *, residual: Tensor | None = None) -> tuple[Tensor, Codes] | None:
    """What a linear layer reads after a norm.

    Args:
        x: [..., D] floating; residual: the same, added first.
        reader: the linear layer.
    Returns: (x + residual, codes of its norm), or None where the reader takes no codes.
    """
    from kernels.norm_quant import KINDS, norm_quantize, norm_quantize_dynamic

    rows = x.flatten(0, -2)
    added = None if residual is None else residual.flatten(0, -2)
    if isinstance(reader, QuantLinear) and reader.takes_codes:
        q = reader.quantizer
        done = norm_quantize(rows, norm, q.channel_scale, q.channel_zero, bits=q.bits, residual=added)
    elif isinstance(reader, TernaryLinear) and reader.choice.backend is Backend.TRITON and reader.kind in KINDS:
        done = norm_quantize_dynamic(rows, norm, reader.kind, residual=added)
    else:
        return None
    return done.hidden.view(x.shape), Codes(done.codes, done.scale, done.code_sum, x.shape[:-1])

"""LayerNorm and RMSNorm that can store their output in another channel order (RPTQ, R1 and R4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.quant.linear.base import LinearLayer
from core.quant.static import InputUse
from kernels import Codes
from kernels.backend import triton_runs_on


class ReorderNorm(nn.Module):
    """LayerNorm or RMSNorm that stores its output in the order `order` [D]; None keeps the original order.

    y[j] = norm(x)[order[j]]. Mean and variance do not depend on the order, so reordering is part of writing the output. The kind
    "none" stores x itself, times gains where a method has put any: for attention and MLP that read the residual stream.
    """

    def __init__(self, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("order", None)

    def reordered(self, order: Tensor) -> ReorderNorm:
        """Make the norm that stores its output in `order` [D] int64."""
        made = self.permuted(order)
        made.order = order.to(torch.int32)
        return made

    def permuted(self, order: Tensor) -> ReorderNorm:
        """Make the norm of an input whose channels lie in `order` [D] int64: gain and bias follow it."""
        weight, bias = (None if t is None else t[order].contiguous() for t in (self.weight, self.bias))
        return ReorderNorm(self.kind, weight, bias, self.eps)

    def before(
        self, reader: LinearLayer | None, x: Tensor, use: InputUse, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | Codes]:
        """Compute x + residual, and its norm as `reader` takes it: floats, or codes where one kernel makes them, on CUDA.

        Args: reader: None where several layers read the norm.
        """
        if reader is not None and use.owned and not use.float_tokens and self.kind != "none" and triton_runs_on(x.device):
            from kernels.norm_quant import Norm

            norm = Norm(self.kind, self.eps, self.weight, self.bias, self.order)
            found = reader.norm_codes(x, norm, residual)
            if found is not None:
                return found
        h = x if residual is None else x + residual
        return h, self(h)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., D] over its last dimension."""
        if self.kind == "layer":
            variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
            factor, shift = torch.rsqrt(variance + self.eps), mean
        elif self.kind == "none":
            factor = shift = None
        else:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass over x, no temporary
            factor, shift = torch.rsqrt(norm.square().div_(x.shape[-1]).add_(self.eps)), None
        if self.order is not None:
            x = x.flatten(0, -2).index_select(1, self.order).view(x.shape)  # rows: far faster than [B, T, D]
        if factor is None:
            y = x.clone() if self.order is None else x  # the gather made a copy; readers may overwrite y, but not x
        elif shift is not None:
            y = (x - shift).mul_(factor)
        else:
            y = x * factor if self.order is None else x.mul_(factor)  # the gather made a copy
        if self.weight is not None:
            y.mul_(self.weight)
        return y if self.bias is None else y.add_(self.bias)

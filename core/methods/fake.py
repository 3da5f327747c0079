"""Round sites and weights as a plan says, in floating point and the model's own channel order.

The grid of a channel does not depend on where the channel lies, so a plan's error can be seen on a float block. RPTQ and RTN
share this. GPTQ, which depends on the order of the columns, is left out: weights are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from core.quant.affine import Grid
from core.quant.gptq import fake_columns
from core.quant.linear.base import LinearLayer
from core.quant.observer import SitePlan
from core.quant.static import ActivationQuantizer
from core.recipe import FLOAT_BITS
from kernels import fake_quantize

Fake = Callable[[Tensor], Tensor]
"""Rounds a site's tensor [B, T, C], channels in the model's own order, and returns a new one in floating point."""


def fake_site(plan: SitePlan, sink_tokens: int) -> Fake | None:
    """Make the function that rounds a site with static scales; None at 16 bits.

    Args: sink_tokens: first positions that stay in float.
    """
    if plan.params is None:
        return None
    own = ActivationQuantizer(plan.bits, plan.params, plan.offsets)
    place = slice(None) if plan.order is None else plan.order.argsort()
    grid = [t[place] for t in (own.channel_scale, own.lower, own.upper)]

    def fake(x: Tensor) -> Tensor:
        found = fake_quantize(x, *(t.to(x.device, x.dtype) for t in grid))
        found[:, :sink_tokens] = x[:, :sink_tokens]
        return found

    return fake


def fake_weight(linear: LinearLayer, plan: SitePlan, *, bits: int, grid: Grid) -> Tensor | None:
    """Round a weight [N, K] to nearest in the clusters of its input; None at 16 bits.

    Args: plan: of the site that the layer reads.
    """
    if bits >= FLOAT_BITS:
        return None
    columns = linear.dequantized_weight().to(torch.float32).t().contiguous()
    offsets = (plan.offsets if plan.weight_offsets is None else plan.weight_offsets).to(columns.device)
    if plan.order is None:
        return fake_columns(columns, offsets, bits=bits, grid=grid).t()
    order = plan.order.to(columns.device)
    columns[order] = fake_columns(columns[order], offsets, bits=bits, grid=grid)
    return columns.t()

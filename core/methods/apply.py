"""Build a quantised block from a float block and a plan: the step every method shares.

Fused matrices (q, k, v and gate, up read one input) share one Hessian and one pass of GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.methods.base import LayerPlan, WeightNote
from core.methods.rptq.reorder import Orders, query_channels, reorder_block
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.gptq import quantize_weight
from core.quant.linear.quant import QuantLinear
from core.quant.observer import SitePlan, sqnr_db
from core.quant.static import ActivationQuantizer
from core.recipe import FLOAT_BITS

INPUT_SITE = {"qkv": "attn_in", "o": "o_in", "up": "mlp_in", "down": "down_in"}
"""Which site each linear layer of a block reads."""


def site_order(plan: LayerPlan, site: str, groups: int) -> Tensor | None:
    """Channel order of a linear layer's input under `plan`, [C], or None for the original one."""
    name = {"attn_in": "R1", "o_in": "R3", "mlp_in": "R4", "down_in": "R5"}[site]
    order = plan.orders.get(name)
    return query_channels(order, groups) if order is not None and name == "R3" else order


def build_block(
    block: DecoderBlock, plan: LayerPlan, *, hessians: dict[str, Tensor], grid: Grid
) -> tuple[DecoderBlock, dict[str, WeightNote]]:
    """The quantised block of `plan`.

    Args:
        block: float; not changed.
        hessians: Xᵀ X per linear input site in the original order for GPTQ; a site left out is rounded to nearest.
        grid: of the weights.
    """
    new = reorder_block(block, Orders(**plan.orders))
    new.softmax_bits, new.sink_tokens = plan.softmax_bits, plan.sink_tokens
    for site in ("q", "k", "v"):
        setattr(new, f"{site}_quantizer", quantizer(plan.sites[site]))
    notes = {}
    for name, linear in list(new.linears().items()):
        site = INPUT_SITE[name]
        hessian = hessians.get(site)
        order = site_order(plan, site, block.spec.groups)
        if hessian is not None and order is not None:
            hessian = hessian[order][:, order]
        layer, notes[name] = _quantized_linear(linear, plan.sites[site], hessian, plan.weight_bits, grid)
        setattr(new, name, layer)
    return new, notes


def quantizer(site: SitePlan) -> ActivationQuantizer | None:
    """The module that quantises one site, None at 16 bits."""
    return None if site.params is None else ActivationQuantizer(site.bits, site.params, site.offsets)


def _quantized_linear(
    linear: torch.nn.Linear, site: SitePlan, hessian: Tensor | None, bits: int, grid: Grid
) -> tuple[QuantLinear, WeightNote]:
    weight = linear.weight.detach().to(torch.float32)
    bias = None if linear.bias is None else linear.bias.detach()
    if bits >= FLOAT_BITS:
        layer = QuantLinear.from_weight(weight, bias, quantizer(site), offsets=site.offsets)
        return layer, WeightNote(16, "float", float("inf"), None, layer.effective_bits)
    offsets = site.offsets if site.weight_offsets is None else site.weight_offsets
    result = quantize_weight(weight, hessian, offsets.to(weight.device), bits=bits, grid=grid)
    layer = QuantLinear.from_weight(result.weight, bias, quantizer(site))
    note = WeightNote(bits, result.method, sqnr_db(weight, result.weight.dequantize()), result.fallback, layer.effective_bits)
    return layer, note

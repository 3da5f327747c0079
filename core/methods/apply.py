"""Build a quantised block from a float block and a plan: the step that RPTQ and RTN share.

Matrices that read the same input (q, k, v; gate, up) are fused and share one Hessian and one pass of GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from core.bits import input_site, kind_of
from core.methods.base import LayerPlan
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.gptq import quantize_weight
from core.quant.linear.quant import QuantLinear
from core.quant.observer import SitePlan, sqnr_db
from core.quant.static import ActivationQuantizer
from core.recipe import FLOAT_BITS
from core.report import WeightError


def build_block(
    block: DecoderBlock,
    plan: LayerPlan,
    *,
    hessians: Mapping[str, Tensor],
    grid: Grid,
    orders: Mapping[str, Tensor] | None = None,
) -> tuple[DecoderBlock, dict[str, WeightError]]:
    """Quantise the weights of a float block and attach the quantisers of a plan.

    Args:
        block: float, its channels already in the planned order; not changed.
        hessians: Xᵀ X [K, K] per linear input site in the model's own channel order, for GPTQ; the layers that read a site
            left out are rounded to nearest.
        grid: of the weights.
        orders: per linear input site the order [K] in which `block` has the channels, new = old[order]; left out: unchanged.
    Returns: (new block, error of each fused weight by name).
    Raises: NumericError if a weight holds NaN or infinity.
    """
    layers, errors, orders = {}, {}, orders or {}
    for name, linear in block.linears().items():
        site = input_site(name)
        moments = hessians.get(site), orders.get(site)
        layers[name], errors[name] = _quantized_linear(linear, plan.sites[site], moments, plan.weight_bits[kind_of(name)], grid)
    new = block.with_parts(**layers)
    new.attention.softmax_bits, new.attention.sink_tokens = plan.softmax_bits, plan.sink_tokens
    for site in ("q", "k", "v"):
        setattr(new.attention, f"{site}_quantizer", quantizer(plan.sites[site]))
    return new, errors


def quantizer(site: SitePlan) -> ActivationQuantizer | None:
    """Make the module that quantises one site; None at 16 bits."""
    return None if site.params is None else ActivationQuantizer(site.bits, site.params, site.offsets)


def _quantized_linear(
    linear: torch.nn.Linear, site: SitePlan, moments: tuple[Tensor | None, Tensor | None], bits: int, grid: Grid
) -> tuple[QuantLinear, WeightError]:
    hessian, order = moments
    weight = linear.weight.detach().to(torch.float32)
    bias = None if linear.bias is None else linear.bias.detach()
    if bits >= FLOAT_BITS:
        layer = QuantLinear.from_weight(weight, bias, quantizer(site), offsets=site.offsets)
        return layer, WeightError(FLOAT_BITS, "float", float("inf"), None, layer.effective_bits)
    offsets = site.offsets if site.weight_offsets is None else site.weight_offsets
    result = quantize_weight(weight, hessian, offsets.to(weight.device), bits=bits, grid=grid, order=order)
    layer = QuantLinear.from_weight(result.weight, bias, quantizer(site))
    noise = sqnr_db(weight, result.weight.dequantize())
    return layer, WeightError(bits, result.method, noise, result.fallback, layer.effective_bits)

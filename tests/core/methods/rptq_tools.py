"""What RPTQ's tests share: tiny models quantised once per recipe, and what their first layers see in calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from core.methods.base import LayerPlan
from core.methods.rptq.reorder import head_channels, query_channels
from core.models.adapter import BlockSpec
from core.quant.ranges import ChannelRanges
from tests.core.tools import Quantised, block_inputs, float_blocks, quantised, tiny, tokens, watched

_DONE: dict[tuple, Quantised] = {}


def made(architecture: str, **recipe) -> Quantised:
    """One quantisation per architecture and recipe for all tests that only look at it."""
    key = (architecture, *sorted(recipe.items()))
    if key not in _DONE:
        _DONE[key] = quantised(architecture, base=tiny(architecture), **recipe)
    return _DONE[key]


def observed(architecture: str, skip: int) -> dict[str, Tensor]:
    """Every site of the first layer on the default calibration windows, [S, T - skip, C]."""
    base, seen = tiny(architecture), {}
    inputs = block_inputs(base.model, tokens(8, 32))
    watched(float_blocks(base)[0], inputs.hidden, inputs.rotary, lambda site, x: seen.update({site: x[:, skip:].clone()}))
    return seen


def ranges_of(samples: Tensor) -> ChannelRanges:
    """[S, T, C] -> ranges."""
    low, high = samples.amin(1), samples.amax(1)
    return ChannelRanges(low.amin(0), high.amax(0), low, high, samples.flatten(0, 1))


def site_order(plan: LayerPlan, site: str, spec: BlockSpec) -> Tensor:
    """new = old[order] over the channels of a site."""
    name = {"attn_in": "R1", "q": "R2", "k": "R2", "v": "R3", "o_in": "R3", "mlp_in": "R4", "down_in": "R5"}[site]
    order = plan.orders.get(name)
    if order is None:
        return torch.arange(spec.width(site))
    if site in ("q", "o_in"):
        return query_channels(order, spec.groups)
    return head_channels(order) if site in ("k", "v") else order

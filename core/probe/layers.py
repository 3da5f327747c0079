"""Run float decoder blocks with other numbers at their sites or other weights; take gradients.

This is the only file of the probe that knows how a block runs. Shapes: B windows, T tokens, S draws of labels, D hidden, C
channels of a site. A model trained with ternary weights is its float twin (α t) with its own dynamic quantisers at the sites:
what it computes, and gradients pass straight through the rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.methods.base import Fake
from core.methods.bitnet import fake_dynamic
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.quant.linear.base import FloatLinear
from core.quant.static import PLAIN
from core.recipe import FLOAT_BITS, SITES

OUTPUTS = ("o", "down")
"""Linear layers at whose output, [B, T, D], gradients are taken too. What qkv and up put out is seen at q, k, v and down_in."""


@dataclass(frozen=True)
class Change:
    """What a float block runs with in place of its own numbers.

    Attributes:
        sites: functions of the tensors [B, T, C] at sites.
        weights: matrices [N, K] of linear layers, by name.
        softmax_bits: of the softmax output.
    """

    sites: Mapping[str, Fake] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    softmax_bits: int = FLOAT_BITS


@dataclass(frozen=True)
class Gradients:
    """Gradients of S objectives: at the sites and outputs of one layer, [S, B, T, C], and at its inputs, [S, B, T, D]."""

    sites: dict[str, Tensor]
    outputs: dict[str, Tensor]
    inputs: Tensor


class _Seen(Exception):
    """End a pass once the last wanted site was seen."""


def float_twin(block: DecoderBlock) -> tuple[DecoderBlock, Change]:
    """Return the float block that computes what `block` does, with what stands at its sites."""
    if block.is_float:
        return block, Change()
    fakes = {site: fake_dynamic(site, block.rules, block.spec) for site in SITES}
    return block.dequantized(), Change({site: fake for site, fake in fakes.items() if fake is not None})


def run(block: DecoderBlock, x: Tensor, rotary: Rotary, change: Change) -> Tensor:
    """Compute a float block of x [B, T, D] with a change."""
    changed = _changed(block, change)
    with changed.slots.fill(change.sites):
        return changed(x, rotary)


def see(
    block: DecoderBlock, values: Mapping[str, Tensor], rotary: Rotary, change: Change, sites: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return the tensors that reach `sites` when half a float block runs with a change, before what the change puts there.

    Args:
        values: [B, T, C] of the site that the half begins with: attn_in for q, k, v and o_in, mlp_in for down_in.
    """
    seen: dict[str, Tensor] = {}

    def watch(site: str, tensor: Tensor) -> Tensor | None:
        if site in sites:
            seen[site] = tensor
        if len(seen) == len(sites):
            raise _Seen
        return change.sites[site](tensor) if site in change.sites else None

    changed = _changed(block, change)
    with changed.slots.watch(watch), contextlib.suppress(_Seen):
        if sites == ("down_in",):
            changed.mlp(values["mlp_in"], PLAIN)
        else:
            changed.attention(values["attn_in"], PLAIN, rotary, None)
    return seen


def differentiate(
    block: DecoderBlock, x: Tensor, rotary: Rotary, change: Change, wanted: Tensor
) -> tuple[dict[str, Tensor], Gradients]:
    """Compute gradients through a float block that runs with functions at its sites.

    Args:
        change: functions at the sites, nothing else; gradients pass through them as if they did nothing.
        wanted: [S, B, T, D], gradients of S objectives at the block's output.
    Returns: (the seven sites' tensors [B, T, C] before those functions, gradients).
    """
    seen: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(site: str, tensor: Tensor) -> Tensor | None:
        seen[site] = tensor
        if site in change.sites:
            return tensor + (change.sites[site](tensor.detach()) - tensor.detach())
        return None

    linears = block.linears()
    hooks = [linears[name].register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y})) for name in OUTPUTS]
    try:
        with torch.enable_grad(), block.slots.watch(watch):
            x = x.detach().requires_grad_()
            y = block(x, rotary)
        targets = [x, *seen.values(), *outputs.values()]
        with coarse_products():
            found = [torch.autograd.grad(y, targets, grad, retain_graph=True) for grad in wanted]
    finally:
        for hook in hooks:
            hook.remove()
    inputs, *rest = (torch.stack(parts) for parts in zip(*found, strict=True))
    sites, ends = rest[: len(seen)], rest[len(seen) :]
    gradients = Gradients(dict(zip(seen, sites, strict=True)), dict(zip(outputs, ends, strict=True)), inputs)
    return {site: tensor.detach() for site, tensor in seen.items()}, gradients


@contextlib.contextmanager
def coarse_products() -> Iterator[None]:
    """Let float32 matrix products round their operands to bfloat16 where the processor multiplies those faster.

    For errors and gradients, whose own scatter is a hundred times larger; never for what is compared with itself.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _changed(block: DecoderBlock, change: Change) -> DecoderBlock:
    """Make the block with a change's weights and softmax; `block` itself where it changes neither."""
    if not change.weights and change.softmax_bits >= FLOAT_BITS:
        return block
    linears = block.linears()
    made = block.with_parts(**{name: FloatLinear(weight, linears[name].bias) for name, weight in change.weights.items()})
    made.attention.softmax_bits = change.softmax_bits
    return made

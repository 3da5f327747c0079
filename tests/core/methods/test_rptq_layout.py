"""A reordering is only a layout: quantising by label, nothing moved, gives the same values bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import core.methods.apply as build
from core.methods.base import LayerPlan
from core.methods.rptq.reorder import Orders, qkv_rows, reorder_block
from core.models.adapter import BlockSpec
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.quant.affine import Grid, QParams, choose_qparams, round_scale
from core.quant.segments import expand
from core.quant.static import ActivationQuantizer, InputUse
from core.recipe import INPUT_SITE, SITES
from kernels import Backend, code_limits
from tests.core.methods.rptq_tools import made, site_order
from tests.core.tools import (
    ARCHITECTURES,
    block_inputs,
    float_blocks,
    quantised,
    relative,
    spec_of,
    tiny,
    tokens,
    watched,
)


class Labelled(nn.Module):
    """x̂ Ŵᵀ + b in float64."""

    requested = Backend.REFERENCE

    def __init__(self, weight: Tensor, bias: Tensor | None, quantizer: ActivationQuantizer | None) -> None:
        super().__init__()
        self.weight, self.bias, self.quantizer = weight.double(), None if bias is None else bias.double(), quantizer

    def forward(self, x: Tensor, use: InputUse) -> Tensor:
        x = x if self.quantizer is None else self.quantizer.fake(x, InputUse(use.float_tokens))
        return nn.functional.linear(x, self.weight, self.bias)

    def parts(self, x: Tensor, sizes: tuple[int, ...], use: InputUse) -> Iterator[Tensor]:
        return iter(self(x, use).split(sizes, dim=-1))


def by_label(plan: LayerPlan, site: str, spec: BlockSpec) -> ActivationQuantizer | None:
    """The planned quantiser looked up per channel in the model's own order: one cluster per channel, nothing moved."""
    s = plan.sites[site]
    if s.params is None:
        return None
    order, params = site_order(plan, site, spec), []
    for values in (s.params.scale, s.params.zero_point):
        own = torch.empty(spec.width(site))
        own[order] = expand(values, s.offsets)
        params.append(own)
    return ActivationQuantizer(s.bits, QParams(*params), torch.arange(spec.width(site) + 1))


def weight_by_label(weight: Tensor, order: Tensor, offsets: Tensor, bits: int, grid: Grid) -> Tensor:
    """Round to nearest per row and label, columns where they are. Returns Ŵ in the original order."""
    labels = torch.empty(len(order), dtype=torch.int64)
    labels[order] = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    result, (qmin, qmax) = torch.empty_like(weight), code_limits(bits)
    for label in labels.unique():
        part = weight[:, labels == label]
        low, high = part.amin(1), part.amax(1)
        if grid is Grid.EXACT:
            low, high = low.clamp_max(0), high.clamp_min(0)
        p = choose_qparams(low, high, bits=bits, grid=grid, clip_zero_point=False)
        p = round_scale(p, low, torch.float16, bits=bits) if grid is Grid.EXACT else p
        scale, zero = p.scale[:, None], p.zero_point[:, None]
        result[:, labels == label] = (((part / scale).round() + zero).clamp(qmin, qmax) - zero) * scale
    return result


def output_order(name: str, plan: LayerPlan, spec: BlockSpec) -> Tensor | None:
    """Row order of a linear layer under a plan."""
    if name == "qkv":
        return qkv_rows(spec, None if spec.rope else plan.orders.get("R2"), plan.orders.get("R3"))
    order = plan.orders.get("R5")
    if name == "up" and order is not None:
        return torch.cat([order, order + spec.ffn]) if spec.gated else order
    return None


def replace_linear(block: DecoderBlock, name: str, layer: nn.Module) -> None:
    setattr(block.attention if name in ("qkv", "o") else block.mlp, name, layer)


def unpermuted(block: DecoderBlock, plan: LayerPlan, grid: Grid) -> DecoderBlock:
    """The float block with every quantiser applied by label."""
    spec, new = block.spec, copy.deepcopy(block).double()
    for name, linear in block.linears().items():
        site = INPUT_SITE[name]
        order = site_order(plan, site, spec)
        weight = weight_by_label(linear.weight, order, plan.sites[site].offsets, plan.weight_bits[name], grid)
        replace_linear(new, name, Labelled(weight, linear.bias, by_label(plan, site, spec)))
    for site in ("q", "k", "v"):
        setattr(new.attention, f"{site}_quantizer", by_label(plan, site, spec))
    new.attention.softmax_bits, new.attention.sink_tokens = plan.softmax_bits, plan.sink_tokens
    return new.double()


def in_double(block: DecoderBlock) -> DecoderBlock:
    """A quantised block whose linear layers multiply their dequantised weights in float64."""
    new = copy.deepcopy(block)
    for name, linear in list(new.linears().items()):
        replace_linear(new, name, Labelled(linear.dequantized_weight(), linear.bias, linear.quantizer))
    return new.double()


def recorded(block: DecoderBlock, hidden: Tensor, rotary: Rotary) -> dict[str, Tensor]:
    """Outputs of every quantiser of a block by site, [B, T, C], and of the block."""
    seen: dict[str, Tensor] = {}
    hooks = {INPUT_SITE[n]: x.quantizer for n, x in block.linears().items()} | {
        s: getattr(block.attention, f"{s}_quantizer") for s in "qkv"
    }
    for site, q in hooks.items():
        if q is None:
            continue
        q.fake = lambda x, use, s=site, f=q.fake: seen.setdefault(s, f(x, InputUse(use.float_tokens)))
        q.fake_heads = lambda x, use, s=site, f=q.fake_heads: seen.setdefault(s, f(x, InputUse(use.float_tokens)))
    seen["out"] = block(hidden, rotary)
    return {s: x.transpose(1, 2).flatten(2) if x.dim() == 4 else x for s, x in seen.items()}


@pytest.mark.parametrize(
    "architecture, scheme, variant",
    [
        *((a, "W4A4", "default") for a in ARCHITECTURES),
        *((a, "W4A4", "official") for a in ("llama", "qwen3", "opt")),
        ("qwen2", "W4A8", "strict"),
        ("opt", "W3A3KV", "official"),
        ("llama", "W4A3KV", "default"),
        ("mistral", "W4A16", "default"),
    ],
)
def test_fake_quantisation_by_label_on_the_unpermuted_block(architecture, scheme, variant):
    """Bit for bit at the output of every quantiser: in float64 the order of sums cannot reach a rounding boundary."""
    q = made(architecture, scheme=scheme, variant=variant, weights="rtn")
    spec, grid = spec_of(q.base), Grid.OFFICIAL if variant == "official" else Grid.EXACT
    inputs = block_inputs(q.base.model, tokens(2, 18, seed=9))
    for index, outcome in enumerate(q.outcomes):
        rotary = None if inputs.rotary is None else tuple(t.double() for t in inputs.rotary)
        found = recorded(in_double(q.blocks[index]), inputs.hidden.double(), rotary)
        expected = recorded(unpermuted(float_blocks(q.base)[index], outcome.plan, grid), inputs.hidden.double(), rotary)
        below = {s for s in SITES if outcome.plan.sites[s].bits < 16}
        assert set(found) == set(expected) == below | {"out"}
        for site in below:
            order = site_order(outcome.plan, site, spec)
            assert torch.equal(
                found[site][:, outcome.plan.sink_tokens :], expected[site][..., order][:, outcome.plan.sink_tokens :]
            ), site
        assert relative(found["out"], expected["out"]) < 1e-12


@pytest.mark.parametrize(
    "architecture, variant", [*((a, "default") for a in ARCHITECTURES), ("qwen3", "official"), ("opt", "official")]
)
def test_round_to_nearest_weights_grouped_by_label(architecture, variant):
    q = made(architecture, variant=variant, weights="rtn")
    spec, grid = spec_of(q.base), Grid.OFFICIAL if variant == "official" else Grid.EXACT
    for block, new, outcome in zip(float_blocks(q.base), q.blocks, q.outcomes, strict=True):
        for name, linear in block.linears().items():
            site = INPUT_SITE[name]
            order, rows = site_order(outcome.plan, site, spec), output_order(name, outcome.plan, spec)
            expected = weight_by_label(linear.weight, order, outcome.plan.sites[site].offsets, 4, grid)[:, order]
            expected = expected if rows is None else expected[rows]
            assert torch.equal(new.linears()[name].dequantized_weight(), expected), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gptq_sees_the_hessian_in_the_order_of_its_columns(architecture, monkeypatch):
    seen, real = [], build.quantize_weight

    def see(weight, hessian, offsets, *, order, **options):
        made = real(weight, hessian, offsets, order=order, **options)
        ordered = hessian if order is None else hessian[order][:, order]
        same = real(weight, ordered, offsets, **options)
        assert torch.equal(made.weight.codes, same.weight.codes) and made.method == "gptq"
        seen.append((weight.clone(), ordered.clone(), offsets))
        return made

    monkeypatch.setattr(build, "quantize_weight", see)
    windows = tokens(4, 24, seed=3)
    q = quantised(architecture, base=tiny(architecture), windows=windows)
    block, plan = float_blocks(q.base)[0], q.outcomes[0].plan
    inputs = block_inputs(q.base.model, windows)
    new, rows = reorder_block(block, Orders(**plan.orders)), {}
    watched(new, inputs.hidden, inputs.rotary, lambda site, x: rows.update({site: x.flatten(0, 1).clone()}))
    for (name, linear), (weight, hessian, offsets) in zip(new.linears().items(), seen[:4], strict=True):
        x = rows[INPUT_SITE[name]]
        assert torch.equal(weight, linear.weight) and torch.equal(offsets, plan.sites[INPUT_SITE[name]].offsets)
        assert relative(hessian, x.t() @ x) < 1e-5, name

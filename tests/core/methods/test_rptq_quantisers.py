"""RPTQ's quantisers on tiny models: oracles 3 (layout independence), 4, 6 and 7 of the planned parameters."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import core.methods.apply as build
from core.methods.base import LayerPlan
from core.methods.rptq.method import BETTER, OFFICIAL
from core.methods.rptq.reorder import Orders, head_channels, qkv_rows, query_channels, reorder_block
from core.models.architectures import BlockSpec
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.quant.affine import Grid, QParams, choose_qparams, round_scale
from core.quant.observer import RangeRules, decibels, plan_site, sqnr_db
from core.quant.segments import expand, segment_max, segment_min
from core.quant.static import ActivationQuantizer, InputUse
from core.recipe import INPUT_SITE, PER_CHANNEL, SCHEMES, SITES, Bits, Clusters
from kernels import Backend, code_limits, fake_quantize
from tests.core.methods.rptq_tools import made, observed, ranges_of
from tests.core.tools import (
    ARCHITECTURES,
    Quantised,
    block_inputs,
    float_blocks,
    quantised,
    relative,
    spec_of,
    tiny,
    tokens,
    watched,
)


def site_order(plan: LayerPlan, site: str, spec: BlockSpec) -> Tensor:
    """new = old[order] over the channels of a site."""
    name = {"attn_in": "R1", "q": "R2", "k": "R2", "v": "R3", "o_in": "R3", "mlp_in": "R4", "down_in": "R5"}[site]
    order = plan.orders.get(name)
    if order is None:
        return torch.arange(spec.width(site))
    if site in ("q", "o_in"):
        return query_channels(order, spec.groups)
    return head_channels(order) if site in ("k", "v") else order


# Oracle 3: the reordering is only a layout.


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
        weight = weight_by_label(linear.weight, order, plan.sites[site].offsets, plan.weight_bits, grid)
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
    seen = []
    real = build.quantize_weight
    monkeypatch.setattr(
        build, "quantize_weight", lambda w, h, o, **k: seen.append((w.clone(), h.clone(), o)) or real(w, h, o, **k)
    )
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


# Oracle 4: ends of the granularity.


def planned(architecture: str, variant: str, clusters: Clusters, scheme: str = "W4A4") -> Quantised:
    return made(architecture, variant=variant, clusters=clusters, scheme=scheme, weights="rtn")


@pytest.mark.parametrize("architecture", ("llama", "qwen3", "opt"))
def test_one_cluster_is_per_tensor_and_one_per_head_for_r2_and_r3(architecture):
    """Strict: exact min/max through the EMA-free rule with the clip search undone by comparing bounds, not scales."""
    q = planned(architecture, "official", Clusters.uniform(1))
    spec, x = spec_of(q.base), observed(architecture, 0)
    plan = q.outcomes[0].plan
    for site in SITES:
        s = plan.sites[site]
        per_head = {"q": spec.heads, "o_in": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}.get(site, 1)
        assert len(s.offsets) - 1 == per_head
        if site == "o_in":
            continue  # calibrated with a rounded softmax in this variant
        heads = x[site].unflatten(-1, (per_head, -1))  # [S, T, H, ...]
        low, high = heads[0].amin((0, 2)), heads[0].amax((0, 2))
        for sample in heads[1:]:  # one moving average per tensor (per head): 0.99 and 0.01, sample after sample
            low, high = 0.99 * low + 0.01 * sample.amin((0, 2)), 0.99 * high + 0.01 * sample.amax((0, 2))
        if site in ("mlp_in", "down_in"):
            continue
        expected = choose_qparams(low, high, bits=s.bits, grid=Grid.OFFICIAL)
        assert torch.allclose(s.params.scale, expected.scale, rtol=1e-5), site
        assert ((s.params.zero_point - expected.zero_point).abs() <= 1e-3).all(), site


@pytest.mark.parametrize("architecture", ("llama", "qwen3", "opt"))
@pytest.mark.parametrize("grid", list(Grid), ids=str)
def test_as_many_clusters_as_channels_is_per_channel(architecture, grid):
    variant = "official" if grid is Grid.OFFICIAL else "default"
    q, x = (
        planned(architecture, variant, Clusters.uniform(PER_CHANNEL)),
        observed(architecture, 0 if grid is Grid.OFFICIAL else 1),
    )
    spec, plan = spec_of(q.base), q.outcomes[0].plan
    for site in ("attn_in", "q", "k", "v"):
        s, order = plan.sites[site], site_order(plan, site, spec)
        assert len(s.offsets) - 1 == spec.width(site) == len(s.params.scale)
        low, high = x[site].amin(1), x[site].amax(1)  # [S, C]
        if grid is Grid.OFFICIAL:
            ranges = low[0], high[0]
            for sample in zip(low[1:], high[1:], strict=True):
                ranges = tuple(torch.lerp(a, b, 0.01) for a, b in zip(ranges, sample, strict=True))
        else:
            ranges = low.amin(0), high.amax(0)
        full = choose_qparams(*ranges, bits=s.bits, grid=grid).scale[order]
        if grid is Grid.OFFICIAL:
            assert torch.allclose(s.params.scale, full, rtol=1e-4)
        else:  # the clip search may shrink a range, to 0.4 at least
            ratio = s.params.scale / full
            assert float(ratio.max()) < 1 + 1e-4 and float(ratio.min()) > 0.4 - 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_bits_change_nothing(architecture):
    """All five reorderings folded, no quantiser, float weights: the float model."""
    q = made(architecture, scheme="custom", bits=Bits())
    ids = tokens(2, 20, seed=4)
    assert relative(q.model(ids).logits, q.base.model(ids).logits) < 1e-5
    assert all(o.plan.sites[s].params is None for o in q.outcomes for s in SITES) and q.outcomes[0].output_sqnr_db > 100
    assert {"R1", "R3", "R4", "R5"} <= set(q.outcomes[0].plan.orders)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantisers_are_idempotent(architecture):
    q = made(architecture)
    for site, x in observed(architecture, 0).items():
        plan = q.outcomes[0].plan.sites[site]
        module = ActivationQuantizer(plan.bits, plan.params, plan.offsets)
        once = module.fake(x)
        assert torch.equal(module.fake(once), once) and not torch.equal(once, x)


def test_disabling_nothing_but_r2_when_scores_stay_in_float():
    """R2 only serves the quantisers of q and k: a scheme without them keeps the order of the heads."""
    assert "R2" not in made("llama", scheme="W4A16").outcomes[0].plan.orders
    assert all("R2" in made("llama", scheme=s).outcomes[0].plan.orders for s in SCHEMES if s != "W4A16")


# Oracle 6: parameters of clusters.


@pytest.mark.parametrize("grid", list(Grid), ids=str)
def test_a_cluster_is_the_range_of_its_slice(grid):
    samples = torch.randn(5, 9, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 8, 12)
    offsets = torch.tensor([0, 1, 7, 12])
    plan = plan_site(ranges_of(samples), offsets, 4, RangeRules(grid, ema=False, clip_search=False))
    for c, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        part = samples[..., a:b]
        expected = choose_qparams(part.min(), part.max(), bits=4, grid=grid)
        assert plan.params.scale[c] == expected.scale and plan.params.zero_point[c] == expected.zero_point


@pytest.mark.parametrize("grid", list(Grid), ids=str)
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_the_clip_search_lowers_its_own_error(grid, bits):
    g = torch.Generator().manual_seed(1)
    samples = torch.randn(4, 100, 16, generator=g) ** 3  # heavy tails
    offsets, weight = torch.tensor([0, 1, 5, 16]), torch.rand(16, generator=g) * 10
    plain, searched = (plan_site(ranges_of(samples), offsets, bits, RangeRules(grid, False, s), weight) for s in (False, True))
    rows, (qmin, qmax) = samples.flatten(0, 1), code_limits(bits)

    def cost(params: QParams) -> Tensor:
        s, z = expand(params.scale, offsets), expand(params.zero_point, offsets)
        error = (fake_quantize(rows, s, qmin - z, qmax - z) - rows).square().sum(0) * weight
        return torch.stack([error[a:b].sum() for a, b in itertools.pairwise(offsets.tolist())])

    assert (cost(searched.params) <= cost(plain.params) * (1 + 1e-6)).all()
    if bits <= 4:
        assert cost(searched.params).sum() < 0.9 * cost(plain.params).sum()
    assert searched.sqnr_db == pytest.approx(
        sqnr_db(
            rows,
            fake_quantize(
                rows,
                expand(searched.params.scale, offsets),
                qmin - expand(searched.params.zero_point, offsets),
                qmax - expand(searched.params.zero_point, offsets),
            ),
        )
    )


def test_sqnr_of_known_noise():
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x) == math.inf and sqnr_db(torch.zeros(2), x) == -math.inf
    assert sqnr_db(x, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)


def test_decibels_at_the_ends():
    assert decibels(0, 0) == decibels(1, 0) == math.inf and decibels(0, 1) == -math.inf
    assert decibels(1e-320, 1e300) == pytest.approx(-6200, abs=1)


def test_a_dead_site_does_not_crash():
    for rules in (OFFICIAL.ranges, BETTER.ranges):
        plan = plan_site(ranges_of(torch.zeros(2, 5, 6)), torch.tensor([0, 2, 6]), 4, rules, torch.zeros(6))
        assert torch.isfinite(plan.params.scale).all() and (plan.params.scale > 0).all()


def test_segments_reduce_to_what_they_say():
    x, offsets = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 4, 10])
    runs = list(itertools.pairwise(offsets.tolist()))
    assert torch.equal(segment_min(x, offsets), torch.stack([x[:, a:b].amin(1) for a, b in runs], 1))
    assert torch.equal(segment_max(x, offsets), torch.stack([x[:, a:b].amax(1) for a, b in runs], 1))
    assert expand(torch.tensor([1, 2, 3]), offsets).tolist() == [1, 2, 2, 2, 3, 3, 3, 3, 3, 3]


# Oracle 7: errors of the planned quantisers on the data they were calibrated on.


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_rounding_errors_of_planned_quantisers(architecture):
    """Exact grid without clip search: at most half a step on every calibration value, sinks apart."""
    spec, x = spec_of(tiny(architecture)), observed(architecture, 1)
    q = planned(architecture, "default", Clusters(), scheme="W4A4")
    for site, values in x.items():
        ranges = ranges_of(values).permuted(site_order(q.outcomes[0].plan, site, spec))
        offsets = q.outcomes[0].plan.sites[site].offsets
        plan = plan_site(ranges, offsets, 4, RangeRules(Grid.EXACT, ema=False, clip_search=False))
        module = ActivationQuantizer(4, plan.params, offsets)
        moved = values[..., site_order(q.outcomes[0].plan, site, spec)]
        error = (module.fake(moved) - moved).abs() / module.channel_scale
        assert float(error.max()) <= 0.5 + 1e-3, site

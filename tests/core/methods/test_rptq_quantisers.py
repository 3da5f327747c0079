"""RPTQ's planned parameters on tiny models: ends of the granularity, clusters, and errors on what they were calibrated on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from core.methods.rptq.method import BETTER, OFFICIAL
from core.quant.affine import Grid, QParams, choose_qparams
from core.quant.observer import RangeRules, decibels, plan_site, sqnr_db
from core.quant.segments import expand, segment_max, segment_min
from core.quant.static import ActivationQuantizer
from core.recipe import PER_CHANNEL, SCHEMES, SITES, Bits, Clusters
from kernels import code_limits, fake_quantize
from tests.core.methods.rptq_tools import made, observed, ranges_of, site_order
from tests.core.tools import (
    ARCHITECTURES,
    Quantised,
    relative,
    spec_of,
    tiny,
    tokens,
)

# Ends of the granularity.


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


# Parameters of clusters.


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


# Errors of the planned quantisers on the data they were calibrated on.


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

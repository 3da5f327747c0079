"""Plans that share what was made of the same statistics are those that statistics of their own give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.methods import method
from core.methods.base import LayerPlan, LayerStatistics
from core.recipe import INPUT_SITE, SITES, Bits, Clusters, QuantRecipe
from tests.core.methods.rptq_tools import observed, ranges_of
from tests.core.tools import spec_of, tiny

RECIPES = [
    *(QuantRecipe("m", scheme=scheme) for scheme in ("W4A16", "W4A4", "W4A4KV", "W3A3KV")),
    *(QuantRecipe("m", variant=variant) for variant in ("official", "strict")),
    *(QuantRecipe("m", segments=segments, variant="strict") for segments in ("aligned", "pow2")),
    *(QuantRecipe("m", clusters=Clusters(3, 2, count, count, 3), seed=seed) for count in (2, 5) for seed in (0, 1)),
    QuantRecipe("m", scheme="custom", bits=Bits(4, 5, 4, 3, 4, 8, 6, 7, 2)),
    QuantRecipe("m", method="rtn"),
    QuantRecipe("m", method="rtn", variant="matched"),
    QuantRecipe("m", method="rtn", variant="matched", clusters=Clusters(2, 2, 2, 2, 2)),
    QuantRecipe("m", method="bitnet"),
]


def statistics(architecture: str) -> LayerStatistics:
    """What a method sees of the first layer of a tiny model; calibrated ranges that differ from the clustered ones."""
    spec, generator = spec_of(tiny(architecture)), torch.Generator().manual_seed(0)
    found = observed(architecture, 1)
    ranges, calibrated = ({s: ranges_of(x * factor) for s, x in found.items()} for factor in (1.0, 0.9))
    importance = {s: torch.rand(spec.width(s), generator=generator) for s in INPUT_SITE.values()}
    return LayerStatistics(ranges, calibrated, {}, importance)


def numbers(plan: LayerPlan) -> list[Tensor | int]:
    """Everything that a plan says."""
    found: list[Tensor | int] = [plan.softmax_bits, *plan.weight_bits.values(), plan.sink_tokens, *plan.orders.values()]
    for site in (plan.sites[s] for s in SITES):
        grid = [] if site.params is None else [site.params.scale, site.params.zero_point]
        found += [site.bits, site.offsets, *grid, *([] if site.weight_offsets is None else [site.weight_offsets])]
    return found


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_the_plan_of_a_recipe_does_not_depend_on_plans_before_it(architecture):
    shared, spec = statistics(architecture), spec_of(tiny(architecture))
    for recipe in (*RECIPES, *RECIPES[::-1]):
        planner = method(recipe.method)
        own = numbers(planner.plan_layer(replace(shared, made={}), recipe, spec))
        found = numbers(planner.plan_layer(shared, recipe, spec))
        assert len(own) == len(found)
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(own, found, strict=True)), recipe


def test_a_second_plan_makes_only_what_differs():
    stats, spec = statistics("llama"), spec_of(tiny("llama"))
    first = QuantRecipe("m", scheme="custom", bits=Bits(4, 4, 4, 4, 4, 8, 4, 4, 4))
    second = replace(first, bits=replace(first.bits, k=3), clusters=replace(first.clusters, R5=7))
    one, other = (method("rptq").plan_layer(stats, recipe, spec) for recipe in (first, second))
    assert {site for site in SITES if one.sites[site] is not other.sites[site]} == {"k", "down_in"}
    assert {name for name in one.orders if not torch.equal(one.orders[name], other.orders[name])} == {"R5"}

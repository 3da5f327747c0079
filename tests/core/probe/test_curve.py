"""Costs by cluster count are those that recipes predict, and their ends are one grid for the tensor and one per channel."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from core.errors import InputError
from core.methods.rptq.explore import knee
from core.probe.curve import cost_curve
from core.probe.predict import predict
from core.recipe import PER_CHANNEL, SITES, Clusters
from tests.core.probe.probe_tools import probed, recipe_of, statistics_of
from tests.core.tools import spec_of

RECIPE = recipe_of().with_bits(dict.fromkeys(SITES, 4))


def curve(site: str, layers=(1,), recipe=RECIPE, architecture: str = "llama"):
    loaded, probe = probed(architecture)
    return cost_curve(probe, loaded.model, statistics_of(loaded.model, recipe), recipe, site, layers)


def predicted(site: str, count: int, variant: str, layers=(1,)) -> float:
    loaded, probe = probed("llama")
    recipe = replace(RECIPE, variant=variant, clusters=Clusters(*[count] * 5))
    cells = predict(probe, loaded.model, statistics_of(loaded.model, recipe), recipe).cells
    return math.fsum(cells[f"layers.{layer}.{site}"] for layer in layers)


@pytest.mark.parametrize("site", SITES)
def test_every_point_is_what_the_recipe_with_these_groups_predicts(site):
    found, (loaded, probe) = curve(site), probed("llama")
    spec = spec_of(loaded)
    block = spec.head_dim if site in ("q", "k", "v", "o_in") else spec.width(site)
    assert found.g == tuple(2**i for i in range(12) if 2**i <= block)
    assert (found.site, found.layers, found.bits) == (site, (1,), 4)
    assert found.kmeans == pytest.approx([predicted(site, g, "default") for g in found.g], rel=1e-9)
    assert found.equal == pytest.approx([predicted(site, g, "sorted") for g in found.g], rel=1e-9)
    assert found.per_channel == pytest.approx(predicted(site, PER_CHANNEL, "default"), rel=1e-9)
    assert found.knee == knee([*found.g, block], [*found.kmeans, found.per_channel]) and found.noise_floor == probe.noise_floor
    if block == spec.width(site):
        assert found.per_tensor == pytest.approx(found.kmeans[0], rel=1e-5), "one cluster is one grid"
    else:
        assert found.per_tensor != pytest.approx(found.kmeans[0], rel=1e-5), "one cluster per head is not one grid"
    assert found.kmeans[0] == pytest.approx(found.equal[0], rel=1e-9) and found.kmeans[1] != found.equal[1]


def test_all_layers_cost_the_sum_of_each():
    both, each = curve("down_in", (0, 1)), [curve("down_in", (layer,)) for layer in (0, 1)]
    for name in ("kmeans", "equal"):
        assert getattr(both, name) == pytest.approx([a + b for a, b in zip(*(getattr(e, name) for e in each), strict=True)])
    assert both.per_tensor == pytest.approx(sum(e.per_tensor for e in each)) and both.layers == (0, 1)


@pytest.mark.parametrize("architecture", ["opt", "qwen3", "bitnet"])
def test_other_architectures_have_curves_that_fall(architecture):
    found = curve("down_in", architecture=architecture)
    assert 0 < found.per_channel < found.per_tensor and len(found.kmeans) == len(found.equal) == len(found.g)


@pytest.mark.parametrize(
    "site, layers, recipe", [("qkv", (0,), RECIPE), ("k", (7,), RECIPE), ("k", (0,), recipe_of(scheme="W4A16"))]
)
def test_a_site_that_is_not_there_or_not_quantised_is_refused(site, layers, recipe):
    with pytest.raises(InputError) as caught:
        curve(site, layers, recipe)
    assert caught.value.code == "E-PARAM-SITE"

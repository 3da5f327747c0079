"""The diagram of the reorderings: what is lit follows the recipe, and its numbers are the model's."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from app.view.fused import diagram, why_off
from core.recipe import REORDER_OF, SITES, Clusters, Overrides, QuantRecipe

RECIPE = QuantRecipe("fake", clusters=Clusters.uniform(32))


@pytest.fixture(scope="module")
def layer(ranges):
    return {site.kind: site for site in ranges.sites.values() if site.layer == 2}


def places(html):
    """(lit, clusters, size) of every button, by site."""
    found = re.findall(r'class="qs-place( qs-lit)?" data-index="(\d)"[^>]*><b>.*?</b><span>(.*?)</span><span>(.*?)</span>', html)
    return {SITES[int(index)]: (bool(lit), facts, bits) for lit, index, facts, bits in found}


def test_numbers_are_those_of_model_layer_and_recipe(layer):
    html = diagram(RECIPE, 2, layer, "k")
    shown = places(html)
    assert set(shown) == set(SITES) and all(lit for lit, _, _ in shown.values())
    assert shown["down_in"] == (True, "32 clusters", "1,536 channels, 4 bits")
    assert shown["attn_in"][2] == "576 channels, 8 bits"
    assert shown["q"] == (True, "4 clusters in each head", "9 heads of 64 channels, 4 bits")
    assert shown["v"] == (True, "4 clusters in each head", "3 heads of 64 channels, 4 bits")
    assert "Layer 2 of fake, W4A4 g32: 5 of 5 reorderings are on" in html
    assert re.findall(r'data-index="(\d)" aria-pressed="true"', html) == [str(SITES.index("k"))]


@pytest.mark.parametrize(
    ("recipe", "off"),
    [
        (RECIPE, ""),
        (replace(RECIPE, scheme="W4A16"), "R2"),
        (replace(RECIPE, scheme="W4A4KV"), ""),
        (replace(RECIPE, clusters=Clusters(1, 4, 1, 32, 1)), "R1 R3 R5"),
        (replace(RECIPE, overrides=Overrides.parse("layers.2.R5=1, layers.3.R1=1")), "R5"),
        (replace(RECIPE, method="rtn"), "R1 R2 R3 R4 R5"),
        (QuantRecipe("fake", method="bitnet"), "R1 R2 R3 R4 R5"),
    ],
)
def test_what_is_off_says_why(layer, recipe, off):
    own = recipe.for_layer(2)
    assert [name for name in ("R1", "R2", "R3", "R4", "R5") if why_off(name, own)] == off.split()
    html = diagram(recipe, 2, layer, "q")
    assert html.count("Off: ") == len(off.split()) and f"{5 - len(off.split())} of 5" in html
    for kind, (lit, facts, _) in places(html).items():
        assert lit is (facts != "off") is (REORDER_OF[kind] not in off.split())


def test_one_order_for_all_layers_is_said(layer):
    own, shared = (diagram(replace(RECIPE, order=order), 2, layer, "q") for order in ("layer", "shared"))
    assert "keeps its order" in own and "for all layers" not in own
    assert "keeps its order" not in shared and shared.count("the clusters are runs of it") == 2
    assert places(own) == places(shared)


def test_a_count_above_the_width_is_the_width(layer):
    shown = places(diagram(replace(RECIPE, clusters=Clusters(65536, 65536, 4, 4, 4)), 2, layer, "q"))
    assert shown["attn_in"][1] == "576 clusters" and shown["k"][1] == "64 clusters in each head"

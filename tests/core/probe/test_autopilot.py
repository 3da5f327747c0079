"""The allocation keeps its budget, is the best of all choices, predicts what its recipe predicts, and is what a run makes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import pytest

from core.errors import InputError
from core.evaluation.describe import model_info
from core.evaluation.memory import kv_bytes_per_token, measured_parts, total_bytes
from core.evaluation.shapes import Shape, shape_of_loaded
from core.models.tiny import tiny_model
from core.probe import autopilot
from core.probe.autopilot import BITS, allocate, smallest_g
from core.probe.predict import predict
from core.probe.probe import build_probe
from core.probe.report import Prediction
from core.recipe import PER_CHANNEL, BitNetOptions, Bits, Clusters, Overrides, QuantRecipe
from tests.core.probe.probe_tools import READ, recipe_of, statistics_of
from tests.core.tools import quantised

CONTEXT = 64


@lru_cache
def tool(layers: int = 2):
    """`predict` on a tiny model's probe, as the allocator takes it, and the model."""
    loaded = tiny_model("llama", layers=layers)
    probe, statistics = build_probe(loaded.model, READ), statistics_of(loaded.model, recipe_of())
    return lambda recipe, tell: predict(probe, loaded.model, statistics, recipe, progress=tell), loaded


def shape(layers: int = 2) -> Shape:
    return shape_of_loaded(model_info(tool(layers)[1], 0.0))


RECIPES = {
    "W4A4KV": {"scheme": "W4A4KV"},
    "W4A4": {},
    "W3A3KV": {"scheme": "W3A3KV"},
    "weights only": {"scheme": "W4A16"},
    "cache only": {"scheme": "custom", "bits": Bits(k=4, v=4, down_in=6)},
    "rtn": {"method": "rtn"},
    "own sites": {"overrides": Overrides.parse("layers.1.down_in=8,layers.0.R5=3,layers.0.k=2")},
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_allocation_keeps_its_budget_and_undercuts_the_uniform_recipe(name):
    recipe, size = recipe_of(**RECIPES[name]), shape()
    found = allocate(tool()[0], size, recipe, context=CONTEXT)
    made = replace(recipe, overrides=Overrides.from_dict(found.overrides))
    whole = tool()[0](made, lambda *_: None)
    assert found.predicted == pytest.approx(whole.total, rel=1e-9)
    assert found.nbytes == total_bytes(size, made, CONTEXT) <= found.budget == total_bytes(size, recipe, CONTEXT)
    if name != "own sites":  # predictions scatter; those that rise with the bits are not trusted
        assert found.predicted <= 1.05 * tool()[0](recipe, lambda *_: None).total
    assert found.rival.nbytes <= found.budget and found.predicted <= 1.05 * found.rival.predicted
    other = recipe.with_bits(found.rival.bits)
    assert total_bytes(size, other, CONTEXT) == found.rival.nbytes
    assert tool()[0](other, lambda *_: None).total == pytest.approx(found.rival.predicted, rel=1e-9)
    for layer in (0, 1):
        own, before = made.for_layer(layer).tensor_bits, recipe.for_layer(layer).tensor_bits
        kept = [s for s in ("attn_in", "q", "softmax", "o_in", "mlp_in", "down_in") if own.site(s) != before.site(s)]
        assert not kept and made.for_layer(layer).clusters == recipe.for_layer(layer).clusters
        assert (own.k == 16) == (before.k == 16) and (own.down == 16) == (recipe.tensor_bits.weights == 16)


@pytest.mark.parametrize("own", ["", "layers.0.q=16,layers.1.down_in=8"])
def test_activations_share_their_bits(own):
    """As many bits per token as before, over all sites; what stays in float stays so."""
    recipe, size = recipe_of(overrides=Overrides.parse(own)), shape()
    still, found = (allocate(tool()[0], size, recipe, context=CONTEXT, activations=spread) for spread in (False, True))
    made = replace(recipe, overrides=Overrides.from_dict(found.overrides))
    widths = {"attn_in": size.hidden, "q": 128, "o_in": 128, "mlp_in": size.hidden, "down_in": size.ffn}

    def volume(other: QuantRecipe) -> int:
        layers = [other.for_layer(layer).tensor_bits for layer in (0, 1)]
        return sum(width * bits.site(site) for bits in layers for site, width in widths.items())

    assert volume(made) <= volume(recipe) and found.nbytes == total_bytes(size, made, CONTEXT) <= found.budget
    assert found.predicted == pytest.approx(tool()[0](made, lambda *_: None).total, rel=1e-9)
    assert found.predicted < still.predicted and found.rival == still.rival
    assert made.for_layer(0).tensor_bits.q == (16 if own else found.bits["layers.0.q"])
    assert {made.for_layer(layer).tensor_bits.softmax for layer in (0, 1)} == {8}


def test_the_stored_bytes_of_the_model_are_those_counted():
    """The packed model of the allocation against the packed uniform one: clusters are full, so the formula is exact."""
    recipe = recipe_of(method="rtn", scheme="W4A4KV", clusters=Clusters())
    base = tool()[1]
    found = allocate(tool()[0], shape(), recipe, context=CONTEXT)
    sizes = []
    for overrides in (Overrides(), Overrides.from_dict(found.overrides)):
        made = quantised("llama", base=base, method="rtn", scheme="W4A4KV", weights="rtn", overrides=overrides)
        sizes.append(sum(measured_parts(made.model).values()) + CONTEXT * kv_bytes_per_token(made.model))
    assert sizes == [found.budget, found.nbytes] and sizes[1] <= sizes[0] and found.overrides


def test_no_choice_of_bits_is_better(monkeypatch):
    """One layer, two numbers of bits: all 2 ** 6 choices."""
    monkeypatch.setattr(autopilot, "BITS", (3, 5))
    recipe, size, every = recipe_of(scheme="W4A4KV"), shape(1), []
    scales = {"qkv": 1.0, "o": 0.3, "up": 2.0, "down": 5.0, "k": 0.7, "v": 0.11}

    def look(other: QuantRecipe, tell) -> Prediction:
        own = other.for_layer(0).tensor_bits
        bits = {cell: own.site(cell) if cell in ("k", "v") else own.weight(cell) for cell in scales}
        cells = {f"layers.0.{cell}": scale * 3.0 ** -bits[cell] for cell, scale in scales.items()} | {"layers.0.q": 0.01}
        return Prediction(cells, sum(cells.values()), (), (), 0.0, 0.0)

    for choice in itertools.product((3, 5), repeat=6):
        places = ("weights.qkv", "weights.o", "weights.up", "weights.down", "k", "v")
        own = replace(recipe, overrides=Overrides(tuple((0, place, b) for place, b in zip(places, choice, strict=True))))
        every.append((total_bytes(size, own, CONTEXT), look(own, lambda *_: None).total))
    for limit in sorted({nbytes for nbytes, _ in every})[::5]:
        found = allocate(look, size, recipe, budget=limit, context=CONTEXT)
        assert found.predicted == pytest.approx(min(kld for nbytes, kld in every if nbytes <= limit), rel=1e-9)
        assert found.nbytes <= limit
    for bound in sorted(kld for _, kld in every)[1::9]:
        found = allocate(look, size, recipe, bound=bound * (1 + 1e-9), context=CONTEXT)
        assert found.nbytes == min(nbytes for nbytes, kld in every if kld <= bound * (1 + 1e-9))


def test_fewer_bits_are_never_taken_to_cost_less():
    """A prediction that errs downwards at 3 bits tempts nobody."""

    def look(recipe, tell) -> Prediction:
        own = recipe.tensor_bits
        cells = {f"layers.{i}.{name}": 4.0**-own.weights for i in (0, 1) for name in ("qkv", "o", "up", "down")}
        cells["layers.0.up"] = 0.0 if own.weights == 3 else cells["layers.0.up"]
        return Prediction(cells, 0.0, (), (), 0.0, 0.0)

    found = allocate(look, shape(), recipe_of(scheme="W4A16"), budget=1e9, context=CONTEXT)
    assert set(found.bits.values()) == {8}


def test_more_bytes_never_cost_more():
    recipe, size = recipe_of(scheme="W4A4KV"), shape()
    ends = (recipe.with_bits(dict.fromkeys(("weights", "k", "v"), bits)) for bits in (BITS[0], BITS[-1]))
    low, high = (total_bytes(size, end, CONTEXT) for end in ends)
    found = [allocate(tool()[0], size, recipe, budget=low + (high - low) * i / 6, context=CONTEXT).predicted for i in range(7)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"budget": 1000.0}, "E-PARAM-BUDGET"),
        ({"budget": 0.0}, "E-PARAM-BUDGET"),
        ({"budget": float("nan")}, "E-PARAM-BUDGET"),
        ({"bound": 1e-9}, "E-PARAM-BUDGET"),
        ({"bound": -1.0}, "E-PARAM-BOUND"),
        ({"budget": 1e6, "bound": 1.0}, "E-PARAM-BUDGET"),
        ({"context": 0}, "E-PARAM-CONTEXT"),
    ],
)
def test_limits_that_do_not_fit_are_refused(limits, code):
    with pytest.raises(InputError) as caught:
        allocate(tool()[0], shape(), recipe_of(), **limits)
    assert caught.value.code == code and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "recipe", [QuantRecipe("m", method="bitnet", bitnet=BitNetOptions()), recipe_of(scheme="custom", bits=Bits(q=4, k=16, v=4))]
)
def test_recipes_without_bits_to_choose_are_refused(recipe):
    with pytest.raises(InputError, match="use rptq or rtn"):
        allocate(tool()[0], shape(), recipe)


@pytest.mark.parametrize(("within", "expected"), [(0.0, 32), (0.05, 20), (0.5, 2), (10.0, 1)])
def test_the_smallest_g_is_found(within, expected):
    """A cost of 1 + 1 / g above per channel, flat from 32 on."""
    asked = []

    def look(recipe, tell) -> Prediction:
        g = recipe.clusters.R5
        asked.append(g)
        return Prediction({}, 1.0 if g >= 32 else 1 + 1 / g, (), (), 0.0, 0.0)

    found = smallest_g(look, recipe_of(), within=within)
    assert (found.g, found.per_channel) == (expected, 1.0) and found.predicted <= 1 + within
    assert len(asked) == len(set(asked)) < 20 and asked[0] == PER_CHANNEL


def test_a_method_without_clusters_has_no_smallest_g():
    with pytest.raises(InputError, match="no clusters"):
        smallest_g(tool()[0], recipe_of(method="rtn"))

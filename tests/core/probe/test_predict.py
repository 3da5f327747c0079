"""Predictions: the formula by loops, against measured swaps, what is computed again, and what is only estimated."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from core.models.tiny import tiny_model
from core.probe import predict as predict_module
from core.probe.measure import measure, swap
from core.probe.plans import CELLS
from core.probe.predict import fisher, predict
from core.probe.probe import Half, build_probe
from core.probe.report import SATURATED, Prediction
from core.probe.statistics import Statistics
from core.recipe import BitNetOptions, Bits, Clusters, QuantRecipe
from tests.core.probe.probe_tools import READ, bits_of, probed, recipe_of, statistics_of
from tests.core.tools import ARCHITECTURES, tokens


def test_the_form_by_loops():
    """Products of equal tokens, and of equal channels, each pair once."""
    generator = torch.Generator().manual_seed(0)
    draws, windows, length, channels = 2, 2, 3, 4
    g = Half.of(torch.randn(draws, windows, length, channels, generator=generator))
    e = torch.randn(windows, length, channels, generator=generator)
    total = 0.0
    for s in range(draws):
        for b in range(windows):
            u = (g.get()[s, b] * e[b]).tolist()
            for t in range(length):
                for c in range(channels):
                    for t2 in range(length):
                        for c2 in range(channels):
                            if t == t2 or c == c2:
                                total += u[t][c] * u[t2][c2]
    assert fisher(g, e) == pytest.approx(total / (2 * windows * length * draws), rel=1e-5)


def test_the_form_is_never_negative():
    g = Half.of(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, None])
    assert fisher(g, torch.ones(1, 2, 2)) == 0.0


@pytest.mark.parametrize("architecture", ("llama", "opt", "qwen3", "bitnet"))
def test_predictions_agree_with_measured_swaps(architecture):
    """Many draws of labels: half of the cells within 15 % (measured: medians of 0.97 to 1.05), and none far off (0.21 to 2.7), in
    models whose outliers make them far from quadratic."""
    loaded = tiny_model(architecture)
    probe = build_probe(loaded.model, tokens(4, 24, seed=5), draws=48)
    ratios = []
    for cell in CELLS:
        recipe = recipe_of(scheme="custom", bits=bits_of(cell, 8))
        stats = statistics_of(loaded.model, recipe)
        found = predict(probe, loaded.model, stats, recipe).cells
        weights = cell in ("qkv", "o", "up", "down")
        assert set(found) == {f"layers.{i}.{c}" for i in (0, 1) for c in (("qkv", "o", "up", "down") if weights else (cell,))}
        ratios += [found[f"layers.{i}.{cell}"] / swap(probe, loaded.model, stats, recipe, i, cell).kld for i in (0, 1)]
    assert all(0.15 < r < 3.5 for r in ratios) and 0.85 < statistics.median(ratios) < 1.15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_total_follows_the_measured_pass(architecture):
    loaded, probe = probed(architecture, draws=16)
    recipe = recipe_of(scheme="custom", bits=Bits(*[8] * 9))
    stats = statistics_of(loaded.model, recipe)
    found = predict(probe, loaded.model, stats, recipe)
    assert found.total == pytest.approx(math.fsum(found.cells.values())) and not found.estimated and not found.unknown
    assert 0.7 < found.total / measure(probe, loaded.model, stats, recipe).kld < 3  # measured: 1.17 to 2.01
    assert found.noise_floor == probe.noise_floor and not found.saturated


def test_cells_in_float_are_left_out():
    loaded, probe = probed("llama")
    recipe = recipe_of(scheme="W4A4KV")
    found = predict(probe, loaded.model, statistics_of(loaded.model, recipe), recipe)
    assert {name.split(".")[2] for name in found.cells} == {"qkv", "o", "up", "down", "k", "v"}
    assert predict(probe, loaded.model, statistics_of(loaded.model, recipe), recipe_of(scheme="custom", bits=Bits())).cells == {}


def test_only_the_cells_asked_for_are_predicted():
    loaded, probe = probed("llama")
    recipe, names = recipe_of(), {"layers.1.k", "layers.0.up"}
    stats = statistics_of(loaded.model, recipe)
    every = predict(probe, loaded.model, stats, recipe).cells
    few = predict(probe, loaded.model, stats, recipe, cells=names)
    assert few.cells == {name: every[name] for name in names} and few.total == pytest.approx(math.fsum(few.cells.values()))


def test_beyond_half_a_nat_a_prediction_says_so():
    assert Prediction({}, SATURATED + 0.1, (), (), 0.0, 0.0).to_dict()["saturated"]


# what is computed again


@pytest.fixture
def counted(monkeypatch) -> list[tuple[int, str]]:
    """Cells that were computed, in order."""
    seen, real = [], predict_module._predict_cell

    def record(probe, layer, index, cell):
        seen.append((index, cell))
        return real(probe, layer, index, cell)

    monkeypatch.setattr(predict_module, "_predict_cell", record)
    return seen


def fresh(recipe: QuantRecipe) -> tuple:
    loaded = tiny_model("llama")
    return build_probe(loaded.model, READ), loaded.model, statistics_of(loaded.model, recipe)


def changed(recipe: QuantRecipe, **bits: int) -> QuantRecipe:
    return recipe_of(scheme="custom", bits=Bits(**{**{c: recipe.tensor_bits.site(c) for c in vars(recipe.tensor_bits)}, **bits}))


def test_only_what_a_change_concerns_is_computed_again(counted):
    recipe = recipe_of(scheme="custom", bits=Bits(*[4] * 9))
    tool = fresh(recipe)
    first = predict(*tool, recipe)
    assert sorted(counted) == sorted((layer, cell) for layer in (0, 1) for cell in CELLS)
    counted.clear()
    assert predict(*tool, recipe).cells == first.cells and not counted
    predict(*tool, changed(recipe, k=3))
    assert sorted(counted) == [(0, "k"), (1, "k")], "clusters do not depend on bits"
    counted.clear()
    predict(*tool, recipe_of(scheme="custom", bits=Bits(*[4] * 9), clusters=Clusters(5, 3, 3, 5, 6)))
    assert sorted(counted) == [(0, "down"), (0, "down_in"), (1, "down"), (1, "down_in")]
    counted.clear()
    predict(*tool, changed(recipe, weights=5))
    assert sorted(counted) == sorted((layer, cell) for layer in (0, 1) for cell in ("qkv", "o", "up", "down"))


def test_what_is_kept_is_what_would_be_computed():
    """Recipes in any order give the cells that each gives alone."""
    recipes = [
        recipe_of(scheme="W4A4"),
        recipe_of(variant="strict"),
        recipe_of(segments="pow2", variant="strict"),
        recipe_of(scheme="W4A4KV"),
        recipe_of(method="rtn"),
        recipe_of(method="rtn", variant="matched"),
        recipe_of(variant="sorted"),
        recipe_of(method="bitnet", bitnet=BitNetOptions(kv_bits=4, q_bits=5)),
        recipe_of(method="bitnet", bitnet=BitNetOptions("int4", kv_bits=4, bos_bits=8)),
        recipe_of(clusters=Clusters(5, 3, 3, 5, 4)),
        recipe_of(scheme="W4A16", seed=3),
    ]
    loaded, alone = tiny_model("llama"), []
    for recipe in recipes:
        probe, model, stats = fresh(recipe)
        alone.append(predict(probe, model, stats, recipe).cells)
    probe = build_probe(loaded.model, READ)
    kept: dict[object, Statistics] = {}
    for recipe, expected in [*zip(recipes, alone, strict=True)] * 2:
        stats = statistics_of(loaded.model, recipe)
        stats = kept.setdefault(stats.digest, stats)
        found = predict(probe, loaded.model, stats, recipe).cells
        assert found == pytest.approx(expected, rel=1e-5), recipe.label()


def test_other_statistics_are_another_prediction(counted):
    recipe = recipe_of()
    probe, model, stats = fresh(recipe)
    predict(probe, model, stats, recipe)
    counted.clear()
    predict(probe, model, statistics_of(model, recipe, tokens(8, 32, seed=9)), recipe)
    assert len(counted) == 2 * len(CELLS)


# without time


def test_without_time_cells_are_estimated_from_what_is_known():
    recipe = recipe_of(scheme="custom", bits=Bits(k=4))
    tool = fresh(recipe)
    none = predict(*tool, recipe, seconds=0.0)
    assert none.cells == {} and none.unknown == ("layers.0.k", "layers.1.k") and none.total == 0
    for count in (1, 4, 16):
        predict(*tool, recipe_of(scheme="custom", bits=Bits(k=4), clusters=Clusters(1, count, 1, 1, 1)))
    between = recipe_of(scheme="custom", bits=Bits(k=4), clusters=Clusters(1, 2, 1, 1, 1))
    quick = predict(*tool, between, seconds=0.0)
    assert quick.estimated == ("layers.0.k", "layers.1.k") and not quick.unknown
    exact = predict(*tool, between)
    assert not exact.estimated
    for name, value in exact.cells.items():
        assert 0.3 < quick.cells[name] / value < 3
    assert predict(*tool, between, seconds=0.0).cells == exact.cells, "what is known needs no time"


def test_a_cell_that_would_end_too_late_is_not_begun():
    both = [recipe_of(scheme="custom", bits=Bits(k=bits, down_in=bits)) for bits in (4, 5)]
    tool = fresh(both[0])
    predict(*tool, both[0])
    assert set(tool[0].took) == {"k", "down_in"} and min(tool[0].took.values()) > 0
    tool[0].took["k"] = 1e6
    quick = predict(*tool, both[1], seconds=60.0)
    assert quick.estimated == ("layers.0.k", "layers.1.k"), "the others are computed"
    predict(*tool, both[1])
    assert tool[0].took["k"] < 1e6, "what a cell takes is learnt again"


def test_estimates_lie_on_the_line_between_neighbours():
    table = {(4, 1): 0.08, (4, 4): 0.02, (6, 1): 0.01}
    estimate = predict_module._neighbours
    assert estimate(table, 4, 2) == pytest.approx(0.04) and estimate(table, 4, 64) == pytest.approx(0.02)
    assert estimate(table, 3, 1) == pytest.approx(0.32) and estimate(table, 7, 3) == pytest.approx(0.0025)
    assert estimate({}, 4, 1) is None

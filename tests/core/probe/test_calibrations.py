"""Two calibrations: counts of channels by hand, clusters matched whatever their numbers, figures as each recipe alone gives."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from core import Calibration, Workbench
from core.errors import InputError
from core.methods import method
from core.probe.calibrations import compare_plans, shift
from core.probe.report import ProbeText
from core.recipe import SITES, QuantRecipe
from tests.core.probe.probe_tools import probed, recipe_of, statistics_of
from tests.core.tools import tokens

WIDTHS = np.array([[1, 1, 1, 1, 0, 2], [1, 1.2, 0.5, 1.05, 0, 2]])


def test_ranges_by_hand():
    found = shift(WIDTHS, np.zeros((2, 6), int))
    assert (found.channels, found.wider, found.narrower, found.moved, found.rand) == (6, 1, 1, 0, 1.0)
    assert found.widths.dtype == np.float32
    assert found.to_dict() == {"channels": 6, "wider": 1, "narrower": 1, "moved": 0, "rand": 1.0}


@pytest.mark.parametrize(
    ("a", "b", "moved"),
    [
        ([0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], 0),
        ([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2], 1),
        ([0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 5], 4),
    ],
)
def test_clusters_are_matched_so_that_few_channels_move(a, b, moved):
    found = shift(np.ones((2, 6)), np.array([a, b]))
    assert found.moved == moved and found.rand == pytest.approx(adjusted_rand_score(a, b))


def test_heads_are_compared_each_on_its_own():
    """Clusters of the second head have numbers of their own; that heads stay apart is no agreement of clusters."""
    a, b = [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 2, 2, 3, 3]
    found, whole = (shift(np.ones((2, 8)), np.array([a, b]), heads) for heads in (2, 1))
    assert found.moved == whole.moved == 2
    assert found.rand == pytest.approx((adjusted_rand_score(a[:4], b[:4]) + 1) / 2) and found.rand < whole.rand


@pytest.mark.parametrize("options", [{}, {"variant": "official"}, {"method": "rtn", "variant": "matched"}, {"variant": "sorted"}])
def test_clusters_and_ranges_are_those_of_the_plans(options):
    recipe, (loaded, _) = recipe_of(**options), probed("llama")
    both = tuple(statistics_of(loaded.model, recipe, windows) for windows in (tokens(8, 32), tokens(8, 32, seed=9)))
    found, planner = compare_plans(loaded.model, both, recipe), method(recipe.method)
    assert set(found) == {f"layers.{layer}.{site}" for layer in (0, 1) for site in SITES}
    for name, site in found.items():
        _, layer, kind = name.split(".")
        stats = [s.layers[planner.sink_tokens(recipe)][int(layer)] for s in both]
        assert site.widths.tolist() == [(s.ranges[kind].high - s.ranges[kind].low).tolist() for s in stats]
    moved = sum(site.moved for site in found.values())
    assert moved == 0 if options.get("method") == "rtn" else moved > 0, "groups of neighbours do not depend on a text"
    same = compare_plans(loaded.model, (both[0], both[0]), recipe)
    assert all((s.moved, s.wider, s.narrower, s.rand) == (0, 0, 0, 1.0) for s in same.values())


def test_a_workbench_gives_what_each_recipe_gives_alone(tmp_path):
    text = "text:" + "".join(f"word {i} of a pasted secret canary text, " for i in range(400))
    bench, judge = Workbench(), ProbeText("sotu", 128)
    recipe = recipe_of("quantscope-llama-6m", calibration=Calibration("sotu", 256, 64))
    other = Calibration(text, 192, 64)
    pair = bench.calibrations(recipe, other, text=judge, owner="me")
    recipes = (recipe, replace(recipe, calibration=other))
    for made, predicted, measured in zip(recipes, pair.predicted, pair.measured, strict=True):
        alone = bench.measure(made, text=judge, owner="me")
        assert (measured.kld, measured.same_top) == (alone.kld, alone.same_top)
        assert predicted.total == pytest.approx(bench.predict(made, text=judge, owner="me").total)
    assert pair.tokens == (256, 192) and pair.judged == 128 and pair.texts == ("sotu", "pasted text") and pair.judge == "sotu"
    written = json.dumps(pair.to_dict())
    assert "canary" not in written and json.loads(written)["measured"][1]["kld"] == pair.measured[1].kld
    channels = sum(site.channels for site in pair.sites.values())
    assert pair.share("wider") == pytest.approx(sum(site.wider for site in pair.sites.values()) / channels)


@pytest.mark.parametrize("method", ["rotation", "rtn", "bitnet"])
def test_a_curve_is_that_of_rptq_whatever_the_method(method):
    rptq = QuantRecipe("quantscope-llama-6m", calibration=Calibration("sotu", 256, 64))
    bench, judge = Workbench(), ProbeText("sotu", 128)
    made = bench.curve(replace(rptq, method=method), "k", 0, text=judge)
    assert made.kmeans == bench.curve(rptq, "k", 0, text=judge).kmeans and made.bits == 4


def test_bitnet_needs_no_calibration():
    with pytest.raises(InputError, match="no calibration"):
        Workbench().calibrations(QuantRecipe("quantscope-llama-6m", method="bitnet"), Calibration())

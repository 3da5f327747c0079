"""The clip search against a search written out channel by channel, with importances that change its answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from core.quant.affine import Grid
from core.quant.observer import SHRINK, RangeRules, plan_site
from core.quant.ranges import ChannelRanges

SEARCHED = RangeRules(Grid.EXACT, ema=False, clip_search=True)


def ranges_of(rows: np.ndarray) -> ChannelRanges:
    """Ranges of rows [R, C] seen as one sample."""
    x = torch.tensor(rows, dtype=torch.float32)
    return ChannelRanges(x.amin(0), x.amax(0), x.amin(0)[None], x.amax(0)[None], x)


def best_factor(rows: np.ndarray, bits: int, importance: np.ndarray) -> float:
    """The factor of SHRINK whose weighted squared error on one cluster of rows [R, C] is least; the first of equals."""
    low, high = rows.min(), rows.max()
    centre, half, steps = (low + high) / 2, (high - low) / 2, 2**bits - 1
    errors = []
    for factor in SHRINK:
        a, b = centre - factor * half, centre + factor * half
        scale = (b - a) / steps
        codes = np.clip(np.round(rows / scale), np.round(a / scale), np.round(a / scale) + steps)
        errors.append((np.square(rows - codes * scale) * importance).sum())
    return SHRINK[int(np.argmin(errors))]


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_the_search_weighs_channels_by_importance(bits):
    """A quiet channel beside one that lives at its ends: which of the two matters decides how far the range shrinks."""
    rng = np.random.default_rng(bits)
    quiet, loud = rng.normal(0, 1.0, 400), rng.choice([-4, 4], 400) * rng.uniform(0.9, 1, 400)
    rows = np.stack([quiet, loud], axis=1)
    found = {}
    for name, importance in (("quiet", (1.0, 1e-4)), ("equal", (1.0, 1.0)), ("loud", (1e-4, 1.0))):
        plan = plan_site(ranges_of(rows), torch.tensor([0, 2]), bits, SEARCHED, torch.tensor(importance))
        factor = best_factor(rows, bits, np.array(importance))
        whole = (rows.max() - rows.min()) / (2**bits - 1)
        assert float(plan.params.scale[0]) == pytest.approx(factor * whole, rel=1e-4), name
        found[name] = factor
    assert found["quiet"] < found["loud"], "the importance changes the answer, or this test sees nothing"
    unweighted = plan_site(ranges_of(rows), torch.tensor([0, 2]), bits, SEARCHED)
    assert float(unweighted.params.scale[0]) == pytest.approx(found["equal"] * whole, rel=1e-4)


def test_every_cluster_is_searched_on_its_own_channels():
    """A cluster with outliers shrinks, one whose values lie on the ends of its range does not."""
    rng = np.random.default_rng(0)
    tails, ends = rng.standard_t(2, (500, 3)), np.sign(rng.normal(0, 1, (500, 2)))
    plan = plan_site(ranges_of(np.concatenate([tails, ends], axis=1)), torch.tensor([0, 3, 5]), 3, SEARCHED)
    factors = plan.params.scale.numpy() * 7 / np.array([tails.max() - tails.min(), ends.max() - ends.min()])
    assert factors[0] == pytest.approx(best_factor(tails, 3, np.ones(3)), rel=1e-4) and factors[0] < 0.9
    assert factors[1] == pytest.approx(1.0, rel=1e-4)


def test_sixteen_bits_keep_the_clusters_for_the_weights():
    plan = plan_site(ranges_of(np.ones((4, 6))), torch.tensor([0, 2, 6]), 16, SEARCHED)
    assert plan.params is None and plan.sqnr_db is None and plan.offsets.tolist() == [0, 2, 6]
    assert not math.isnan(plan.bits)

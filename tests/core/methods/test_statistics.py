"""What methods read of a layer: importance of each channel, and the points that heads are clustered on, by loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.methods.base import LayerStatistics, channel_importance
from core.methods.rptq import method
from core.models.adapter import BlockSpec
from core.quant.ranges import ChannelRanges
from core.recipe import QuantRecipe

HEADS, KV, E = 6, 2, 4
GROUPS = HEADS // KV
SPEC = BlockSpec(24, HEADS, KV, E, 32, norm="rms", eps=1e-5, activation="silu", gated=True, rope=True, qk_norm=False)
WIDTHS = {"q": HEADS * E, "k": KV * E, "v": KV * E, "o_in": HEADS * E}


def statistics(seed: int = 0) -> LayerStatistics:
    """Random ranges and rows of the sites inside heads; every channel's range differs."""
    g = torch.Generator().manual_seed(seed)
    ranges = {}
    for site, width in WIDTHS.items():
        rows = torch.randn(7, width, generator=g) * torch.rand(width, generator=g) * 5
        low, high = rows.amin(0) - torch.rand(width, generator=g), rows.amax(0) + torch.rand(width, generator=g)
        ranges[site] = ChannelRanges(low, high, low[None], high[None], rows)
    return LayerStatistics(ranges, ranges, {}, {"o_in": torch.rand(HEADS * E, generator=g)})


def test_queries_and_keys_weigh_each_other():
    """An error in a key channel is multiplied with the queries of its group, one in a query channel with its key."""
    stats = statistics()
    found, q, k = channel_importance(stats, SPEC), stats.ranges["q"].rows, stats.ranges["k"].rows
    for head in range(HEADS):
        for e in range(E):
            key = k[:, head // GROUPS * E + e]
            assert float(found["q"][head * E + e]) == pytest.approx(float(key.square().mean()), rel=1e-5)
    for kv in range(KV):
        for e in range(E):
            queries = torch.stack([q[:, (kv * GROUPS + j) * E + e] for j in range(GROUPS)])
            assert float(found["k"][kv * E + e]) == pytest.approx(float(queries.square().mean()), rel=1e-5)
            outputs = [float(stats.importance["o_in"][(kv * GROUPS + j) * E + e]) for j in range(GROUPS)]
            assert float(found["v"][kv * E + e]) == pytest.approx(np.mean(outputs), rel=1e-5)
    assert "o_in" not in (found.keys() - stats.importance.keys()) and torch.equal(found["o_in"], stats.importance["o_in"])


def points(name: str, monkeypatch, **recipe) -> np.ndarray:
    """What `reorder_clusters` hands to the clustering of R2 or R3."""
    seen = []

    def record(values, count, **options):
        seen.append((values, count, options["block"]))
        return None

    monkeypatch.setattr(method, "cluster_channels", record)
    method.reorder_clusters(name, statistics().ranges, QuantRecipe("m", **recipe), groups=GROUPS, head_dim=E)
    (values, count, block), = seen
    assert count == 4 and block == E
    return values


def united(site: str) -> tuple[np.ndarray, np.ndarray]:
    """(highest, lowest) of each channel of a key/value head over the query heads that share it."""
    r = statistics().ranges[site]
    index = [[(kv * GROUPS + j) * E + e for j in range(GROUPS)] for kv in range(KV) for e in range(E)]
    high = [max(float(r.high[i]) for i in group) for group in index]
    return np.array(high), np.array([min(float(r.low[i]) for i in group) for group in index])


def own(site: str) -> tuple[np.ndarray, np.ndarray]:
    r = statistics().ranges[site]
    return r.high.numpy(), r.low.numpy()


@pytest.mark.parametrize(("variant", "factor"), [("default", 1.0), ("official", E**0.5)])
def test_r2_is_clustered_on_queries_and_keys(variant, factor, monkeypatch):
    """(q max, k max, q min, k min): q over its group of heads, in the published rules before it is scaled by E**-0.5."""
    (q_high, q_low), (k_high, k_low) = united("q"), own("k")
    expected = np.stack([factor * q_high, k_high, factor * q_low, k_low], axis=1)
    assert np.allclose(points("R2", monkeypatch, variant=variant), expected, rtol=1e-6)


def test_r3_is_clustered_on_values_and_their_weighted_sums(monkeypatch):
    (o_high, o_low), (v_high, v_low) = united("o_in"), own("v")
    assert np.allclose(points("R3", monkeypatch), np.stack([v_high, o_high, v_low, o_low], axis=1))
    assert np.allclose(points("R3", monkeypatch, variant="official"), np.stack([o_high, o_low], axis=1))


@pytest.mark.parametrize(("name", "site"), [("R2", "k"), ("R3", "v")])
def test_schemes_of_the_cache_alone_cluster_on_what_it_keeps(name, site, monkeypatch):
    high, low = own(site)
    assert np.allclose(points(name, monkeypatch, scheme="W4A3KV"), np.stack([high, low], axis=1))

"""Clustering for the page: the same orders as a plan's, errors that mean what the text says, and quick enough for a slider."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from core.calibration.report import RangesReport, SiteRanges
from core.errors import InputError
from core.methods import method
from core.methods.base import LayerStatistics
from core.methods.rptq import cluster, explore
from core.methods.rptq.explore import error_curve, knee, recluster
from core.methods.rptq.method import reorder_clusters
from core.methods.rptq.reorder import head_channels, query_channels
from core.quant.affine import Grid, choose_qparams
from core.quant.ranges import ChannelRanges
from core.recipe import PER_CHANNEL, REORDERS, SITES, Calibration, Clusters, QuantRecipe
from core.stages import observe
from tests.core.tools import spec_of, tiny

KINDS = {"attn_in": 64, "q": 128, "k": 32, "v": 32, "o_in": 128, "mlp_in": 64, "down_in": 96}


def report_of(widths: dict[str, int] = KINDS, block: int = 16, seed: int = 0) -> RangesReport:
    g, sites = np.random.default_rng(seed), {}
    for kind, width in widths.items():
        scale = g.lognormal(sigma=1.5, size=width).astype(np.float32)
        own = block if kind in ("q", "k", "v", "o_in") else width
        entry = SiteRanges(f"layers.0.{kind}", 0, kind, -scale * g.uniform(0.5, 1, width).astype(np.float32), scale, own)
        sites[entry.site] = entry
    return RangesReport("m", None, {}, "t", 1, 1, 0.0, "cpu", 4, sites)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("g", (1, 4, 32, PER_CHANNEL))
def test_a_view_is_consistent(kind, g):
    report = report_of()
    site, entry = f"layers.0.{kind}", report.sites[f"layers.0.{kind}"]
    view = recluster(report, site, Clusters(g, g, g, g, g), bits=4)
    width, per_block = KINDS[kind], min(g, entry.block)
    assert (
        sorted(view.order.tolist()) == list(range(width))
        and view.order.dtype == view.labels.dtype == view.offsets.dtype == np.int32
    )
    assert len(view.clusters) == len(view.offsets) - 1 == per_block * (width // entry.block)
    assert (view.order // entry.block == np.arange(width) // entry.block).all(), "channels stay in their head"
    for info, (a, b) in zip(view.clusters, itertools.pairwise(view.offsets.tolist()), strict=True):
        members = view.order[a:b]
        assert info.size == len(members) and (info.low, info.high) == (entry.low[members].min(), entry.high[members].max())
        assert set(view.labels[members].tolist()) == {info.index % per_block}, "labels start anew in every head"
        expected = choose_qparams(torch.tensor(info.low), torch.tensor(info.high), bits=4, grid=Grid.EXACT)
        assert info.scale == pytest.approx(float(expected.scale), rel=1e-6) and info.zero_point == int(expected.zero_point)
    assert (view.low == entry.low).all() and (view.high == entry.high).all() and view.seconds >= 0


@pytest.mark.parametrize("clusters", (Clusters(), Clusters(3, 2, 5, 7, 9), Clusters.uniform(PER_CHANNEL)), ids=Clusters.describe)
def test_the_page_shows_the_clusters_of_a_plan(clusters):
    """On the same ranges the method decides the same, at every site: key/value heads and their query heads share an order."""
    loaded = tiny("llama")
    report, spec = observe(loaded, Calibration("text:" + "a few words, " * 60, 256, 32)), spec_of(loaded)
    for layer in range(2):
        ranges = {}
        for kind in SITES:
            entry = report.sites[f"layers.{layer}.{kind}"]
            low, high = torch.tensor(entry.low), torch.tensor(entry.high)
            ranges[kind] = ChannelRanges(low, high, low[None], high[None], torch.stack([low, high]))
        plan = method("rptq").plan_layer(LayerStatistics(ranges, ranges), QuantRecipe("m", clusters=clusters), spec)
        r2, r3 = plan.orders["R2"], plan.orders["R3"]
        orders = {"q": query_channels(r2, 4), "k": head_channels(r2), "v": head_channels(r3), "o_in": query_channels(r3, 4)}
        orders |= {"attn_in": plan.orders["R1"], "mlp_in": plan.orders["R4"], "down_in": plan.orders["R5"]}
        for kind, order in orders.items():
            view = recluster(report, f"layers.{layer}.{kind}", clusters)
            assert view.order.tolist() == order.tolist() and view.offsets.tolist() == plan.sites[kind].offsets.tolist(), kind


@pytest.mark.parametrize("g", range(1, 65))
def test_page_and_run_take_as_many_clusters_per_head(g):
    """Tab 2 shows for every g of its slider the partition that a run with the recipe of that g makes."""
    report, clusters, spec = report_of(), Clusters.uniform(g), spec_of(tiny("llama"))
    for name, kind, own in (("R2", "k", clusters.R2), ("R3", "v", clusters.R3)):
        view = recluster(report, f"layers.0.{kind}", clusters)
        ranges = {k: explore._ranges(report.sites[f"layers.0.{k}"]) for k in REORDERS[name]}
        run = reorder_clusters(name, ranges, QuantRecipe("m", clusters=clusters), groups=4, head_dim=spec.head_dim)
        assert len(view.clusters) == 2 * min(own, 16) and view.offsets.tolist() == run.offsets.tolist()


def test_only_what_a_slider_can_wait_for_is_refined(monkeypatch):
    refined, real = [], cluster.improve
    monkeypatch.setattr(cluster, "improve", lambda points, centres: refined.append(len(centres)) or real(points, centres))
    monkeypatch.setattr(explore, "REFINED", 96 * 4)
    for count in (4, 5):
        recluster(report_of(), "layers.0.down_in", Clusters(R5=count))
    assert refined == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_falls_from_one_to_per_channel(kind):
    report = report_of()
    curve = error_curve(report, f"layers.0.{kind}", bits=4)
    block = report.sites[f"layers.0.{kind}"].block
    assert curve.g[0] == 1 and all(b == 2 * a for a, b in itertools.pairwise(curve.g)) and curve.g[-1] <= block
    assert len(curve.g) == len(curve.kmeans) == len(curve.equal) and curve.kmeans[0] == curve.equal[0] <= 1 + 1e-6
    assert (curve.kmeans[0] == pytest.approx(1)) == (block == KINDS[kind]), "one per head is not one for the tensor"
    assert all(b <= a * 1.1 for a, b in itertools.pairwise(curve.kmeans))
    assert all(e >= curve.per_channel * (1 - 1e-6) for e in (*curve.kmeans, *curve.equal))
    assert curve.knee == knee([*curve.g, block], [*curve.kmeans, curve.per_channel]) and curve.knee in curve.g
    last = recluster(report, f"layers.0.{kind}", Clusters.uniform(PER_CHANNEL))
    assert last.predicted_error == pytest.approx(curve.per_channel)


def test_kmeans_is_no_worse_than_equal_groups_where_few_channels_are_wide():
    """Groups of equal size put the outlier among its narrower neighbours; KMeans gives it a cluster of its own."""
    high = np.array([1, 1, 1, 1, 1, 1, 1, 100], np.float32)
    entry = SiteRanges("layers.0.attn_in", 0, "attn_in", np.zeros(8, np.float32), high, 8)
    curve = error_curve(RangesReport("m", None, {}, "t", 1, 1, 0.0, "cpu", 1, {entry.site: entry}), entry.site)
    assert curve.g == [1, 2, 4, 8]
    assert curve.kmeans == pytest.approx([1, *[(1 + 7e-4) / 8] * 3], rel=1e-6) and curve.knee == 2
    assert curve.equal == pytest.approx([1, (4 + 4e-4) / 8, (2 + 6e-4) / 8, (1 + 7e-4) / 8], rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "costs", "found"),
    [
        ([1, 2, 4, 8, 16], [1.0, 0.2, 0.1, 0.05, 0.0], 2),
        ([1, 2, 4, 8, 16], [1.0, 0.9, 0.2, 0.1, 0.0], 4),
        ([1, 2, 4, 8, 16], [1.0, 0.75, 0.5, 0.25, 0.0], None),
        ([1, 2, 4], [1.0, 0.9, 0.0], None),
        ([1, 2, 4], [0.0, 0.0, 0.0], None),
        ([1, 2, 4], [0.1, 0.0, 0.2], None),
        ([1, 1], [1.0, 0.5], None),
    ],
)
def test_the_knee_is_farthest_below_the_line_between_the_ends(counts, costs, found):
    assert knee(counts, costs) == found


def test_predicted_error_by_hand():
    """Two channels of width 1 and 3 in a tensor of width 3: ((1/3)² + 1) / 2."""
    entry = SiteRanges("layers.0.attn_in", 0, "attn_in", np.array([0, -1], np.float32), np.array([1, 2], np.float32), 2)
    report = RangesReport("m", None, {}, "t", 1, 1, 0.0, "cpu", 1, {entry.site: entry})
    assert recluster(report, entry.site, Clusters()).predicted_error == pytest.approx((1 / 9 + 1) / 2)
    assert recluster(report, entry.site, Clusters(R1=1)).predicted_error == pytest.approx(1)


@pytest.mark.parametrize("value", (0.0, 2.5), ids=("dead", "constant"))
def test_sites_without_any_spread(value):
    flat = np.full(8, value, np.float32)
    entry = SiteRanges("layers.0.attn_in", 0, "attn_in", flat, flat, 8)
    report = RangesReport("m", None, {}, "t", 1, 1, 0.0, "cpu", 1, {entry.site: entry})
    assert recluster(report, entry.site, Clusters()).predicted_error == 1.0 and error_curve(report, entry.site).per_channel == 1.0


@pytest.mark.parametrize("call", (lambda r, s: recluster(r, s, Clusters()), error_curve), ids=("recluster", "curve"))
def test_unknown_sites_are_refused(call):
    with pytest.raises(InputError, match=r"layers\.0\.attn_in") as caught:
        call(report_of(), "layers.7.attn_in")
    assert caught.value.code == "E-PARAM-SITE"


@pytest.mark.parametrize(("count", "most"), [(32, 1 + cluster.MOVES), (64, 0)])
def test_a_wide_site_is_clustered_once_and_improved_a_few_times(count, most, monkeypatch):
    """A slider drags: one run of KMeans from one start, then at most so many moves, none beyond `REFINED`."""
    starts, passes, lloyd = [], [], cluster._lloyd

    class Counted(cluster.KMeans):
        def fit(self, *arguments):
            starts.append(self.n_init)
            return super().fit(*arguments)

    monkeypatch.setattr(cluster, "KMeans", Counted)
    monkeypatch.setattr(cluster, "_lloyd", lambda *arguments: passes.append(1) or lloyd(*arguments))
    recluster(report_of({"attn_in": 4096}), "layers.0.attn_in", Clusters.uniform(count))
    assert starts == [1] and (0 < len(passes) <= most or most == len(passes) == 0)

"""Oracles 2, 5 and 8 on clustering: a valid permutation whatever the points, and the same partition in whatever order."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from core.methods.rptq.cluster import ChannelClusters, cluster_channels, equal_labels, kmeans_batch, kmeans_labels
from core.quant.affine import Grid, QParams, choose_qparams
from kernels import code_limits, fake_quantize


def skewed(width: int = 256, seed: int = 0) -> np.ndarray:
    """(max, min) of channels whose scales are log-normal, six of them outliers, as in trained models."""
    g = np.random.default_rng(seed)
    scale = g.lognormal(size=width)
    scale[g.permutation(width)[:6]] *= 40
    return np.stack([scale * g.uniform(0.8, 1.2, width), -scale * g.uniform(0.8, 1.2, width)], axis=1)


def separated(width: int = 60, clusters: int = 5, seed: int = 0) -> np.ndarray:
    g = np.random.default_rng(seed)
    centre = np.arange(clusters)[g.integers(0, clusters, width)]
    centre[:clusters] = np.arange(clusters)
    return np.stack([10.0 * centre + 5 + g.uniform(-0.1, 0.1, width), -10.0 * centre + g.uniform(-0.1, 0.1, width)], axis=1)


def check(found: ChannelClusters, width: int, block: int | None = None) -> None:
    """Oracle 2."""
    block = block or width
    order, offsets, labels = found.order, found.offsets, found.labels
    assert order.dtype == offsets.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(width))
    assert offsets[0] == 0 and offsets[-1] == width and int(found.counts.min()) >= 1 and int(found.counts.sum()) == width
    assert torch.equal(order // block, torch.arange(width) // block), "a channel never leaves its block"
    assert (labels[order].diff() >= 0).all() and torch.equal(labels[order].bincount(), found.counts)
    for start, stop in itertools.pairwise(offsets.tolist()):
        run = order[start:stop]
        assert (run.diff() > 0).all(), "channels keep their order inside a cluster"
        assert len(set((run // block).tolist())) == 1, "a cluster never crosses a block"


@pytest.mark.parametrize("count", (1, 2, 4, 32, 256, 65536))
@pytest.mark.parametrize("block", (None, 64, 1))
def test_order_and_offsets_are_valid(count, block):
    found = cluster_channels(skewed(), count, block=block, n_init=1)
    check(found, 256, block)
    per_block = found.counts.new_tensor(np.bincount((found.order[found.offsets[:-1]] // (block or 256)).numpy()))
    assert (per_block == min(count, block or 256)).all()


@pytest.mark.parametrize("count", (1, 2, 5, 32, 256, 65536))
@pytest.mark.parametrize("block", (None, 64, 1))
def test_equal_groups_are_valid_equal_and_sorted_by_width(count, block):
    points = skewed()
    found = cluster_channels(points, count, block=block, equal=True)
    check(found, 256, block)
    groups = min(count, block or 256)
    for own in found.counts.view(-1, groups):
        assert int(own.max() - own.min()) <= 1
    width = torch.from_numpy(points[:, 0] - points[:, 1])[found.order]
    ends = [(float(part.min()), float(part.max())) for part in width.split(found.counts.tolist())]
    for at, ((_, high), (low, _)) in enumerate(itertools.pairwise(ends), start=1):
        assert high <= low or at % groups == 0, "a group is no narrower than the one before it in its block"


def test_equal_groups_by_hand():
    """Two tensors share an order: widths 2 + 1, 1 + 1, 5 + 1, 1 + 8, and a channel without any."""
    points = np.array([[1, 1, -1, 0], [1, 1, 0, 0], [5, 1, 0, 0], [1, 4, 0, -4], [0, 0, 0, 0]], dtype=float)
    assert equal_labels(points, 2).tolist() == [0, 0, 1, 1, 0]
    assert equal_labels(points, 9).tolist() == [2, 1, 3, 4, 0]


@settings(max_examples=60, deadline=None)
@given(
    points=st.integers(1, 24).flatmap(lambda n: arrays(np.float32, (n, 2), elements=st.floats(-1e6, 1e6, width=32))),
    count=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_any_points_give_a_valid_order(points, count, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn on points equal to its precision
        check(cluster_channels(points, count, n_init=1, seed=seed), len(points))


@pytest.mark.parametrize(
    "case", ("all equal", "all zero", "dead channels", "two values", "duplicates", "one channel", "denormal")
)
@pytest.mark.parametrize("count", (1, 3, 50))
def test_fewer_distinct_points_than_clusters(case, count):
    points = skewed(40)
    if case == "all equal":
        points[:] = points[0]
    elif case == "all zero":
        points[:] = 0
    elif case == "dead channels":
        points[5:] = 0
    elif case == "two values":
        points = points[:2].repeat(20, axis=0)
    elif case == "duplicates":
        points = np.concatenate([points[:20], points[:20]])
    elif case == "one channel":
        points = points[:1]
    else:
        points *= 1e-300
    found = cluster_channels(points, count, n_init=2)
    check(found, len(points))
    distinct = len(np.unique(points, axis=0))
    assert len(found.counts) <= min(count, distinct)
    if case != "denormal":
        assert len(found.counts) == min(count, distinct)
    if count >= distinct:  # equal points share a cluster, unequal ones do not
        groups = {tuple(p): set() for p in points.tolist()}
        for p, label in zip(points.tolist(), found.labels.tolist(), strict=True):
            groups[tuple(p)].add(label)
        assert all(len(g) == 1 for g in groups.values())


def test_more_clusters_than_a_head_is_wide():
    found = cluster_channels(skewed(24), 32, block=8, n_init=1)
    check(found, 24, 8)
    assert len(found.counts) == 24


@pytest.mark.parametrize("block", (None, 32))
def test_clusters_are_ranked_by_width(block):
    points = skewed(128)
    found = cluster_channels(points, 6, block=block, n_init=1)
    width = torch.from_numpy(points[:, 0] - points[:, 1])
    mean = torch.stack([width[found.order[a:b]].mean() for a, b in itertools.pairwise(found.offsets.tolist())])
    owner = found.order[found.offsets[:-1]] // (block or 128)
    for head in owner.unique():
        assert (mean[owner == head].diff() >= 0).all(), "narrow first, in every block"


def partition(found: ChannelClusters) -> set[frozenset[int]]:
    return {frozenset(found.order[a:b].tolist()) for a, b in itertools.pairwise(found.offsets.tolist())}


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_channels_give_the_same_partition(seed):
    points = separated(seed=seed)
    shuffle = np.random.default_rng(seed + 10).permutation(60)
    one = partition(cluster_channels(points, 5))
    other = {frozenset(shuffle[i] for i in cluster) for cluster in partition(cluster_channels(points[shuffle], 5))}
    assert one == other and len(one) == 5
    expected = {frozenset(np.flatnonzero(np.round(-points[:, 1] / 10) == c).tolist()) for c in range(5)}
    assert one == expected, "and it is the obvious one"


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_clusters_does_not_depend_on_kmeans_labels(seed):
    points = separated(seed=1)
    runs = [cluster_channels(points, 5, seed=s) for s in (seed, seed + 50)]
    assert torch.equal(runs[0].order, runs[1].order) and torch.equal(runs[0].offsets, runs[1].offsets)


def test_clusters_of_equal_width_are_ordered_by_place():
    """[-3, -1] and [1, 3] are equally wide: their order must not fall to KMeans' arbitrary labels."""
    points = np.array([[-1.0, -3.0]] * 6 + [[3.0, 1.0]] * 6 + [[9.0, 7.0]] * 6)[np.random.default_rng(0).permutation(18)]
    points[3] += 0.25  # no longer one point per cluster, so that KMeans decides
    for seed in range(8):
        found = cluster_channels(points, 3, seed=seed)
        assert (points[found.order.numpy()].mean(1).round() == [-2] * 6 + [2] * 6 + [8] * 6).all()


def test_the_same_call_gives_the_same_answer():
    one, other = (cluster_channels(skewed(), 16, n_init=2) for _ in range(2))
    assert torch.equal(one.order, other.order) and torch.equal(one.offsets, other.offsets)


def inertia(points: np.ndarray, found: ChannelClusters) -> float:
    return sum(
        float(((c := points[found.order[a:b].numpy()]) - c.mean(0)).__pow__(2).sum())
        for a, b in itertools.pairwise(found.offsets.tolist())
    )


def test_inertia_falls_with_the_number_of_clusters():
    points = skewed()
    values = [inertia(points, cluster_channels(points, g, n_init=10)) for g in (1, 2, 4, 8, 16, 32, 64, 256)]
    assert all(b <= a * 1.001 for a, b in itertools.pairwise(values)) and values[-1] == 0
    assert values[0] == pytest.approx(float(((points - points.mean(0)) ** 2).sum()))


def parameters(low: torch.Tensor, high: torch.Tensor, found: ChannelClusters, bits: int, grid: Grid) -> QParams:
    """Scale and zero point of every channel, in the original order."""
    runs = [found.order[a:b] for a, b in itertools.pairwise(found.offsets.tolist())]
    bounds = torch.stack([low[r].min() for r in runs]), torch.stack([high[r].max() for r in runs])
    per_cluster = choose_qparams(*bounds, bits=bits, grid=grid)
    return QParams(per_cluster.scale[found.labels], per_cluster.zero_point[found.labels])


def test_of_several_restarts_the_best_is_kept():
    """Ten heaps that nearly touch, and ten clusters: one start often puts two centres into one heap, the best of eight seldom."""
    g = np.random.default_rng(0)
    points = 10 * g.integers(0, 10, (40, 60, 1)) + g.normal(0, 1, (40, 60, 2))

    def inertia(restarts: int) -> float:
        labels, total = kmeans_batch(points, 10, seed=3, restarts=restarts), 0.0
        for own, found in zip(points, labels, strict=True):
            total += sum(np.square(own[found == k] - own[found == k].mean(0)).sum() for k in set(found.tolist()))
        return total

    assert inertia(8) < 0.5 * inertia(1)


@pytest.mark.parametrize("grid", list(Grid), ids=str)
def test_splitting_a_cluster_never_makes_a_scale_larger(grid):
    """Oracle 5, the provable part: partitions nested in each other."""
    points = torch.from_numpy(skewed(64)).float()
    high, low = points[:, 0], points[:, 1]
    found = cluster_channels(points.numpy(), 4, n_init=2)
    for _ in range(12):
        largest = int(found.counts.argmax())
        a, b = found.offsets[largest : largest + 2].tolist()
        finer = ChannelClusters(found.order, torch.cat([found.offsets, torch.tensor([(a + b) // 2])]).sort().values)
        fine, coarse = (parameters(low, high, c, 4, grid).scale for c in (finer, found))
        assert (fine <= coarse * (1 + 1e-6)).all()
        found = finer


@pytest.mark.parametrize("grid", list(Grid), ids=str)
@pytest.mark.parametrize("bits", (3, 4, 8))
def test_error_falls_from_one_cluster_to_one_per_channel(grid, bits):
    """The endpoints strictly; in between KMeans partitions are not nested, so with slack."""
    points = skewed()
    g = torch.Generator().manual_seed(0)
    scale = torch.from_numpy(points[:, 0]).float() / 3
    x = torch.randn(512, 256, generator=g) * scale
    low, high = x.amin(0), x.amax(0)
    qmin, qmax = code_limits(bits)
    mse = []
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        found = cluster_channels(torch.stack([high, low], 1).numpy(), count, n_init=2)
        p = parameters(low, high, found, bits, grid)
        mse.append(float((fake_quantize(x, p.scale, qmin - p.zero_point, qmax - p.zero_point) - x).square().mean()))
    assert mse[0] > 4 * mse[5] and mse[5] > mse[-1]
    assert all(b <= a * 1.1 for a, b in itertools.pairwise(mse))


def test_identity_is_one_cluster_in_the_original_order():
    check(ChannelClusters.identity(7), 7)
    assert ChannelClusters.identity(7).order.tolist() == list(range(7)) and ChannelClusters.identity(7).counts.tolist() == [7]


def test_labels_of_a_known_example():
    labels = kmeans_labels(np.array([[5.0, -5], [0.1, -0.1], [5.1, -5], [0.1, 0], [50, -40]]), 3, n_init=3, seed=0)
    assert labels.tolist() == [1, 0, 1, 0, 2]
    found = cluster_channels(np.array([[5.0, -5], [0.1, -0.1], [5.1, -5], [0.1, 0], [50, -40]]), 3)
    assert (
        found.order.tolist() == [1, 3, 0, 2, 4]
        and found.offsets.tolist() == [0, 2, 4, 5]
        and found.labels.tolist() == [1, 0, 1, 0, 2]
    )


def test_four_dimensional_points_of_r2():
    """(q max, k max, q min, k min): a channel that is wide in k alone still gets its own cluster."""
    points = np.tile([1.0, 1.0, -1.0, -1.0], (16, 1)) + np.linspace(0, 0.01, 16)[:, None]
    points[4, 1], points[4, 3] = 30, -30
    found = cluster_channels(points, 2, block=16)
    assert found.counts.tolist() == [15, 1] and found.order[-1] == 4


def test_points_are_not_changed():
    points = skewed(32).astype(np.float32)
    kept = points.copy()
    cluster_channels(points, 4, block=8, n_init=1)
    assert np.array_equal(points, kept)

"""Ranges: the published moving average by hand, and observation against hooks on the transformers model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from core.calibration.channel import channel_detail
from core.calibration.observe import BATCH_TOKENS, SAMPLED_ROWS, Recorder, batches, observe_layers
from core.calibration.report import RangesReport, SiteRanges
from core.errors import InputError, NumericError
from core.quant.ranges import ChannelRanges, cluster_bounds, ema_bounds
from core.recipe import SITES
from tests.core.tools import ARCHITECTURES, block_inputs, float_blocks, spec_of, tiny, tokens, watched


def ranges_of(sample_low: torch.Tensor, sample_high: torch.Tensor) -> ChannelRanges:
    return ChannelRanges(sample_low.amin(0), sample_high.amax(0), sample_low, sample_high, torch.zeros(1, sample_low.shape[1]))


def test_moving_average_of_three_samples_by_hand():
    """Two channels in one cluster, one alone. M = 0.99 M + 0.01 max, on the cluster's own maximum of each sample."""
    low = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -1.0, -4.0], [-2.0, -6.0, 1.0]])
    high = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 8.0], [9.0, 2.0, 3.0]])
    found = ema_bounds(ranges_of(low, high), torch.tensor([0, 2, 3]))
    # cluster minima per sample: -2, -3, -6 and 0, -4, 1; maxima: 5, 4, 9 and 2, 8, 3
    assert found[0].tolist() == pytest.approx([0.99 * (0.99 * -2 + 0.01 * -3) + 0.01 * -6, 0.99 * (0.01 * -4) + 0.01 * 1])
    assert found[1].tolist() == pytest.approx([0.99 * (0.99 * 5 + 0.01 * 4) + 0.01 * 9, 0.99 * (0.99 * 2 + 0.01 * 8) + 0.01 * 3])
    exact = cluster_bounds(ranges_of(low, high), torch.tensor([0, 2, 3]))
    assert exact[0].tolist() == [-6, -4] and exact[1].tolist() == [9, 8]


def test_cluster_average_is_not_the_average_of_channels():
    """The published code broadcasts the cluster's bound after every step: averaging channels first gives less."""
    high = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = ema_bounds(ranges_of(-high, high), torch.tensor([0, 2]))
    assert float(found[1]) == 1.0 and float(found[0]) == -1.0


def test_identical_samples_are_their_own_average():
    low, high = -torch.rand(1, 7).expand(128, 7), torch.rand(1, 7).expand(128, 7)
    found = ema_bounds(ranges_of(low, high), torch.tensor([0, 3, 7]))
    exact = cluster_bounds(ranges_of(low, high), torch.tensor([0, 3, 7]))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("position", (0, 1, 64, 127))
def test_weights_of_128_samples(position):
    """0.99^127 for the first sample, 0.01 · 0.99^(127 - t) for sample t: the response to a single one."""
    high = torch.zeros(128, 1)
    high[position] = 1
    expected = 0.99**127 if position == 0 else 0.01 * 0.99 ** (127 - position)
    assert float(ema_bounds(ranges_of(-high, high), torch.tensor([0, 1]))[1]) == pytest.approx(expected, rel=1e-4)


def test_one_sample():
    found = ema_bounds(ranges_of(torch.tensor([[-1.0]]), torch.tensor([[2.0]])), torch.tensor([0, 1]))
    assert [float(x) for x in found] == [-1, 2]


def test_permuting_permutes_everything():
    g = torch.Generator().manual_seed(0)
    r = ChannelRanges(*(torch.randn(s, generator=g) for s in ((5,), (5,), (3, 5), (3, 5), (9, 5))))
    order = torch.tensor([3, 1, 0, 4, 2])
    p = r.permuted(order)
    assert all(
        torch.equal(getattr(p, n), getattr(r, n)[..., order]) for n in ("low", "high", "sample_low", "sample_high", "rows")
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_observed_ranges_are_exact(architecture):
    loaded, windows = tiny(architecture), tokens(70, 32, seed=2)  # two batches
    assert len(batches(windows)) == 2
    inputs = block_inputs(loaded.model, windows)
    hidden, spec = inputs.hidden, spec_of(loaded)
    for index, found in enumerate(observe_layers(loaded.model, windows)):
        seen: dict[str, torch.Tensor] = {}
        block = float_blocks(loaded)[index]
        hidden = watched(block, hidden, inputs.rotary, lambda s, x, seen=seen: seen.update({s: x.clone()}))
        assert tuple(found) == SITES
        for site, ranges in found.items():
            x = seen[site]
            assert ranges.low.shape == (spec.width(site),) and ranges.sample_low.shape == (70, spec.width(site))
            for part, expected in (
                (ranges.low, x.amin((0, 1))),
                (ranges.high, x.amax((0, 1))),
                (ranges.sample_low, x.amin(1)),
                (ranges.sample_high, x.amax(1)),
            ):
                assert torch.allclose(part, expected, rtol=1e-4, atol=1e-4)
            assert SAMPLED_ROWS <= len(ranges.rows) <= SAMPLED_ROWS + 70
            assert (ranges.rows >= ranges.low - 1e-6).all() and (ranges.rows <= ranges.high + 1e-6).all()


def test_observing_leaves_no_hook_and_no_change():
    loaded = tiny("llama")
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    list(observe_layers(loaded.model, tokens(2, 16)))
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


@pytest.mark.parametrize("skip", (0, 1, 3))
def test_a_recorder_skips_sinks_in_ranges_but_not_in_hessians(skip):
    x = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100
    recorder = Recorder(0, 4, hessians_wanted=True, skip_first=skip)
    for site in SITES:
        recorder(site, x[:3])
        recorder(site, x[3:])
    found = recorder.ranges()["attn_in"]
    assert torch.equal(found.high, x[:, skip:].amax((0, 1))) and torch.equal(found.sample_high, x[:, skip:].amax(1))
    assert set(recorder.hessians) == {"attn_in", "o_in", "mlp_in", "down_in"}
    rows = x.flatten(0, 1)
    assert torch.allclose(recorder.hessians["attn_in"], rows.t() @ rows, rtol=1e-4)


def test_sampled_rows_are_real_tokens_the_same_for_every_site():
    x = torch.arange(4 * 9).view(4, 9, 1).float().expand(4, 9, 3)
    recorder = Recorder(0, 4, hessians_wanted=False, seed=5)
    for site in SITES:
        recorder(site, x)
    rows = [r.rows for r in recorder.ranges().values()]
    assert all(torch.equal(r, rows[0]) for r in rows) and len(rows[0]) == SAMPLED_ROWS
    assert len(rows[0][:, 0].unique()) > 30


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_what_is_not_finite_names_its_site(bad):
    x = torch.zeros(2, 4, 3)
    x[1, 2, 0] = bad
    with pytest.raises(NumericError, match=r"layers\.7\.down_in has 1 ") as caught:
        Recorder(7, 2, hessians_wanted=False)("down_in", x)
    assert caught.value.code == "E-NUM-NAN"


def test_batches_cover_every_window_once():
    windows = tokens(7, BATCH_TOKENS // 3)
    parts = batches(windows)
    assert torch.equal(torch.cat(parts), windows) and all(p.numel() <= BATCH_TOKENS for p in parts)
    assert len(batches(tokens(2, 5000))) == 2, "a window longer than a batch is a batch"


def test_report_finds_the_planted_outlier():
    low, high = np.full(20, -1, np.float32), np.full(20, 1, np.float32)
    high[13] = 99
    entry = SiteRanges("layers.0.attn_in", 0, "attn_in", low, high, 20)
    other = SiteRanges("layers.1.attn_in", 1, "attn_in", low, -low, 20)
    report = RangesReport("m", None, {}, "t", 1, 1, 0.0, "cpu", 1, {e.site: e for e in (entry, other)})
    first = report.outliers(3)[0]
    assert (first.site, first.channel, first.ratio) == ("layers.0.attn_in", 13, pytest.approx(50)) and report.layers == 2
    assert len(report.outliers(3)) == 3 and report.outliers(0) == []
    heat = report.heatmap("attn_in")
    assert heat.shape == (2, 20) and heat[0, 13] == pytest.approx(math.log10(99)) and heat[1].max() == 0
    assert report.to_dict()["sites"]["layers.0.attn_in"]["max"][13] == 99


@pytest.mark.parametrize(
    "site, channel", [("layers.0.attn_in", 5), ("layers.1.down_in", 95), ("layers.1.k", 0), ("layers.1.q", 127)]
)
def test_channel_detail_agrees_with_the_ranges(site, channel):
    loaded, windows = tiny("llama"), tokens(3, 20, seed=4)
    layer, kind = int(site.split(".")[1]), site.split(".")[2]
    ranges = list(observe_layers(loaded.model, windows))[layer][kind]
    found = channel_detail(loaded, windows, site, channel)
    assert found.low == pytest.approx(float(ranges.low[channel]), rel=1e-4) and found.high == pytest.approx(
        float(ranges.high[channel]), rel=1e-4
    )
    assert sum(found.counts) == 60 and len(found.edges) == len(found.counts) + 1
    assert found.edges[0] == pytest.approx(found.low, rel=1e-4) and found.edges[-1] == pytest.approx(found.high, rel=1e-4)
    values = [e.value for e in found.extremes]
    assert len(values) == 10 and values[0] == found.low and found.high in values[5:]
    for extreme in found.extremes:
        assert len(extreme.token_text) >= 1 and 0 <= extreme.position < 20


def test_a_constant_channel_has_a_histogram():
    loaded = tiny("llama")
    found = channel_detail(loaded, torch.full((2, 10), 65), "layers.0.attn_in", 3)
    assert sum(found.counts) == 20 and found.low == found.high and found.std == pytest.approx(0, abs=1e-6)
    assert found.mean_size == pytest.approx(abs(found.mean), rel=1e-6) and found.mean_size > 0


@pytest.mark.parametrize(
    "site, channel",
    [
        ("layers.2.attn_in", 0),
        ("layers.0.nothing", 0),
        ("attn_in", 0),
        ("layers.0.attn_in", 64),
        ("layers.0.k", 32),
        ("layers.0.attn_in", -1),
        ("layers.0.attn_in", True),
        ("layers.0.attn_in", 1.0),
        ("layers.-1.k", 0),
        ("", 0),
    ],
)
def test_sites_and_channels_that_do_not_exist_are_refused(site, channel):
    with pytest.raises(InputError) as caught:
        channel_detail(tiny("llama"), tokens(1, 10), site, channel)
    assert caught.value.code in ("E-PARAM-SITE", "E-PARAM-CHANNEL") and len(str(caught.value)) < 240

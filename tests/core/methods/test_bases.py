"""Ranges in other bases are those of the method's folded block; what a rotation keeps and what it changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from core.calibration.channel import channel_detail
from core.calibration.observe import Recorder
from core.calibration.report import RangesReport, SiteRanges, TokenPeaks
from core.errors import ModelError, NumericError
from core.methods import method
from core.methods.rotation.bases import basis_change, observe_bases, token_peaks
from core.methods.rotation.method import PER_HEAD, change_bases, with_quantizers
from core.methods.rptq.explore import grid_noise, recluster
from core.methods.sequential import layer_statistics, watch_layer
from core.models.tiny import tiny_model
from core.options import BASES, MASSIVE
from core.recipe import SITES, Calibration, Clusters, QuantRecipe
from core.stages import observe, observe_in_bases
from kernels import hadamard
from tests.core.methods.rotation_tools import W4A4
from tests.core.tools import ARCHITECTURES, block_inputs, quantised, relative, spec_of, tiny, tokens

WINDOWS = tokens(4, 32, seed=3)
TEXT = Calibration("text:" + "The state of the union is strong. " * 60, tokens=256, window=32)


def folded_values(loaded, name):
    """What the sites of the first layer hold in the method's own float block, its online rotations run by hand: [B, T, C]."""
    block, item = loaded.model.blocks[0], block_inputs(loaded.model, WINDOWS)
    recorder = Recorder(0, len(WINDOWS), hessians_wanted=False, skip_first=1)
    watch_layer(block, [item.hidden], [item], [recorder])
    recipe = QuantRecipe("tiny", method="rotation", scheme="custom", bits=W4A4, rotation=BASES[name])
    plan = method("rotation").plan_layer(layer_statistics(block, recorder, recorder), recipe, block.spec)
    off = {site: replace(own, bits=16, params=None) for site, own in plan.sites.items()}
    plan = replace(plan, sites=off, softmax_bits=16, sink_tokens=0)
    seen = {}
    watch_layer(with_quantizers(change_bases(block, plan), plan), [item.hidden], [item], [lambda s, x: seen.update({s: x})])
    online = {site: own.basis.block for site, own in off.items() if not own.folded and own.basis.block is not None}
    return {site: hadamard(x, online[site]) if site in online else x for site, x in seen.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["scaled", "rotated"])
def test_ranges_are_those_of_the_folded_block(architecture, name):
    loaded = tiny(architecture)
    found, expected = next(observe_bases(loaded.model, WINDOWS))[name], folded_values(loaded, name)
    ranges = found.recorder.ranges()
    for site in SITES:
        x = expected[site]
        close = {"rtol": 1e-4, "atol": 1e-5 * float(x.abs().max())}
        torch.testing.assert_close(ranges[site].low, x.amin((0, 1)), **close)
        torch.testing.assert_close(ranges[site].high, x.amax((0, 1)), **close)
        assert relative(torch.cat(found.peaks[site]), x.abs().amax(-1)) < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_rotation_keeps_the_power_of_every_token_and_scales_do_not(architecture):
    loaded = tiny(architecture)
    for layer in observe_bases(loaded.model, WINDOWS):
        for site in SITES:
            scaled, rotated, plain = (torch.cat(layer[n].powers[site]) for n in ("scaled", "rotated", "original"))
            if site != "k":  # loses its mean too
                assert relative(rotated, scaled) < 1e-5
            assert relative(scaled, plain) > 1e-3
            low = layer["original"].recorder.ranges()[site].low
            assert torch.equal(layer["original"].bases[site].to(low), low)


def test_an_outlier_channel_goes():
    loaded = tiny_model("llama", layers=1)
    loaded.model.blocks[0].norm1.weight.data[5] *= 300
    reports = observe_in_bases(loaded, TEXT)
    original, scaled, rotated = (reports[name].sites["layers.0.attn_in"].outlier_ratio for name in BASES)
    assert original > 10 * scaled > 10 * rotated
    noise = {name: grid_noise(r, recluster(r, "layers.0.attn_in", Clusters.uniform(4))) for name, r in reports.items()}
    assert noise["original"].tensor > 30 * noise["rotated"].tensor
    assert all(found.tensor >= found.clusters >= found.channels > 0 for found in noise.values())


def test_noise_is_a_twelfth_of_a_squared_step_over_the_power_of_a_token():
    low, high = np.array([-1, -2], np.float32), np.array([2, 13], np.float32)
    sites = {f"layers.0.{kind}": SiteRanges(f"layers.0.{kind}", 0, kind, low, high, 2) for kind in SITES}
    peaks = {name: TokenPeaks(8, 1.0, 0.5, 0, []) for name in sites}
    report = RangesReport("m", None, {}, "t", 8, 8, 0.0, "cpu", 1, sites, peaks=peaks)
    found = grid_noise(report, recluster(report, "layers.0.down_in", Clusters.uniform(2), bits=4))
    assert found.tensor == pytest.approx(1 / 12 / 0.5) and found.clusters == found.channels
    assert found.channels == pytest.approx((1 + (3 / 15) ** 2) / 2 / 12 / 0.5)


def test_massive_tokens_are_named_with_their_place():
    loaded = tiny("llama")
    seen = next(observe_bases(loaded.model, WINDOWS))["rotated"]
    seen.peaks["down_in"] = [torch.ones(4, 32)]
    seen.peaks["down_in"][0][2, 9], seen.peaks["down_in"][0][0, 4] = 500, 2 * MASSIVE
    found = token_peaks(loaded, WINDOWS, seen, "down_in")
    assert (found.tokens, found.median, found.massive) == (128, 1, 2)
    first, second = found.largest[:2]
    assert (first.value, first.position, found.ratio(first)) == (500, 9, 500) and second.position == 4
    assert first.token_text == loaded.tokenizer.decode(WINDOWS[2, 9:10].tolist())


def test_reports_of_all_bases_agree_with_the_first_observation():
    loaded = tiny("llama")
    reports, plain = observe_in_bases(loaded, TEXT), observe(loaded, TEXT)
    assert list(reports) == list(BASES) and all(report.basis == name for name, report in reports.items())
    for name, site in plain.sites.items():
        same = reports["original"].sites[name]
        assert np.array_equal(same.low, site.low) and np.array_equal(same.high, site.high) and same.block == site.block
        assert np.array_equal(same.ema_high, site.ema_high)
        for report in reports.values():
            entry, peaks = report.sites[name], report.peaks[name]
            largest = max(-float(entry.low.min()), float(entry.high.max()))
            assert peaks.largest[0].value == pytest.approx(largest) and peaks.tokens == plain.tokens
    tops = reports["rotated"].massive_tokens(3)
    assert len(tops) == 3 and tops[0][2] == max(p.ratio(p.largest[0]) for p in reports["rotated"].peaks.values())
    told = reports["rotated"].to_dict()
    assert told["basis"] == "rotated" and told["tokens_at"]["layers.0.k"]["tokens"] == plain.tokens


@pytest.mark.parametrize("site", ["layers.1.attn_in", "layers.1.k"])
def test_a_channel_is_read_in_its_basis(site):
    loaded = tiny("llama")
    report = list(observe_bases(loaded.model, WINDOWS))[1]["rotated"].recorder.ranges()[site.removeprefix("layers.1.")]
    detail = channel_detail(loaded, WINDOWS, site, 3, change=basis_change("rotated"))
    assert (detail.low, detail.high) == pytest.approx((float(report.low[3]), float(report.high[3])), rel=1e-5)
    plain = channel_detail(loaded, WINDOWS, site, 3)
    assert detail.high != pytest.approx(plain.high, rel=1e-2) and basis_change("original") is None


def test_values_of_heads_are_mixed_inside_heads():
    spec = spec_of(tiny("llama"))
    for site, own in next(observe_bases(tiny("llama").model, WINDOWS))["rotated"].bases.items():
        heads = site in PER_HEAD or site == "o_in"
        assert own.block == (spec.head_dim if heads else 0), site


def test_what_is_not_finite_is_named():
    loaded = tiny_model("llama", layers=1)
    loaded.model.blocks[0].norm2.weight.data[0] = torch.inf
    with pytest.raises(NumericError, match=r"layers\.0\.mlp_in"):
        list(observe_bases(loaded.model, WINDOWS))


def test_a_quantised_model_is_refused():
    with pytest.raises(ModelError, match="inspect the float model"):
        observe_in_bases(quantised("llama").loaded, TEXT)

"""RPTQ end to end on tiny models: every scheme and variant runs, what is better, and what a pass may not do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from core.calibration.observe import Recorder
from core.errors import Cancelled, NumericError
from core.methods import method
from core.methods.apply import build_block
from core.methods.base import LayerStatistics
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.linear.quant import QuantLinear
from core.recipe import INPUT_SITE, SCHEMES, SITES, Bits
from tests.core.methods.rptq_tools import made, observed, ranges_of
from tests.core.tools import ARCHITECTURES, float_blocks, quantised, relative, spec_of, tiny, tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_runs(architecture, scheme):
    q = made(architecture, scheme=scheme)
    ids = tokens(2, 24, seed=1)
    logits, expected = q.model(ids).logits, q.base.model(ids).logits
    assert torch.isfinite(logits).all() and 0.005 < relative(logits, expected) < 1.2
    assert len(q.outcomes) == 2
    for outcome in q.outcomes:
        assert math.isfinite(outcome.output_sqnr_db)
        assert {n: (w.method, w.fallback) for n, w in outcome.weights.items()} == dict.fromkeys(INPUT_SITE, ("gptq", None))
        assert all(w.sqnr_db > 5 and w.effective_bits > w.bits for w in outcome.weights.values())
        assert all((s.sqnr_db is None) == (s.bits == 16) for s in outcome.plan.sites.values())


@pytest.mark.parametrize("architecture", ("llama", "qwen3", "opt"))
@pytest.mark.parametrize("variant", ("official", "strict"))
def test_every_variant_runs(architecture, variant):
    q = made(architecture, variant=variant)
    logits = q.model(tokens(2, 24, seed=1)).logits
    assert torch.isfinite(logits).all() and relative(logits, q.base.model(tokens(2, 24, seed=1)).logits) < 1.2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rptq_is_closer_than_round_to_nearest(architecture):
    """On outlier channels twenty times the rest, clusters must pay."""
    ids = tokens(4, 24, seed=1)
    expected = tiny(architecture).model(ids).logits
    rptq, rtn = (relative(made(architecture, **r).model(ids).logits, expected) for r in ({}, {"method": "rtn", "weights": "rtn"}))
    assert rptq < 0.85 * rtn


def test_more_bits_are_closer():
    """On the mean over architectures: single tiny models are noisy."""
    ids = tokens(4, 24, seed=1)
    errors = {
        s: sum(relative(made(a, scheme=s).model(ids).logits, tiny(a).model(ids).logits) for a in ARCHITECTURES) for s in SCHEMES
    }
    assert errors["W4A16"] < errors["W4A4KV"] < errors["W4A4"] and errors["W4A8"] < errors["W4A4"]
    assert errors["W4A4KV"] < errors["W4A3KV"] < errors["W3A3KV"]


@pytest.mark.parametrize(
    "architecture, recipe",
    [*((a, {}) for a in ARCHITECTURES), ("llama", {"variant": "official"}), ("opt", {"method": "rtn", "weights": "rtn"})],
    ids=lambda v: v if isinstance(v, str) else str(v),
)
def test_the_base_model_is_not_changed(architecture, recipe):
    base = tiny(architecture)
    before, ids = {k: v.clone() for k, v in base.model.state_dict().items()}, tokens(1, 16)
    logits = base.model(ids).logits
    quantised(architecture, base=base, **recipe)
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert torch.equal(base.model(ids).logits, logits) and all(block.is_float for block in base.model.blocks)


@pytest.mark.parametrize(
    "recipe", ({}, {"variant": "official"}, {"scheme": "W4A3KV"}, {"method": "rtn"}), ids=("default", "official", "kv", "rtn")
)
def test_the_same_recipe_gives_the_same_model_bit_for_bit(recipe):
    torch.manual_seed(1)
    one = quantised("llama", seed=7, layers=1, **recipe).model.state_dict()
    torch.manual_seed(2)
    torch.rand(100)
    other = quantised("llama", seed=7, layers=1, **recipe).model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quantised("llama")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("variant", ("default", "official"))
def test_planning_is_pure(variant):
    """Twice the same plan, and statistics as they were."""
    q = made("qwen3", variant=variant)
    spec, samples = spec_of(q.base), observed("qwen3", 0)
    ranges = {site: ranges_of(x) for site, x in samples.items()}
    importance = {s: torch.rand(spec.width(s)) for s in INPUT_SITE.values()}
    stats = LayerStatistics(ranges, ranges, {}, importance)
    kept = {s: [t.clone() for t in (r.low, r.high, r.sample_low, r.sample_high, r.rows)] for s, r in ranges.items()}
    one, other = (method("rptq").plan_layer(replace(stats, made={}), q.recipe, spec) for _ in range(2))
    assert all(torch.equal(one.orders[r], other.orders[r]) for r in one.orders)
    assert all(torch.equal(one.sites[s].params.scale, other.sites[s].params.scale) for s in SITES)
    for s, r in ranges.items():
        assert all(torch.equal(a, b) for a, b in zip(kept[s], (r.low, r.high, r.sample_low, r.sample_high, r.rows), strict=True))


def test_applying_leaves_the_block_and_the_plan_alone():
    q = made("llama", weights="rtn")
    block, plan = float_blocks(q.base)[0], q.outcomes[0].plan
    before = {k: v.clone() for k, v in block.state_dict().items()}
    orders = {k: v.clone() for k, v in plan.orders.items()}
    build_block(block, plan, hessians={}, grid=Grid.EXACT)
    assert all(torch.equal(v, block.state_dict()[k]) for k, v in before.items()) and block.attention.softmax_bits == 16
    assert all(torch.equal(v, plan.orders[k]) for k, v in orders.items()) and block.attention.k_quantizer is None


def test_progress_is_a_sentence_and_a_rising_fraction():
    calls: list[tuple[str, float | None]] = []
    quantised("llama", layers=3, progress=lambda stage, fraction: calls.append((stage, fraction)))
    fractions = [f for _, f in calls if f is not None]
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] <= 1 and len(fractions) > 9
    assert all(f"Layer {i} of 3" in " ".join(s for s, _ in calls) for i in (1, 2, 3)) and all(len(s) < 80 for s, _ in calls)


@pytest.mark.parametrize("place", (0, 0.1, 0.5, 0.999), ids=("first call", "early", "middle", "last call"))
def test_cancelling_leaves_no_trace(place):
    base, calls = tiny("llama"), []
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    expected = quantised("llama", base=base, progress=lambda *call: calls.append(call)).model.state_dict()
    left = itertools.count(-int(place * len(calls)))

    def stop(stage: str, fraction: float | None) -> None:
        if next(left) == 0:
            raise Cancelled

    with pytest.raises(Cancelled):
        quantised("llama", base=base, progress=stop)
    assert all(torch.equal(v, base.model.state_dict()[k]) for k, v in before.items())
    again = quantised("llama", base=base).model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in expected.items())


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ({}, True),
        ({"weights": "rtn"}, False),
        ({"scheme": "custom", "bits": Bits(v=4)}, False),
        ({"method": "rtn"}, True),
        ({"method": "rtn", "scheme": "custom", "bits": Bits(v=4)}, False),
        ({"variant": "official"}, True),
        ({"method": "bitnet"}, False),
    ],
    ids=str,
)
def test_hessians_are_made_for_methods_that_read_them(recipe, wanted, monkeypatch):
    seen, real = [], Recorder.ranges
    monkeypatch.setattr(Recorder, "ranges", lambda self: seen.append(set(self.hessians)) or real(self))
    quantised("llama", base=tiny("llama"), **recipe)
    assert len(seen) == (4 if recipe.get("variant") else 2)
    assert seen[-1] == (set(INPUT_SITE.values()) if wanted else set())


def test_an_output_that_is_not_finite_names_its_layer(monkeypatch):
    real = DecoderBlock.forward

    def overflowing(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        return out * math.inf if self.layer_index == 1 and isinstance(self.mlp.down, QuantLinear) else out

    monkeypatch.setattr(DecoderBlock, "forward", overflowing)
    with pytest.raises(NumericError, match="^The output of layer 1 is not finite: use more bits") as caught:
        quantised("llama")
    assert caught.value.code == "E-NUM-NAN"


def test_nan_in_the_weights_names_the_site():
    from core.models.tiny import tiny_model

    base = tiny_model("llama")
    base.model.blocks[1].mlp.down.weight.data[3, 4] = math.inf
    base.model.blocks[1].attention.qkv.weight.data[-1, 0] = math.nan
    with pytest.raises(NumericError, match=r"layers\.1\.v") as caught:
        quantised("llama", base=base)
    assert caught.value.code == "E-NUM-NAN" and len(str(caught.value)) < 240


@pytest.mark.parametrize(
    "windows, variant",
    [
        (tokens(1, 8), "default"),
        (tokens(1, 100), "default"),
        (tokens(3, 9), "official"),
        (torch.full((2, 16), 65), "default"),
        (torch.full((2, 16), 65), "official"),
    ],
    ids=("8 tokens", "1 window", "odd", "one token repeated", "one token repeated, official"),
)
def test_small_and_degenerate_calibrations(windows, variant):
    q = quantised("llama", windows=windows, variant=variant, layers=1)
    assert torch.isfinite(q.model(tokens(1, 20)).logits).all()
    assert all(n.fallback is None or len(n.fallback) < 120 for o in q.outcomes for n in o.weights.values())


@pytest.mark.parametrize("method", ("rptq", "rtn"))
def test_the_second_layer_is_calibrated_on_the_quantised_first(method):
    """Sequential: the plan of layer 1 depends on the bits of layer 0's weights."""
    coarse, fine = (made("llama", method=method, scheme="custom", bits=Bits(weights=w, q=8), weights="rtn") for w in (2, 8))
    assert torch.equal(coarse.outcomes[0].plan.sites["q"].params.scale, fine.outcomes[0].plan.sites["q"].params.scale)
    assert not torch.equal(coarse.outcomes[1].plan.sites["q"].params.scale, fine.outcomes[1].plan.sites["q"].params.scale)

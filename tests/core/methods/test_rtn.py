"""The baseline in its two strengths: plain is one range per tensor, matched is RPTQ's variant default without the reordering."""

from __future__ import annotations

import pytest
import torch

from core.evaluation.memory import kv_bytes_per_token
from core.methods import method
from core.methods.base import LayerStatistics, channel_importance
from core.methods.rtn import equal_groups
from core.models.io.quantized import modules_of
from core.models.tiny import tiny_model
from core.quant.affine import Grid, choose_qparams
from core.quant.observer import RangeRules, plan_site
from core.recipe import INPUT_SITE, PER_CHANNEL, SITES, Bits, Clusters, QuantRecipe
from tests.core.methods.rptq_tools import made, observed, ranges_of
from tests.core.recipe_tools import refused
from tests.core.tools import quantised, relative, spec_of, tiny, tokens

FEW = Clusters(4, 2, 2, 4, 4)
MATCHED = {"method": "rtn", "variant": "matched"}


@pytest.mark.parametrize(
    ("width", "count", "heads", "expected"),
    [
        (11, 3, 1, [0, 3, 7, 11]),
        (10, 3, 1, [0, 3, 6, 10]),
        (8, 2, 2, [0, 2, 4, 6, 8]),
        (6, PER_CHANNEL, 2, [0, 1, 2, 3, 4, 5, 6]),
        (7, 1, 1, [0, 7]),
    ],
)
def test_groups_of_neighbours_are_equal_and_stay_in_their_head(width, count, heads, expected):
    assert equal_groups(width, count, heads).tolist() == expected


@pytest.mark.parametrize(("architecture", "scheme"), [("llama", "W4A4"), ("llama", "W4A3KV"), ("opt", "W4A16")])
def test_matched_stores_what_rptq_stores(architecture, scheme):
    """Same number of groups, so the same bits per weight and bytes per cached token; same bits, same first token."""
    rptq, rtn = (made(architecture, scheme=scheme, clusters=FEW, weights="rtn", **r) for r in ({}, MATCHED))
    bits = [[(m.stored_bytes, m.effective_bits) for m in modules_of(q.model)] for q in (rptq, rtn)]
    assert bits[0] == bits[1]
    assert len({kv_bytes_per_token(q.model) for q in (rptq, rtn)}) == 1
    for one, other in zip(rptq.outcomes, rtn.outcomes, strict=True):
        assert {s: p.bits for s, p in one.plan.sites.items()} == {s: p.bits for s, p in other.plan.sites.items()}
        assert (one.plan.sink_tokens, one.plan.softmax_bits) == (other.plan.sink_tokens, other.plan.softmax_bits)
        assert one.plan.sink_tokens == (scheme != "W4A16") and not other.plan.orders
        below = [s for s in SITES if other.plan.sites[s].bits < 16 or s in INPUT_SITE.values()]
        assert all(len(one.plan.sites[s].offsets) == len(other.plan.sites[s].offsets) for s in below)


@pytest.mark.parametrize("architecture", ("llama", "qwen3", "opt"))
def test_matched_grids_are_searched_by_importance(architecture):
    """The planned grids are the clip search's, each site by the importance that RPTQ gives it; the plain ones are not."""
    samples, spec = observed(architecture, 1), spec_of(tiny(architecture))
    ranges = {site: ranges_of(x) for site, x in samples.items()}
    generator = torch.Generator().manual_seed(0)
    stats = LayerStatistics(ranges, ranges, {}, {s: torch.rand(spec.width(s), generator=generator) for s in INPUT_SITE.values()})
    weight, searched = channel_importance(stats, spec), RangeRules(Grid.EXACT, ema=False, clip_search=True)
    recipe = QuantRecipe("m", clusters=FEW, **MATCHED)
    plan = method("rtn").plan_layer(stats, recipe, spec)
    plain = method("rtn").plan_layer(stats, QuantRecipe("m", method="rtn"), spec)
    for site in SITES:
        found = plan.sites[site]
        expected = plan_site(ranges[site], found.offsets, found.bits, searched, weight[site])
        assert torch.equal(found.params.scale, expected.params.scale), site
        assert torch.equal(found.params.zero_point, expected.params.zero_point), site
        full = choose_qparams(samples[site].min(), samples[site].max(), bits=found.bits, grid=Grid.EXACT)
        assert plain.sites[site].params.scale.tolist() == [full.scale] and plain.sites[site].offsets.tolist()[0] == 0


def test_matched_leaves_the_first_token_out_of_the_ranges():
    """A first token with one huge channel, alone in its windows, does not change the ranges of the others."""
    base = tiny_model("llama")
    base.model.get_input_embeddings().weight.data[7, 3] = 1e4
    windows = tokens(8, 32)
    windows[:, 0], windows[:, 1:] = 7, windows[:, 1:].where(windows[:, 1:] != 7, torch.tensor(8))
    options = {"windows": windows, "layers": 1, "weights": "rtn", "clusters": FEW, **MATCHED}
    loud, tame = (quantised("llama", base=b, **options) for b in (base, tiny("llama")))
    widest = [float(q.outcomes[0].plan.sites["attn_in"].params.scale.max()) for q in (loud, tame)]
    assert widest[0] == pytest.approx(widest[1], rel=1e-3), "the norm's output of the other tokens is as it was"


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_the_fair_baseline_is_closer_than_plain_rounding(architecture):
    ids = tokens(4, 24, seed=1)
    expected = tiny(architecture).model(ids).logits
    plain, matched = (
        relative(made(architecture, weights="rtn", **r).model(ids).logits, expected) for r in ({"method": "rtn"}, MATCHED)
    )
    assert matched < plain


def test_weights_may_be_rounded_by_gptq_in_the_same_groups():
    q = quantised("llama", layers=1, clusters=FEW, **MATCHED)
    assert {n.method for o in q.outcomes for n in o.weights.values()} == {"gptq"}


def test_names_say_which_baseline_it_is():
    plain, matched = QuantRecipe("m", method="rtn", weights="rtn"), QuantRecipe("m", weights="rtn", **MATCHED)
    assert plain.label() == "RTN plain · W4A4 (norm outputs 8, softmax 8) · RTN"
    assert matched.label() == (
        "RTN matched (g=32/4, clip search, first token float) · W4A4 (norm outputs 8, softmax 8) · RTN"
    )
    assert QuantRecipe("m", scheme="W4A16", **MATCHED).label().startswith("RTN matched (g=32/4) · W4A16")
    assert plain.hash != matched.hash and QuantRecipe.from_json(matched.to_json()) == matched
    assert QuantRecipe.from_query(matched.to_query(), default=QuantRecipe("x")) == matched


def test_recipes_made_before_keep_their_hash():
    assert QuantRecipe("m", method="rtn", weights="rtn").hash == "e50baa086916a5b2"
    assert QuantRecipe("m").hash == "4ba36dd3f2755ea1"


@pytest.mark.parametrize("method", ("rptq", "bitnet"))
def test_matched_belongs_to_the_baseline(method):
    refused(QuantRecipe, "m", method=method, variant="matched", code="E-PARAM-VARIANT")


@pytest.mark.parametrize("method", ("rtn", "bitnet"))
def test_sorted_groups_belong_to_rptq(method):
    refused(QuantRecipe, "m", method=method, variant="sorted", code="E-PARAM-VARIANT")
    link = QuantRecipe("m", variant="sorted").to_query()
    assert QuantRecipe.from_query(f"method={method}", default=QuantRecipe("m", variant="sorted")).variant == "default"
    assert QuantRecipe.from_query(link, default=QuantRecipe("x")) == QuantRecipe("m", variant="sorted")


def test_without_activations_nothing_is_kept_in_float():
    q = quantised("llama", layers=1, scheme="custom", bits=Bits(weights=4), clusters=FEW, weights="rtn", **MATCHED)
    assert all(block.attention.sink_tokens == 0 for block in q.blocks)

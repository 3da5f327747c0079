"""What moved at one token: against values caught by hand, orders against plans, and a change that is found where it was made."""

from __future__ import annotations

import pytest
import torch

from core.errors import InputError
from core.models.tiny import tiny_model
from core.overrides import Overrides
from core.probe.moved import moved_sites, residual_order, site_orders
from core.recipe import Bits, Clusters
from tests.core.tools import block_inputs, quantised, tiny, tokens

IDS = tokens(1, 24, seed=3)[0]
FEW = {"clusters": Clusters(5, 3, 3, 5, 5), "weights": "rtn"}


def caught(model, ids, at=-1):
    """Values of every site at one token, caught on the way through the whole model."""
    seen, (h, rotary) = {}, (lambda item: (item.hidden, item.rotary))(block_inputs(model, ids[None]))
    with torch.inference_mode():
        for layer, block in enumerate(model.blocks):
            with block.slots.watch(lambda site, x, layer=layer: seen.update({(layer, site): x[0, at].double()})):
                h = block(h, rotary)
    return seen


@pytest.mark.parametrize("architecture", ["llama", "opt", "bitnet", "gpt_neox"])
def test_a_model_beside_itself_moves_nowhere(architecture):
    model = tiny(architecture).model
    moves = moved_sites(model, model, IDS, "rtn")
    assert len(moves) == 14 and {move.size for move in moves} == {0.0}


@pytest.mark.parametrize("architecture", ["llama", "opt", "bitnet", "qwen3"])
@pytest.mark.parametrize("order", ["layer", "shared"])
def test_reordered_channels_are_put_back(architecture, order):
    """A run that rounds nothing but reorders everything: each site's values are the original's, channel by channel."""
    made = quantised(architecture, method="rptq", scheme="custom", bits=Bits(), order=order, **FEW)
    moves = moved_sites(made.model, made.base.model, IDS, "rptq")
    assert len(moves) == 14 and max(move.moved for move in moves) < 1e-8


@pytest.mark.parametrize(("architecture", "scheme"), [("llama", "W4A4"), ("opt", "W3A3KV")])
def test_the_orders_are_those_of_the_plans(architecture, scheme):
    made = quantised(architecture, method="rptq", scheme=scheme, **FEW)
    for block, own, outcome in zip(made.blocks, made.base.model.blocks, made.outcomes, strict=True):
        orders = site_orders(block, own, None, reorders=True)
        assert any(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
        for site, plan in outcome.plan.sites.items():
            assert torch.equal(orders[site], plan.order), site


def test_every_number_is_that_of_the_whole_run():
    """Of a run that reorders nothing; its attention stays in float, so what is caught there is what it goes on with."""
    made = quantised("llama", scheme="custom", bits=Bits(weights=4), method="rtn", weights="rtn")
    before, after = caught(made.base.model, IDS, 8), caught(made.model, IDS, 8)
    moves = moved_sites(made.model, made.base.model, IDS[:9], "rtn")  # later tokens change nothing
    assert [m.size for m in moves] == sorted((m.size for m in moves), reverse=True)
    for move in moves:
        old, new = before[move.layer, move.site], after[move.layer, move.site]
        assert move.moved == pytest.approx(float((new - old).square().sum() / old.square().sum()), rel=1e-3, abs=1e-9)
        channel, *values = move.channels[0]
        assert channel == int((new - old).abs().argmax()) or move.moved == 0
        assert values == pytest.approx([float(old[channel]), float(new[channel])], rel=1e-3)
        assert move.rounded == 0 and (move.came == 0) == (move.layer == 0)


@pytest.mark.parametrize(("layer", "site"), [(1, "down_in"), (0, "o_in"), (1, "k")])
@pytest.mark.parametrize("method", ["rptq", "rotation", "rtn"])
def test_one_rounded_site_is_pointed_at(layer, site, method):
    own = {"overrides": Overrides(((layer, site, 2),)), "scheme": "custom", "bits": Bits(), "weights": "rtn"}
    made = quantised("llama", method=method, layers=3, **own)
    moves = moved_sites(made.model, made.base.model, IDS, method)
    (first,) = (move for move in moves if move.rounded > 1e-8)
    assert (first.layer, first.site) == (layer, site) and first.rounded > 1e-3 and first.came < 1e-8
    assert max((move.size for move in moves if move.layer < layer), default=0) < 1e-8
    assert (first.moved is None) == (method == "rotation")
    if site == "down_in":  # nothing of its layer comes behind it
        assert moves[0] is first


@pytest.mark.parametrize("method", ["rptq", "rotation"])
def test_what_came_in_is_that_of_the_stream(method):
    """Whatever a run does inside its layers, the stream that leaves them is read by the original's next layer."""
    made = quantised("llama", scheme="W4A4", method=method, layers=3, **FEW)
    item, before = block_inputs(made.base.model, IDS[None]), caught(made.base.model, IDS)
    with torch.inference_mode():
        stream = made.model.decoder.run(item.hidden, item.rotary, last=2)
        seen = {}
        with made.base.model.blocks[2].slots.watch(lambda site, x: seen.update({site: x[0, -1].double()})):
            made.base.model.blocks[2](stream, item.rotary)
    for move in moved_sites(made.model, made.base.model, IDS, method):
        if move.layer == 2:
            old, new = before[2, move.site], seen[move.site]
            assert move.came == pytest.approx(float((new - old).square().sum() / old.square().sum()), rel=1e-3)


def test_another_original_is_refused():
    made = quantised("llama", scheme="W4A4", weights="rtn")
    for other in (tiny_model("llama", seed=1), tiny_model("llama", layers=3), tiny("opt")):
        with pytest.raises(InputError, match="not made from"):
            residual_order(made.model, other.model)

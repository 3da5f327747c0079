"""Oracle 1: folding any legal permutation changes nothing.

Random permutations, each reordering alone and all together, prefill and decoding with a cache, against the transformers
model itself. In float64 the blocks agree to rounding, so what float32 leaves is rounding too.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from core.methods.rptq.reorder import head_channels, qkv_rows, query_channels, reorder_block
from core.models.adapter import BlockSpec
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model
from tests.core.methods.reorder_tools import IDS, ILLEGAL, LEGAL, NAMES, ROTARY, random_orders
from tests.core.tools import ARCHITECTURES, block_inputs, float_blocks, in_steps, relative, spec_of, tiny, watched


def reordered(loaded: LoadedModel, names: tuple[str, ...] = NAMES, seed: int = 0) -> nn.Module:
    spec = spec_of(loaded)
    blocks = [reorder_block(b, random_orders(spec, seed + i, names)) for i, b in enumerate(float_blocks(loaded))]
    return loaded.model.with_blocks(blocks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("names", [*((n,) for n in NAMES), NAMES], ids=lambda n: "+".join(n))
def test_reordering_changes_nothing(architecture, names):
    loaded = tiny(architecture)
    expected = loaded.model(IDS).logits
    model = reordered(loaded, names)
    assert relative(model(IDS).logits, expected) < LEGAL
    assert relative(in_steps(model, IDS), expected) < LEGAL


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(1, 4))
def test_other_permutations_and_depths(architecture, seed):
    loaded = tiny_model(architecture, seed=seed, layers=3)
    assert relative(reordered(loaded, seed=seed)(IDS).logits, loaded.model(IDS).logits) < LEGAL


@pytest.mark.parametrize(
    "options",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
    ],
    ids=lambda o: ",".join(o),
)
def test_other_shapes_of_llama(options):
    loaded = tiny_model("llama", **options)
    assert relative(reordered(loaded)(IDS).logits, loaded.model(IDS).logits) < LEGAL


def double(loaded: LoadedModel) -> LoadedModel:
    """The model in float64."""
    loaded.model.double()
    return loaded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reordering_changes_nothing_in_float64(architecture):
    loaded = double(tiny_model(architecture))
    plain = loaded.model.with_blocks(float_blocks(loaded))
    expected = plain(IDS).logits
    assert expected.dtype == torch.float64
    model = reordered(loaded)
    assert relative(model(IDS).logits, expected) < 1e-12  # measured: at most 5e-15
    assert relative(in_steps(model, IDS), expected) < 1e-12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_float_block_is_not_changed(architecture):
    loaded = tiny(architecture)
    block = float_blocks(loaded)[0]
    before = {k: v.clone() for k, v in block.state_dict().items()}
    reorder_block(block, random_orders(spec_of(loaded), 0))
    after = block.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_residual_stream_keeps_its_order(architecture):
    loaded = tiny(architecture)
    block = float_blocks(loaded)[0]
    new = reorder_block(block, random_orders(spec_of(loaded), 0))
    for name in ("o", "down"):
        old_rows, new_rows = block.linears()[name], new.linears()[name]
        assert relative(new_rows.weight.sort(1).values, old_rows.weight.sort(1).values) == 0, "columns only"
        assert old_rows.bias is None or torch.equal(new_rows.bias, old_rows.bias)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_come_out_permuted(architecture):
    """What the quantisers see is the original tensor in the planned order: clusters lie side by side."""
    loaded = tiny(architecture)
    spec, block = spec_of(loaded), float_blocks(loaded)[0]
    orders = random_orders(spec, 3)
    inputs = block_inputs(loaded.model, IDS)
    seen: dict[str, dict[str, Tensor]] = {"old": {}, "new": {}}
    for name, b in (("old", block), ("new", reorder_block(block, orders))):
        watched(b, inputs.hidden, inputs.rotary, lambda site, x, n=name: seen[n].update({site: x.clone()}))
    expected = {
        "attn_in": orders.R1,
        "q": query_channels(orders.R2, spec.groups),
        "k": head_channels(orders.R2),
        "v": head_channels(orders.R3),
        "o_in": query_channels(orders.R3, spec.groups),
        "mlp_in": orders.R4,
        "down_in": orders.R5,
    }
    for site, order in expected.items():
        assert sorted(order.tolist()) == list(range(spec.width(site)))
        assert relative(seen["new"][site], seen["old"][site][..., order]) < LEGAL, site
        assert relative(seen["new"][site], seen["old"][site]) > ILLEGAL, f"{site}: the permutation does something"


def test_helpers_by_hand():
    order = torch.tensor([[1, 0, 2], [2, 1, 0]])
    assert head_channels(order).tolist() == [1, 0, 2, 5, 4, 3]
    assert query_channels(order, 2).tolist() == [1, 0, 2, 4, 3, 5, 8, 7, 6, 11, 10, 9]
    spec = BlockSpec(4, 4, 2, 3, 5, "rms", 1e-5, "silu", True, True, False)
    assert qkv_rows(spec, None, None) is None
    rows = qkv_rows(spec, None, order).tolist()
    assert rows == [*range(18), 18 + 1, 18 + 0, 18 + 2, 18 + 5, 18 + 4, 18 + 3]
    assert qkv_rows(spec, order, None).tolist()[12:18] == [12 + i for i in head_channels(order).tolist()]


@pytest.mark.parametrize("architecture", ROTARY)
def test_rotation_needs_no_rows(architecture):
    """With a rotation, R2 is stored after it: the rows of Wq and Wk keep their order, per-head gains too."""
    loaded = tiny(architecture)
    block = float_blocks(loaded)[0]
    new = reorder_block(block, random_orders(spec_of(loaded), 0, ("R2",)))
    old, new = block.attention, new.attention
    assert torch.equal(new.qkv.weight, old.qkv.weight) and new.rope_order is not None and old.rope_order is None
    assert new.q_norm is old.q_norm

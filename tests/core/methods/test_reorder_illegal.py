"""Oracle 1, the other side: every illegal permutation changes the output by a visible amount.

Each test starts from the legal reordering and takes one necessary thing away, in the first layer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from core.methods.rptq.reorder import Orders, head_channels, qkv_rows, reorder_block
from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model
from tests.core.methods.reorder_tools import IDS, ILLEGAL, LEGAL, NAMES, ROTARY, random_orders
from tests.core.tools import ARCHITECTURES, float_blocks, in_steps, relative, spec_of, tiny


def broken(loaded: LoadedModel, change, names: tuple[str, ...] = NAMES) -> float:
    """Relative error of the logits after `change(new block, float block, orders, spec)` on a legally reordered model."""
    spec, blocks = spec_of(loaded), float_blocks(loaded)
    orders = random_orders(spec, 5, names)
    new = copy.deepcopy(reorder_block(blocks[0], orders))
    model = loaded.model.with_blocks([new, *blocks[1:]])
    expected = loaded.model(IDS).logits
    assert relative(model(IDS).logits, expected) < LEGAL, "legal before the change"
    change(new, blocks[0], orders, spec)
    errors = relative(model(IDS).logits, expected), relative(in_steps(model, IDS), expected)
    assert abs(errors[0] - errors[1]) < 1e-3, "prefill and decoding are wrong alike"
    return errors[0]


def parts(spec: BlockSpec) -> dict[str, slice]:
    q, k = spec.width("q"), spec.width("k")
    return {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k)}


def keep_rows(new: nn.Linear, old: nn.Linear, rows: slice, columns: Tensor | None) -> None:
    weight = old.weight if columns is None else old.weight[:, columns]
    new.weight.data[rows] = weight.data[rows]
    if new.bias is not None:
        new.bias.data[rows] = old.bias.data[rows]


def louder_biases(loaded: LoadedModel) -> LoadedModel:
    """Biases of order one, so that forgetting one shows."""
    for name, parameter in loaded.model.state_dict(keep_vars=True).items():
        if name.endswith("bias"):
            parameter.data.mul_(10)
    return loaded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm, linear, name", [("norm1", "qkv", "R1"), ("norm2", "up", "R4")], ids=("R1", "R4"))
class TestNorms:
    """R1 and R4: the norm's store and the consumer's columns belong together."""

    def test_gain_permuted_without_gather(self, architecture, norm, linear, name):
        def change(new: DecoderBlock, *_: object) -> None:
            getattr(new, norm).order = None

        assert broken(tiny(architecture), change) > ILLEGAL

    def test_gather_without_gain(self, architecture, norm, linear, name):
        def change(new: DecoderBlock, old: DecoderBlock, *_: object) -> None:
            getattr(new, norm).weight = getattr(old, norm).weight

        assert broken(tiny(architecture), change) > ILLEGAL

    def test_columns_not_permuted(self, architecture, norm, linear, name):
        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            layer = new.linears()[linear]
            layer.weight.data = layer.weight.data[:, getattr(orders, name).argsort()]

        assert broken(tiny(architecture), change) > ILLEGAL

    def test_columns_permuted_by_the_inverse(self, architecture, norm, linear, name):
        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            layer, order = new.linears()[linear], getattr(orders, name)
            layer.weight.data = layer.weight.data[:, order.argsort()][:, order.argsort()]

        assert broken(tiny(architecture), change) > ILLEGAL

    def test_one_consumer_forgotten(self, architecture, norm, linear, name):
        """q, k and v (gate and up) read one tensor: all of them need the order."""

        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            rows = parts(spec)["v"] if linear == "qkv" else slice(0, spec.ffn)
            layer = new.linears()[linear]
            layer.weight.data[rows] = layer.weight.data[rows][:, getattr(orders, name).argsort()]

        assert broken(tiny(architecture), change) > ILLEGAL


@pytest.mark.parametrize("norm", ("norm1", "norm2"))
def test_norm_bias_forgotten(norm):
    def change(new: DecoderBlock, old: DecoderBlock, *_: object) -> None:
        getattr(new, norm).bias = getattr(old, norm).bias

    assert broken(louder_biases(tiny_model("opt")), change) > ILLEGAL


@pytest.mark.parametrize("architecture", ROTARY)
def test_r3_order_per_query_head(architecture):
    """P V of all query heads of a group comes in their kv head's order: another order per query head is wrong."""

    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        g = torch.Generator().manual_seed(0)
        own = torch.stack([torch.randperm(spec.head_dim, generator=g) for _ in range(spec.heads)])
        new.attention.o.weight.data = old.attention.o.weight.data[:, head_channels(own)]

    assert broken(tiny(architecture), change) > ILLEGAL


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("forgotten", ("rows of v", "columns of o"))
def test_r3_needs_both_sides(architecture, forgotten):
    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        if forgotten == "columns of o":
            new.attention.o.weight.data = old.attention.o.weight.data
        else:
            keep_rows(new.attention.qkv, old.attention.qkv, parts(spec)["v"], orders.R1)

    assert broken(tiny(architecture), change) > ILLEGAL


@pytest.mark.parametrize("architecture", ("opt", "qwen2"))
def test_r3_bias_forgotten(architecture):
    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        new.attention.qkv.bias.data[parts(spec)["v"]] = old.attention.qkv.bias.data[parts(spec)["v"]]

    assert broken(louder_biases(tiny_model(architecture)), change) > ILLEGAL


@pytest.mark.parametrize("architecture", ROTARY)
def test_r3_across_heads(architecture):
    """An order that mixes kv heads (Atom's) cannot be folded when o is told only about heads."""

    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        order = torch.randperm(spec.width("v"), generator=torch.Generator().manual_seed(0))
        rows = torch.arange(new.attention.qkv.weight.shape[0])[parts(spec)["v"]][order]
        new.attention.qkv.weight.data[parts(spec)["v"]] = old.attention.qkv.weight.data[rows][:, orders.R1]

    assert broken(tiny(architecture), change) > ILLEGAL


@pytest.mark.parametrize("architecture", ROTARY)
@pytest.mark.parametrize("forgotten", ("gate", "up", "both", "columns of down"))
def test_r5_needs_gate_up_and_down(architecture, forgotten):
    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        if forgotten == "columns of down":
            new.mlp.down.weight.data = old.mlp.down.weight.data
            return
        rows = {"gate": slice(0, spec.ffn), "up": slice(spec.ffn, None), "both": slice(None)}[forgotten]
        keep_rows(new.mlp.up, old.mlp.up, rows, orders.R4)

    assert broken(tiny(architecture), change) > ILLEGAL


@pytest.mark.parametrize("forgotten", ("rows", "bias", "columns of down"))
def test_r5_of_opt_needs_all_three(forgotten):
    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        if forgotten == "rows":
            new.mlp.up.weight.data = old.mlp.up.weight.data[:, orders.R4]
        elif forgotten == "bias":
            new.mlp.up.bias.data = old.mlp.up.bias.data
        else:
            new.mlp.down.weight.data = old.mlp.down.weight.data

    assert broken(louder_biases(tiny_model("opt")), change) > ILLEGAL


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("linear", ("o", "down"))
def test_rows_of_the_residual_writers_must_stay(architecture, linear):
    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        layer = new.linears()[linear]
        layer.weight.data = layer.weight.data[orders.R1]
        if layer.bias is not None:
            layer.bias.data = layer.bias.data[orders.R1]

    assert broken(tiny(architecture), change) > ILLEGAL


def rows_of_q_and_k(new: DecoderBlock, old: DecoderBlock, r2: Tensor, spec: BlockSpec) -> None:
    """Fold a within-head order into the rows of Wq and Wk (and per-head gains), rotation untouched: the user fork's way."""
    rows = qkv_rows(spec, r2, None)
    new.attention.qkv.weight.data = old.attention.qkv.weight.data[rows]
    if new.attention.qkv.bias is not None:
        new.attention.qkv.bias.data = old.attention.qkv.bias.data[rows]
    if spec.qk_norm:
        new.attention.q_norm, new.attention.k_norm = old.attention.q_norm[r2[0]], old.attention.k_norm[r2[0]]
    new.attention.rope_order = None


def shared_order(spec: BlockSpec, *, pairs: bool) -> Tensor:
    """One within-head order for all heads, [Hkv, E]; with `pairs` the two halves of a rotation pair move together."""
    g, half = torch.Generator().manual_seed(2), spec.head_dim // 2
    one = torch.randperm(half if pairs else spec.head_dim, generator=g)
    return (torch.cat([one, one + half]) if pairs else one).expand(spec.kv_heads, -1)


def permuted_tables(model: nn.Module, order: Tensor):
    """Make the model's rotary tables come out with their columns in `order`."""
    rotary = model.decoder.rotaries[0]
    plain = rotary.forward
    rotary.forward = lambda *args, **kwargs: tuple(t[..., order] for t in plain(*args, **kwargs))


@pytest.mark.parametrize("architecture", ROTARY)
class TestRotation:
    """R2: the rotation couples channels i and i + E / 2 and has its own angle per pair."""

    def test_free_order_with_stock_rotation(self, architecture):
        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            rows_of_q_and_k(new, old, shared_order(spec, pairs=False), spec)

        assert broken(tiny(architecture), change, names=()) > ILLEGAL

    def test_pair_preserving_order_with_unpermuted_tables(self, architecture):
        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            rows_of_q_and_k(new, old, shared_order(spec, pairs=True), spec)

        assert broken(tiny(architecture), change, names=()) > ILLEGAL

    @pytest.mark.parametrize("pairs", (True, False), ids=("pairs", "free"))
    def test_permuted_tables_are_right_for_pairs_and_wrong_for_a_free_order(self, architecture, pairs):
        """The positive control of the two tests above, and the published integer rotation's mistake."""
        loaded = tiny_model(architecture)
        expected = loaded.model(IDS).logits
        spec, blocks = spec_of(loaded), float_blocks(loaded)
        order = shared_order(spec, pairs=pairs)
        changed = [copy.deepcopy(b) for b in blocks]
        for new, old in zip(changed, blocks, strict=True):
            rows_of_q_and_k(new, old, order, spec)
        model = loaded.model.with_blocks(changed)
        permuted_tables(model, order[0])
        error = relative(model(IDS).logits, expected)
        assert error < LEGAL if pairs else error > ILLEGAL

    def test_order_stored_for_queries_only(self, architecture):
        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            store = new.attention._store_r2
            new.attention._store_r2 = lambda qk: torch.cat([store(qk)[:, :, : spec.heads], qk[:, :, spec.heads :]], dim=2)

        assert broken(tiny(architecture), change, names=("R2",)) > ILLEGAL

    def test_another_order_per_query_head(self, architecture):
        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            g = torch.Generator().manual_seed(0)
            own = torch.stack([torch.randperm(spec.head_dim, generator=g) for _ in range(spec.heads)])
            store = new.attention._store_r2

            def query_heads(qk: Tensor) -> Tensor:
                q = qk[:, :, : spec.heads]
                return torch.cat([torch.gather(q, 3, own.expand_as(q)), store(qk)[:, :, spec.heads :]], dim=2)

            new.attention._store_r2 = query_heads

        assert broken(tiny(architecture), change, names=("R2",)) > ILLEGAL

    def test_order_applied_before_the_rotation(self, architecture):
        def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
            rows_of_q_and_k(new, old, orders.R2, spec)

        assert broken(tiny(architecture), change, names=("R2",)) > ILLEGAL


@pytest.mark.parametrize("forgotten", ("rows of q", "rows of k", "bias of q", "bias of k"))
def test_r2_of_opt_needs_rows_and_biases(forgotten):
    """All but the bias of k: q · b_k is the same for every key, and softmax does not see it."""

    def change(new: DecoderBlock, old: DecoderBlock, orders: Orders, spec: BlockSpec) -> None:
        rows = parts(spec)[forgotten[-1]]
        if forgotten.startswith("rows"):
            new.attention.qkv.weight.data[rows] = old.attention.qkv.weight.data[rows][:, orders.R1]
        else:
            new.attention.qkv.bias.data[rows] = old.attention.qkv.bias.data[rows]

    error = broken(louder_biases(tiny_model("opt")), change)
    assert error < LEGAL if forgotten == "bias of k" else error > ILLEGAL

"""One order of the residual stream for all layers: folding it changes nothing, forgetting a part of it does; its runs are best.

A random order and the one that is found, on every architecture, prefill and decoding with a cache.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from core.calibration.observe import observe_layers
from core.errors import InputError
from core.evaluation.describe import model_info
from core.evaluation.memory import measured_parts, recipe_bytes
from core.evaluation.shapes import shape_of_loaded
from core.methods.base import FLOAT_FIRST_TOKENS
from core.methods.rptq.plus import METHOD
from core.methods.rptq.reorder import reorder_block
from core.methods.rptq.shared import residual_order, shared_clusters
from core.models.decoder import CausalModel
from core.models.io.quantized import load_quantized, save_quantized
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_architectures, tiny_model, tiny_transformers
from core.quant.ranges import ChannelRanges
from core.quant.segments import segment_max, segment_min, segment_sum
from core.recipe import Bits, Overrides, QuantRecipe
from tests.core.methods.reorder_tools import IDS, ILLEGAL, LEGAL, random_orders
from tests.core.probe.probe_tools import SEEN, statistics_of
from tests.core.tools import ARCHITECTURES, float_blocks, gaussian, in_steps, quantised, relative, spec_of, tiny, tokens

OPTIONS = {
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "opt with an own head": ("opt", {"tie_word_embeddings": False}),
    "projected opt": ("opt", {"word_embed_proj_dim": 32}),
    "opt without a last norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt with norms without gains": ("opt", {"layer_norm_elementwise_affine": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


def permutation(loaded: LoadedModel, seed: int = 7) -> Tensor:
    return torch.randperm(spec_of(loaded).hidden, generator=torch.Generator().manual_seed(seed))


def ordered(loaded: LoadedModel, order: Tensor, names: tuple[str, ...] = ("R2", "R3", "R5")) -> CausalModel:
    """A float model in another order, on top of it other reorderings of each layer."""
    spec, blocks = spec_of(loaded), []
    for index, block in enumerate(float_blocks(loaded)):
        blocks.append(reorder_block(block.in_order(order), random_orders(spec, index, names)))
    return loaded.model.with_blocks(blocks, order)


def unchanged(loaded: LoadedModel, model: CausalModel) -> None:
    expected = loaded.model(IDS).logits
    assert relative(model(IDS).logits, expected) < LEGAL
    assert relative(in_steps(model, IDS), expected) < LEGAL


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_any_order_of_the_residual_stream_changes_nothing(architecture):
    loaded = tiny_model(architecture)
    unchanged(loaded, ordered(loaded, permutation(loaded)))


@pytest.mark.parametrize("name", OPTIONS)
def test_other_embeddings_heads_and_norms(name):
    architecture, options = OPTIONS[name]
    loaded = tiny_model(architecture, **options)
    made = ordered(loaded, permutation(loaded))
    unchanged(loaded, made)
    tied = loaded.model.decoder.head.weight is loaded.model.decoder.embed.weight
    assert (made.decoder.head.weight is made.decoder.embed.weight) == tied
    assert tied == (name not in ("opt with an own head", "llama with biases"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_float64_only_rounding_is_left(architecture):
    loaded = tiny_model(architecture)
    loaded.model.double()
    expected, made = loaded.model(IDS).logits, ordered(loaded, permutation(loaded))
    assert expected.dtype == torch.float64
    assert max(relative(made(IDS).logits, expected), relative(in_steps(made, IDS), expected)) < 1e-12


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mistral"])
def test_an_ordered_model_is_an_ordinary_checkpoint(architecture):
    """transformers' own code, which knows no order, runs the reordered tensors under their usual names."""
    source, adapter = tiny_transformers(architecture), tiny(architecture).adapter
    order, expected = permutation(tiny(architecture)), source(IDS).logits
    made = ordered(tiny(architecture), order, ("R3", "R5") if spec_of(tiny(architecture)).rope else ("R2", "R3", "R5"))
    stem, state = adapter.layers, dict(made.decoder.outside())
    for index, block in enumerate(made.blocks):
        spec, found = block.spec, block.linears()
        sizes = {
            adapter.qkv: (found["qkv"], [spec.width(site) for site in ("q", "k", "v")]),
            (adapter.o,): (found["o"], [spec.hidden]),
            adapter.mlp_in: (found["up"], [spec.ffn] * len(adapter.mlp_in)),
            (adapter.down,): (found["down"], [spec.hidden]),
        }
        norms = {adapter.norm1: block.norm1, adapter.norm2: block.norm2}
        norms |= {adapter.attn_sub_norm: block.attention.attn_sub_norm, adapter.ffn_sub_norm: block.mlp.ffn_sub_norm}
        for leaf in ("weight", "bias"):
            for paths, (linear, rows) in sizes.items():
                if (whole := getattr(linear, leaf)) is not None:
                    state |= {f"{stem}.{index}.{p}.{leaf}": t for p, t in zip(paths, whole.split(rows), strict=True)}
            state |= {f"{stem}.{index}.{p}.{leaf}": t for p, n in norms.items() if p and (t := getattr(n, leaf)) is not None}
    missing, unexpected = source.load_state_dict(state, strict=False)
    assert not unexpected and all("q_norm" in name or "k_norm" in name or name == "lm_head.weight" for name in missing)
    assert relative(source(IDS).logits, expected) < LEGAL


PLACES = (
    "embed.weight", "positions.weight", "norm.weight", "head.weight", "norm1.weight", "norm2.weight", "o.weight", "down.weight",
    "qkv.weight", "up.weight", "norm1.bias", "norm2.bias", "o.bias", "down.bias",
)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("place", PLACES)
def test_every_part_has_to_follow(architecture, place):
    """One tensor in the old order is a visible error: none of the folds is for show."""
    loaded = tiny_model(architecture, tie_word_embeddings=False)
    for name, tensor in loaded.model.state_dict().items():
        tensor.mul_(30 if name.endswith("bias") else 1)  # so that forgetting one shows
    order, expected = permutation(loaded), loaded.model(IDS).logits
    made = loaded.model.with_blocks([block.in_order(order) for block in loaded.model.blocks], order)
    assert relative(made(IDS).logits, expected) < LEGAL
    part, leaf = place.split(".")
    owners = [(made.decoder, loaded.model.decoder), *zip(made.blocks, loaded.model.blocks, strict=True)]
    touched = 0
    for new, old in owners:
        modules = [m.parts() if hasattr(m, "parts") else dict(m.named_children()) for m in (new, old)]
        if (found := getattr(modules[0].get(part), leaf, None)) is not None:
            with torch.no_grad():
                found.copy_(getattr(modules[1][part], leaf))
            touched += 1
    if touched:
        assert relative(made(IDS).logits, expected) > ILLEGAL
    else:
        assert architecture == "llama" and (leaf == "bias" or part == "positions"), "it has none"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_without_quantisers_gives_the_model_itself(architecture):
    """The whole way: observe, choose the order, fold it, build every layer, all at 16 bits. No norm is left with an order."""
    made = quantised(architecture, order="shared", scheme="custom", bits=Bits())
    unchanged(made.base, made.model)
    assert not torch.equal(made.model.decoder.outside()[name := next(iter(made.model.decoder.outside()))],
                           made.base.model.decoder.outside()[name])
    assert all(norm.order is None for block in made.blocks for norm in (block.norm1, block.norm2))
    assert not {"R1", "R4"} & made.outcomes[0].plan.orders.keys()


def test_only_the_stream_between_the_layers_has_the_shared_order():
    """R2, R3 and R5 are those of each layer's own clusters, and no error is larger than an order by layer explains."""
    made, own = (quantised("llama", order=order, scheme="W4A8") for order in ("shared", "layer"))
    for name in ("R2", "R3", "R5"):
        assert torch.equal(made.outcomes[0].plan.orders[name], own.outcomes[0].plan.orders[name])
    expected = made.base.model(IDS).logits
    errors = [relative(q.model(IDS).logits, expected) for q in (made, own)]
    assert 0 < errors[0] < 3 * errors[1]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "tied llama", "projected opt"])
def test_a_saved_model_has_the_order(name, tmp_path):
    architecture, options = OPTIONS.get(name, (name, {}))
    made = quantised(architecture, base=tiny_model(architecture, **options), order="shared", scheme="W4A4", weights="rtn")
    save_quantized(tmp_path / "q", made.loaded, {"recipe": made.recipe.to_dict()})
    back = load_quantized(tmp_path / "q").model
    assert torch.equal(back(IDS).logits, made.model(IDS).logits)
    assert torch.equal(in_steps(back, IDS), in_steps(made.model, IDS))
    assert back.state_dict().keys() == made.model.state_dict().keys()


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_bytes_told_before_count_no_order_in_norms(architecture):
    made = quantised(architecture, order="shared", scheme="W4A4", weights="rtn")
    shape, stored = shape_of_loaded(model_info(made.base, 0.0)), sum(measured_parts(made.model).values())
    assert stored <= recipe_bytes(shape, made.recipe)[0] <= 1.02 * stored
    spared = recipe_bytes(shape, replace(made.recipe, order="layer"))[0] - recipe_bytes(shape, made.recipe)[0]
    assert spared == 4 * 2 * shape.hidden * shape.layers


def ranges_of(low: Tensor, high: Tensor) -> dict[str, ChannelRanges]:
    return {site: ChannelRanges(low, high, low[None], high[None], low[None]) for site in ("attn_in", "mlp_in")}


def planted(layers: int, factor: float = 1.0) -> list[dict[str, ChannelRanges]]:
    """Four groups of 40 channels, told apart by layers 0 and 1 together only; every layer of another magnitude."""
    group, found = torch.arange(160) % 4, []
    for layer in range(layers):
        wide = 1.0 + 9.0 * ((group >> (layer % 2)) & 1) + 0.1 * gaussian(160, seed=layer).abs()
        found.append(ranges_of(-wide * factor**layer, wide * factor**layer))
    return found


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_channels_alike_in_all_layers_lie_together(factor):
    """No layer alone tells the groups apart, and no layer counts more because its numbers are larger."""
    order = residual_order(planted(4, factor), seed=0)
    assert torch.equal(order.sort().values, torch.arange(160))
    groups = (order % 4).tolist()
    assert sum(a != b for a, b in zip(groups, groups[1:], strict=False)) == 3
    assert torch.equal(order, residual_order(planted(4, factor), seed=0))


@pytest.mark.parametrize(("width", "value"), [(1, 1.0), (5, 0.0), (5, 2.0), (40, 0.0)])
def test_channels_that_are_all_alike_keep_their_order(width, value):
    flat = torch.full((width,), value)
    assert torch.equal(residual_order([ranges_of(-flat, flat)], seed=0), torch.arange(width))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_runs_are_the_best_of_all(count, weighted):
    width, g = 11, torch.Generator().manual_seed(count)
    low, high, importance = -torch.rand(width, generator=g), torch.rand(width, generator=g), torch.rand(width, generator=g)
    order = torch.randperm(width, generator=g)

    def cost(cuts: tuple[int, ...]) -> float:
        offsets = torch.tensor([0, *cuts, width])
        wide = segment_max(high[order], offsets) - segment_min(low[order], offsets)
        return float((segment_sum(importance[order] if weighted else torch.ones(width), offsets) * wide**2).sum())

    ranges = ranges_of(low, high)["attn_in"]
    found = shared_clusters(order, ranges, count, importance if weighted else None, equal=False)
    assert torch.equal(found.order, order)
    least = min(cost(cuts) for n in range(count) for cuts in combinations(range(1, width), n))
    assert cost(tuple(found.offsets[1:-1].tolist())) == pytest.approx(least)


def test_equal_runs_and_one_for_each_channel():
    ranges = ranges_of(torch.zeros(10), torch.arange(10.0))["attn_in"]
    assert shared_clusters(None, ranges, 4, None, equal=True).offsets.tolist() == [0, 2, 5, 7, 10]
    for count in (10, 65536):
        found = shared_clusters(None, ranges, count, None, equal=False)
        assert found.offsets.tolist() == list(range(11)) == [*found.order.tolist(), 10]


def test_the_probe_plans_on_the_order_of_a_run():
    """One order for every scheme, variant and layer: also where a layer's own bits leave its first token in the ranges."""
    made = quantised("llama", order="shared", scheme="W4A4", weights="rtn")
    found = statistics_of(made.base.model, made.recipe)
    embedding = made.base.model.decoder.embed.weight
    own = replace(made.recipe, variant="strict", overrides=Overrides.parse("layers.1=16"))
    for recipe in (made.recipe, own):
        for layer in (0, 1):
            order = found.of_layer(METHOD, layer, recipe).residual
            assert torch.equal(embedding[:, order], made.model.decoder.embed.weight)
    assert found.of_layer(METHOD, 0, replace(made.recipe, order="layer")).residual is None
    again = residual_order(observe_layers(made.base.model, SEEN, skip_first=FLOAT_FIRST_TOKENS), made.recipe.seed)
    assert torch.equal(order, again)


def test_recipes_of_the_default_order_keep_their_hashes():
    plain, shared = QuantRecipe("m"), QuantRecipe("m", order="shared")
    assert "order" not in plain.to_dict() and plain.hash != shared.hash and "one order for all layers" in shared.label()
    assert QuantRecipe.from_dict(shared.to_dict()) == shared == shared.for_layer(3)
    assert QuantRecipe.from_query(shared.to_query(), default=plain) == shared
    assert QuantRecipe.from_query(plain.to_query(), default=shared) == plain
    for wrong in ({"order": "own"}, {"order": "shared", "method": "rtn"}, {"order": "shared", "method": "rotation"}):
        with pytest.raises(InputError, match="order is"):
            QuantRecipe("m", **wrong)


def test_the_original_is_left_as_it_was():
    base = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    quantised("llama", base=base, windows=tokens(2, 32), order="shared", weights="rtn")
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())

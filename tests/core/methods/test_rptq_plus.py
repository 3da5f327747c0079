"""RPTQ+ on tiny models: what it folds changes no logit, what it stores is what it computes, every part is a switch that acts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from core.errors import BackendError, InputError
from core.evaluation.memory import measured_parts
from core.methods.rptq.plus import in_bases
from core.options import options_text, parse_options
from core.probe.plans import CELLS
from core.probe.predict import predict
from core.quant.rotated import TokenQuantizer
from core.quant.static import ActivationQuantizer
from core.recipe import PlusOptions, QuantRecipe
from kernels import Backend
from tests.core.methods.reorder_tools import IDS
from tests.core.methods.rotation_tools import W4A4, assert_same_after_saving, folded
from tests.core.probe.probe_tools import probed, recipe_of, statistics_of
from tests.core.tools import ARCHITECTURES, in_steps, quantised, relative, tiny

NONE = PlusOptions(scale=False, key_mean=False, clip=False, halfway=False, group=0, dynamic="none", rotate="none")
PARTS = {
    "scale": True, "key_mean": True, "clip": True, "halfway": True, "group": 32, "dynamic": "q", "rotate": "down_in",
}  # fmt: skip
EVERY = PlusOptions(dynamic="q+o_in", rotate="attn_in+mlp_in+down_in")


def made(architecture: str = "llama", plus: PlusOptions | None = None, **fields):
    return quantised(architecture, variant="strict", plus=plus, **fields)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [NONE, PlusOptions(rotate="none"), PlusOptions(), EVERY])
def test_what_is_folded_changes_no_logit(architecture, options):
    recipe = QuantRecipe("tiny", scheme="custom", bits=W4A4, plus=options)
    expected, model = tiny(architecture).model(IDS).logits, folded(tiny(architecture), recipe, in_bases)
    assert relative(model(IDS).logits, expected) < 1e-5
    assert relative(in_steps(model, IDS), expected) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [PlusOptions(), EVERY], ids=["default", "every"])
def test_a_cache_and_a_saved_folder_give_the_same_model(architecture, options, tmp_path):
    assert_same_after_saving(made(architecture, options), tmp_path / "q")


def test_sites_are_quantised_as_the_recipe_says():
    block = made(plus=PlusOptions()).blocks[0]
    attention, down = block.attention, block.mlp.down
    assert isinstance(attention.q_quantizer, TokenQuantizer) and isinstance(attention.k_quantizer, ActivationQuantizer)
    assert attention.rope_order is not None and attention.key_mean is not None, "keys keep their clusters"
    assert down.quantizer.block == 0 and len(down.offsets) == 4, "96 columns in groups of 32"
    assert attention.qkv.packed.dtype == torch.uint8 and attention.qkv.offsets.tolist() == [0, 32, 64]
    assert attention.qkv.quantizer.offsets.tolist() != [0, 32, 64], "the input has its own clusters"
    assert str(attention.qkv.choice.backend) == "reference" and not attention.qkv.takes_codes
    with pytest.raises(BackendError, match="activations of 8 bits"):
        attention.qkv.set_backend(Backend.INT8)
    assert block.norm1.order is not None and made(plus=EVERY).blocks[0].norm1.order is None


@pytest.mark.parametrize("part", PARTS)
def test_every_part_makes_another_model_and_another_recipe(part):
    plain, other = made(plus=NONE), made(plus=dataclasses.replace(NONE, **{part: PARTS[part]}))
    assert plain.recipe.hash != other.recipe.hash and plain.recipe.label() != other.recipe.label()
    assert relative(other.model(IDS).logits, plain.model(IDS).logits) > 1e-4
    assert QuantRecipe.from_json(other.recipe.to_json()) == other.recipe
    assert QuantRecipe.from_query(other.recipe.to_query(), default=QuantRecipe("x")).plus == other.recipe.plus
    assert parse_options("plus", options_text(other.recipe.plus), PlusOptions) == other.recipe.plus


def test_without_any_part_rptq_has_its_own_clusters_and_grids():
    """What is left is the inputs that GPTQ rounds for: weights that are rounded to nearest are RPTQ's, bit for bit."""
    plain, none = made(weights="rtn"), made(plus=NONE, weights="rtn")
    assert torch.equal(none.model(IDS).logits, plain.model(IDS).logits)
    assert measured_parts(none.model) == measured_parts(plain.model)


@pytest.mark.parametrize("architecture", ["llama", "opt", "bitnet"])
def test_the_probe_predicts_every_cell(architecture):
    loaded, probe = probed(architecture)
    recipe = recipe_of(variant="strict", scheme="W4A4", plus=PlusOptions())
    found = predict(probe, loaded.model, statistics_of(loaded.model, recipe), recipe)
    assert len(found.cells) == len(CELLS) * 2 and not found.unknown
    assert 0 < found.total < 50


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("group=20", "group is 20"),
        ("scale=2", "on or off"),
        ("dynamic=k", "'k'"),
        ("rotate=o_in", "'o_in'"),
        ("dynamic=q+down_in", "down_in is named by dynamic and by rotate"),
        ("rotate=", "use none"),
    ],
)
def test_options_that_do_not_fit_are_named(text, words):
    with pytest.raises(InputError, match=words.replace("+", r"\+")):
        parse_options("plus", text, PlusOptions)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "rotation"}, "the method rotation"),
        ({"method": "rtn"}, "the method rtn"),
        ({"variant": "official"}, "the variant official"),
        ({"segments": "pow2"}, "segments pow2"),
    ],
)
def test_recipes_that_it_does_not_go_with_are_refused(fields, words):
    with pytest.raises(InputError, match=f"RPTQ.* does not go with {words}"):
        QuantRecipe("m", plus=PlusOptions(), **fields)


def test_one_order_for_all_layers_and_weights_alone():
    shared = made(plus=PlusOptions(), order="shared")
    assert shared.blocks[0].norm1.order is None
    assert relative(in_steps(shared.model, IDS), shared.model(IDS).logits) < 1e-4
    weights = quantised("llama", plus=PlusOptions(), scheme="W4A16").blocks[0]
    assert weights.mlp.down.quantizer is None, "nothing is rotated whose input stays in float"
    assert parse_options("plus", "on", PlusOptions) == PlusOptions()
    assert "plus" not in QuantRecipe("m").to_dict(), "recipes from before keep their hash"

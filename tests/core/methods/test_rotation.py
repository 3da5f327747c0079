"""The method "rotation" on tiny models: packed, saved, loaded and decoded alike; each ingredient is a switch that acts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from core.errors import InputError
from core.evaluation.memory import kv_bytes_per_token
from core.methods import method
from core.methods.rotation.method import half_way
from core.models.tiny import tiny_model
from core.options import GROUPS, options_text, parse_options
from core.probe.plans import CELLS
from core.probe.predict import predict
from core.quant.rotated import TokenQuantizer
from core.quant.static import InputUse
from core.recipe import Bits, QuantRecipe, RotationOptions
from tests.core.methods.reorder_tools import IDS
from tests.core.methods.rotation_tools import assert_same_after_saving
from tests.core.probe.probe_tools import probed, recipe_of, statistics_of
from tests.core.tools import ARCHITECTURES, gaussian, quantised, relative, tokens

SWITCHES = {entry.name: not entry.default for entry in dataclasses.fields(RotationOptions) if isinstance(entry.default, bool)}


def made(architecture: str = "llama", **options):
    fields = {name: options.pop(name) for name in ("scheme", "variant", "weights", "layers") if name in options}
    return quantised(architecture, method="rotation", rotation=RotationOptions(**options), **fields)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kv", ["static", "token"])
def test_a_cache_and_a_saved_folder_give_the_same_model(architecture, kv, tmp_path):
    done = made(architecture, variant="strict", kv=kv)
    again = assert_same_after_saving(done, tmp_path / "q")
    spec = done.blocks[0].spec
    head = spec.head_dim // 2 + (2 if kv == "token" else 0)
    assert kv_bytes_per_token(again) == 2 * len(done.blocks) * spec.kv_heads * head, "four bits, and a scale where it is stored"


def test_weights_are_packed_in_groups_along_the_rotated_width():
    for group, groups in ((24, 4), (32, 3), (64, 2), (0, 1)):
        down = made(group=group).blocks[0].mlp.down
        assert down.packed.dtype == torch.uint8 and down.packed.shape[1] == 96 // 2
        assert down.weight_scale.shape[1] == groups


@pytest.mark.parametrize("switch", [*SWITCHES, "block", "group", "kv"])
def test_every_switch_makes_another_model_and_another_recipe(switch):
    value = (SWITCHES | {"block": 16, "group": 64, "kv": "token"})[switch]
    plain, other = made(variant="strict"), made(variant="strict", **{switch: value})
    assert plain.recipe.hash != other.recipe.hash
    assert relative(other.model(IDS).logits, plain.model(IDS).logits) > 1e-4
    assert QuantRecipe.from_json(other.recipe.to_json()) == other.recipe
    assert QuantRecipe.from_query(other.recipe.to_query(), default=QuantRecipe("x")).rotation == other.recipe.rotation
    assert parse_options("rotation", options_text(other.recipe.rotation), RotationOptions) == other.recipe.rotation


@pytest.mark.parametrize(
    ("text", "word"),
    [("group=20", "group is 20"), ("block=3", "block is 3"), ("kv=row", "kv is 'row'"), ("scale=2", "on or off"),
     ("scales=on", "scales"), ("group=x", "whole number")],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(text, word):
    with pytest.raises(InputError, match=word):
        parse_options("rotation", text, RotationOptions)


def test_options_and_variants_belong_to_their_method():
    with pytest.raises(InputError, match="belong to the method rotation, not to rptq"):
        QuantRecipe("m", rotation=RotationOptions())
    with pytest.raises(InputError, match="official belongs to the method rptq"):
        QuantRecipe("m", method="rotation", variant="official")
    link = QuantRecipe("m", method="rotation").to_query()
    assert QuantRecipe.from_query(link, default=QuantRecipe("m", variant="official")).variant == "default"
    assert "rotation" not in QuantRecipe("m").to_dict(), "recipes from before keep their hash"


def test_only_what_is_quantised_changes_its_basis():
    attention = made(scheme="W4A4KV").blocks[0].attention
    assert attention.rotates_heads and attention.key_mean is not None and attention.q_quantizer is None
    assert attention.qkv.quantizer.bits == 16 and attention.qkv.quantizer.block == 0, "the weights are quantised, rotated"
    weights = made(scheme="W4A16").blocks[0]
    assert not weights.attention.rotates_heads and weights.attention.key_mean is None, "no key is quantised"
    own = quantised("llama", method="rotation", scheme="custom", bits=Bits(k=4)).blocks[0]
    assert own.attention.rotates_heads and own.attention.qkv.quantizer is None
    assert torch.equal(own.norm1.weight, tiny_model("llama", layers=2).model.blocks[0].norm1.weight)


@pytest.mark.parametrize("switch", [True, False])
def test_the_keys_that_are_stored_have_no_mean(switch):
    base = tiny_model("opt", layers=1)
    base.model.blocks[0].attention.qkv.bias.data[64:128] += 5
    options = RotationOptions(key_mean=switch)
    block = quantised("opt", base=base, method="rotation", variant="strict", rotation=options).blocks[0]
    seen = []
    h, rotary = base.model.decoder.enter(tokens(8, 32), torch.arange(32)[None])
    with block.slots.watch(lambda site, x: seen.append(x[:, 1:].flatten(0, 1)) if site == "k" else None):
        block(h, rotary)
    distance = float((seen[0].mean(0) / seen[0].std(0)).square().mean().sqrt())
    assert distance < 0.3 if switch else distance > 1, "in standard deviations, up to the sample that the mean was taken of"


def test_the_half_way_target_is_the_solution_of_its_least_squares():
    """With λ |W' - W|² beside the squared error, λ half the mean of H's diagonal: as many more rows, √λ times the identity."""
    x, other, weight = (gaussian(*shape, seed=i).double() for i, shape in enumerate([(400, 24), (400, 24), (10, 24)]))
    x, exact = x + other, x + 1.5 * other
    hessian, shift = x.t() @ x, (exact - x).t() @ x
    damping = torch.eye(24).double() * (hessian.diagonal().mean() / 2).sqrt()
    wanted = torch.linalg.lstsq(torch.cat([x, damping]), torch.cat([(x + exact) / 2, damping]) @ weight.t()).solution.t()
    assert relative(weight + half_way(weight, hessian, shift), wanted) < 1e-9


@pytest.mark.parametrize("limits", [None, (-2.0, 3.0)])
def test_a_token_quantiser_against_its_formula(limits):
    x = gaussian(3, 5, 64)
    quantizer = TokenQuantizer(4, None, 1.0 if limits else 0.8, limits)
    found = quantizer.fake(x, InputUse(1))
    assert torch.equal(found[:, 0], x[:, 0]), "the first token stays in float"
    for row, own in zip(x[:, 1:].flatten(0, 1).double(), found[:, 1:].flatten(0, 1), strict=True):
        low, high = limits or (0.8 * float(row.min()), 0.8 * float(row.max()))
        step = (high - low) / 15
        codes = ((row / step).round() - round(low / step)).clamp(0, 15)
        assert torch.allclose(own.double(), (codes + round(low / step)) * step, atol=1e-5)
    codes, grid = quantizer.codes(x)
    assert codes.dtype == torch.int8 and torch.allclose((codes - grid.zero_point) * grid.scale, quantizer.fake(x), atol=1e-6)


def test_rows_of_zeros_and_arguments_out_of_range():
    assert not TokenQuantizer(4).fake(torch.zeros(2, 8)).any()
    for arguments in ((9,), (4, -1), (4, None, 0.0), (4, None, 1.0, (1.0, 2.0))):
        with pytest.raises(ValueError, match="quantiser"):
            TokenQuantizer(*arguments)


def test_integers_and_floats_agree_where_a_row_has_one_scale():
    base = tiny_model("llama", hidden_size=256, intermediate_size=256, layers=1)
    down = quantised("llama", base=base, method="rotation", rotation=RotationOptions(group=0)).blocks[0].mlp.down
    assert str(down.choice.backend) == "int8" and down.takes_codes
    x = gaussian(2, 7, 256)
    for use in (InputUse(), InputUse(1)):
        integer = down(x, use)
        down.set_backend("reference")
        assert relative(integer, down(x, use)) < 3e-6
        down.set_backend("auto")


@pytest.mark.parametrize("architecture", ["llama", "opt", "bitnet"])
def test_the_probe_predicts_every_cell(architecture):
    loaded, probe = probed(architecture)
    recipe = recipe_of(method="rotation", variant="strict", scheme="W4A4")
    found = predict(probe, loaded.model, statistics_of(loaded.model, recipe), recipe)
    assert len(found.cells) == len(CELLS) * 2 and not found.unknown
    assert 0 < found.total < 50


def test_planning_needs_statistics_alone():
    aims, plain = (QuantRecipe("m", method="rotation", rotation=RotationOptions(halfway=on)) for on in (True, False))
    asked = [method("rotation").uses_exact_inputs(recipe) for recipe in (aims, plain, dataclasses.replace(aims, weights="rtn"))]
    assert asked == [True, False, False]
    assert all(group % 8 == 0 for group in GROUPS), "whole bytes at every number of bits"

"""Layers with bits and clusters of their own: each layer is the one that a run with these everywhere would make."""

from __future__ import annotations

import pytest
import torch

from core.calibration.observe import embed
from core.errors import InputError
from core.evaluation.memory import kv_bytes_per_token, measured_parts, recipe_bytes
from core.evaluation.shapes import shape_of
from core.methods import method
from core.methods.sequential import _observe, run_layer
from core.models.io.quantized import load_quantized, save_quantized
from core.models.tiny import tiny_model
from core.quant.linear.quant import QuantLinear
from core.recipe import Bits, Clusters, Overrides, PlusOptions, QuantRecipe, RotationOptions
from core.stages import quantize
from tests.core.tools import in_steps, quantised, relative, spec_of, tokens

OWN = "layers.1.k=3,layers.1.weights=8,layers.2.weights.down=3,layers.2.v=16,layers.2.R5=3"
FEW = Clusters(5, 3, 3, 5, 5)
RECIPES = {
    "rptq": {"clusters": FEW},
    "official": {"variant": "official", "clusters": FEW},
    "kv": {"scheme": "W4A4KV", "clusters": FEW},
    "matched": {"method": "rtn", "variant": "matched", "clusters": FEW},
    "float": {"scheme": "custom", "bits": Bits(), "clusters": FEW},
}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two blocks hold the same tensors and bits."""
    a, b = one.state_dict(), other.state_dict()
    bits = [[m.bits for m in block.modules() if isinstance(m, QuantLinear)] for block in (one, other)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and bits[0] == bits[1]


@pytest.mark.parametrize("weights", ("rtn", "gptq"))
@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_is_that_of_a_run_with_its_bits(name, weights):
    """By hand: layer i is made by the recipe of its own, behind the layers before it."""
    base = tiny_model("llama", layers=3)
    made = quantised("llama", base=base, weights=weights, overrides=Overrides.parse(OWN), **RECIPES[name])
    recipe, model = made.recipe, base.model
    for layer in range(3):
        alone = recipe.for_layer(layer)
        assert isinstance(alone, QuantRecipe) and not alone.overrides.entries
        behind = model.with_blocks([*made.blocks[:layer], *model.blocks[layer:]])
        built = _one_layer(behind, alone, layer)
        assert same(made.blocks[layer], built), layer
    assert made.blocks[1].attention.k_quantizer.bits == 3 and made.blocks[2].mlp.down.bits == 3
    assert made.blocks[2].attention.v_quantizer is None


def _one_layer(model, recipe: QuantRecipe, layer: int) -> torch.nn.Module:
    """Quantise one layer of a model whose earlier layers are as they are."""
    planner, inputs = method(recipe.method), embed(model, tokens(8, 32))
    with torch.inference_mode():
        hidden = [item.hidden for item in inputs]
        for block in model.blocks[:layer]:
            hidden = run_layer(block, hidden, inputs)
        block = model.blocks[layer]
        stats, *_ = _observe(block, hidden, inputs, planner, recipe, lambda stage, part: None)
        return planner.apply_layer(block, planner.plan_layer(stats, recipe, block.spec), stats, recipe)[0]


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_the_first_layer_is_the_uniform_runs(architecture):
    own = Overrides.parse("layers.0=3,layers.0.R1=2")
    mixed = quantised(architecture, weights="rtn", overrides=own)
    whole = quantised(architecture, weights="rtn", scheme="custom", bits=Bits(*[3] * 9), clusters=Clusters(R1=2))
    plain = quantised(architecture, weights="rtn")
    assert same(mixed.blocks[0], whole.blocks[0]) and not same(mixed.blocks[0], plain.blocks[0])
    later = [[m.bits for m in q.blocks[1].modules() if isinstance(m, QuantLinear)] for q in (mixed, plain)]
    assert later[0] == later[1]


def test_a_layer_switched_off_is_the_float_layer():
    base = tiny_model("llama", layers=3)
    off = quantised("llama", base=base, overrides=Overrides.parse("layers.0-2=16"))
    ids = tokens(2, 19)
    assert relative(off.model(ids).logits, base.model(ids).logits) < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_model_with_layers_of_its_own_is_the_same(name, tmp_path):
    made = quantised("qwen3", layers=3, overrides=Overrides.parse(OWN), **RECIPES[name])
    save_quantized(tmp_path / "q", made.loaded, {"recipe": made.recipe.to_record()})
    back, ids = load_quantized(tmp_path / "q"), tokens(2, 21, seed=1)
    assert torch.equal(back.model(ids).logits, made.model(ids).logits)
    assert torch.equal(in_steps(back.model, ids), in_steps(made.model, ids))
    assert kv_bytes_per_token(back.model) == kv_bytes_per_token(made.model)
    assert all(same(one, other) for one, other in zip(back.model.blocks, made.blocks, strict=True))


NAMES = ("rptq", "kv", "matched", "float", "official", "plain", "rotation", "kv token", "plus", "plus by token")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_the_formula_counts_the_tensors(architecture, name):
    more = {
        "plain": {"method": "rtn", "weights": "rtn"},
        "rotation": {"method": "rotation", "variant": "strict"},
        "plus": {"variant": "strict", "plus": PlusOptions()},
        "plus by token": {"plus": PlusOptions(key_mean=False, group=0, dynamic="q+o_in+mlp_in")},
        "kv token": {"method": "rotation", "rotation": RotationOptions(kv="token", group=64)},
    }
    options = (RECIPES | more)[name]
    """The bytes of the tensors, and never fewer: zero points of 8 bits and of the official rules may turn out smaller."""
    eight = "layers.1.weights=8,"
    own = Overrides.parse("layers.0.k=3,layers.2.weights.down=3,layers.2.v=16,layers.0.weights.o=16," + eight * (name != "kv"))
    made = quantised(architecture, layers=3, overrides=own, **options)
    spec, config = spec_of(made.base), made.base.model.config
    tied, positions = bool(config.tie_word_embeddings), 0 if spec.rope else config.max_position_embeddings + 2
    shape = shape_of(spec, 3, config.vocab_size, tied=tied, positions=positions)
    stored, cached = recipe_bytes(shape, made.recipe)
    assert cached == kv_bytes_per_token(made.model)
    found = sum(measured_parts(made.model).values())
    assert found <= stored <= 1.02 * found
    narrow = [m.weight_zero.dtype == torch.int8 for block in made.blocks for m in block.linears().values() if m.bits == 8]
    assert stored == found or name == "official" or any(narrow)


def test_a_layer_that_is_not_there_is_refused():
    base = tiny_model("llama")
    recipe = QuantRecipe(base.name, overrides=Overrides.parse("layers.2.k=3"))
    with pytest.raises(InputError, match="layers 0 to 1") as caught:
        quantize(base, recipe)
    assert caught.value.code == "E-PARAM-OVERRIDES"

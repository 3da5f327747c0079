"""Changes of basis leave the logits alone, prefill and decoding with a cache; those that would not are refused."""

from __future__ import annotations

import pytest
import torch

from core.methods.rotation.fold import Basis, fold_scales
from core.models.tiny import tiny_model
from core.recipe import RotationOptions
from tests.core.methods.reorder_tools import IDS
from tests.core.methods.rotation_tools import rotated
from tests.core.tools import ARCHITECTURES, gaussian, in_steps, relative, spec_of, tiny

SAME = 1e-5


OPTIONS = {
    "all": RotationOptions(),
    "scale": RotationOptions(rotate=False, key_mean=False),
    "rotate": RotationOptions(scale=False, key_mean=False),
    "key_mean": RotationOptions(scale=False, rotate=False),
    "blocks": RotationOptions(block=32),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_change_of_basis_changes_no_logit(architecture, name):
    loaded = tiny(architecture)
    expected, model = loaded.model(IDS).logits, rotated(loaded, OPTIONS[name])
    assert relative(model(IDS).logits, expected) < SAME
    assert relative(in_steps(model, IDS), expected) < SAME


@pytest.mark.parametrize(
    "options",
    [{"num_key_value_heads": 8}, {"num_key_value_heads": 1}, {"head_dim": 24}, {"attention_bias": True, "mlp_bias": True}],
    ids=lambda o: ",".join(o),
)
def test_other_shapes_of_llama(options):
    loaded = tiny_model("llama", **options)
    assert relative(rotated(loaded, RotationOptions())(IDS).logits, loaded.model(IDS).logits) < SAME


def test_an_activation_that_does_not_commute_keeps_its_channels():
    loaded = tiny_model("opt", activation_function="gelu")
    assert relative(rotated(loaded, RotationOptions())(IDS).logits, loaded.model(IDS).logits) < SAME


@pytest.mark.parametrize(
    ("architecture", "overrides", "scales", "values", "why"),
    [
        ("llama", {}, {"k": lambda s: torch.rand(s.kv_heads, s.head_dim) + 1}, False, "rotation by position"),
        ("qwen3", {}, {"k": lambda s: (torch.arange(s.kv_heads) + 1.0)[:, None].expand(-1, s.head_dim)}, False, "norm of keys"),
        ("bitnet", {}, {"v": lambda s: torch.ones(s.kv_heads, s.head_dim)}, False, "between v and o"),
        ("bitnet", {}, {}, True, "between v and o"),
        ("llama", {}, {"o_in": lambda s: torch.ones(s.width("o_in"))}, False, "scaled with v"),
        ("opt", {"activation_function": "gelu"}, {"down_in": lambda s: torch.ones(s.ffn)}, False, "gelu"),
        ("llama", {}, {"attn_in": lambda s: torch.zeros(s.hidden)}, False, "above 0"),
        ("llama", {}, {"attn_in": lambda s: torch.ones(s.hidden + 1)}, False, "finite numbers"),
        ("llama", {}, {"mlp_in": lambda s: torch.full((s.hidden,), torch.inf)}, False, "finite numbers"),
        ("llama", {}, {"q": lambda s: torch.ones(s.width("q"))}, False, "scale of q"),
    ],
)
def test_what_would_change_the_function_is_refused(architecture, overrides, scales, values, why):
    loaded = tiny_model(architecture, **overrides)
    made = {site: make(spec_of(loaded)) for site, make in scales.items()}
    with pytest.raises(ValueError, match=why):
        fold_scales(loaded.model.blocks[0], made, rotate_values=values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_float_block_is_not_changed(architecture):
    loaded = tiny_model(architecture)
    before = loaded.model(IDS).logits.clone()
    rotated(loaded, RotationOptions())
    assert torch.equal(loaded.model(IDS).logits, before)


def test_a_basis_is_undone():
    x = gaussian(5, 96)
    for basis in (Basis(), Basis(x[0].abs() + 0.1), Basis(None, 32, x[1]), Basis(x[0].abs() + 0.1, 0, x[1])):
        assert relative(basis.back(basis.to(x)), x) < 1e-6
        weight = gaussian(7, 96, seed=1)
        mean = 0 if basis.mean is None else basis.mean
        assert relative((basis.to(x) + mean) @ basis.weight(weight).t(), x @ weight.t()) < 1e-6

"""Every adapter names modules that exist and describes the layer that transformers builds; others are refused in a sentence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from core.errors import ModelError
from core.models.architectures import ADAPTERS, adapter_for, supported_model_types
from core.models.decoder import CausalModel
from core.models.tiny import tiny_model, tiny_transformers
from core.recipe import SITES
from tests.core.tools import ARCHITECTURES, spec_of, tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paths_resolve(architecture):
    loaded = tiny_model(architecture, layers=3)
    adapter, spec = loaded.adapter, spec_of(loaded)
    layers = adapter.decoder_layers(tiny_transformers(architecture, layers=3))
    assert isinstance(layers, nn.ModuleList) and len(layers) == 3
    width = {"q": spec.heads * spec.head_dim, "k": spec.kv_heads * spec.head_dim, "v": spec.kv_heads * spec.head_dim}
    for layer in layers:
        for name, out in width.items():
            assert layer.get_submodule(getattr(adapter, name)).weight.shape == (out, spec.hidden)
        assert layer.get_submodule(adapter.o).weight.shape == (spec.hidden, spec.width("o_in"))
        for path in adapter.mlp_in:
            assert layer.get_submodule(path).weight.shape == (spec.ffn, spec.hidden)
        assert layer.get_submodule(adapter.down).weight.shape == (spec.hidden, spec.ffn)
        for path in (adapter.norm1, adapter.norm2):
            assert layer.get_submodule(path).weight.shape == (spec.hidden,)
        if spec.sub_norms:
            assert layer.get_submodule(adapter.attn_sub_norm).weight.shape == (spec.width("o_in"),)
            assert layer.get_submodule(adapter.ffn_sub_norm).weight.shape == (spec.ffn,)
        for path in filter(None, (adapter.q_norm, adapter.k_norm)):
            assert layer.get_submodule(path).weight.shape == (spec.head_dim,)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_weight_of_a_layer_is_left_out(architecture):
    """A parameter that no path covers would silently not be carried into the block."""
    loaded = tiny_model(architecture)
    adapter = loaded.adapter
    paths = [adapter.norm1, adapter.norm2, adapter.q, adapter.k, adapter.v, adapter.o, *adapter.mlp_in, adapter.down]
    paths += [p for p in (adapter.q_norm, adapter.k_norm, adapter.attn_sub_norm, adapter.ffn_sub_norm) if p]
    covered = {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}
    for name, _ in adapter.decoder_layers(tiny_transformers(architecture))[0].named_parameters():
        assert name in covered, f"{name} is not part of the block"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spec_describes_the_layer(architecture):
    loaded = tiny_model(architecture)
    spec, config = spec_of(loaded), loaded.model.config
    assert (spec.hidden, spec.heads, spec.head_dim) == (config.hidden_size, config.num_attention_heads, 16)
    assert spec.groups * spec.kv_heads == spec.heads and spec.groups == (1 if architecture == "opt" else 4)
    assert spec.norm == ("layer" if architecture == "opt" else "rms") and spec.gated == (architecture != "opt")
    assert spec.rope == (architecture != "opt") and spec.qk_norm == (architecture == "qwen3")
    assert spec.sub_norms == (architecture == "bitnet")
    layer = loaded.adapter.decoder_layers(tiny_transformers(architecture))[0]
    norm = layer.get_submodule(loaded.adapter.norm1)
    assert spec.eps == getattr(norm, "eps", None) or spec.eps == norm.variance_epsilon
    assert [spec.width(s) for s in SITES] == [
        spec.hidden,
        spec.heads * 16,
        spec.kv_heads * 16,
        spec.kv_heads * 16,
        spec.heads * 16,
        spec.hidden,
        spec.ffn,
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.hidden = 1


def test_widths_come_from_the_configuration():
    spec = spec_of(tiny_model("llama", head_dim=32, num_key_value_heads=4, intermediate_size=80, rms_norm_eps=0.01))
    assert (spec.head_dim, spec.kv_heads, spec.groups, spec.ffn, spec.eps) == (32, 4, 2, 80, 0.01)
    assert spec.width("q") == 256 and spec.width("k") == 128, "head_dim is not always hidden / heads"


def test_every_model_type_has_one_adapter():
    kinds = supported_model_types()
    assert len(kinds) == len(set(kinds)) and {"opt", "llama", "mistral", "qwen2", "qwen3", "bitnet"} <= set(kinds)
    assert all(adapter.name and adapter.norm in ("rms", "layer") for adapter in ADAPTERS)


@pytest.mark.parametrize(
    "config",
    [AutoConfig.for_model("gpt2"), AutoConfig.for_model("bloom"), PreTrainedConfig(), AutoConfig.for_model("mixtral"), object()],
    ids=("gpt2", "bloom", "none", "mixtral", "not a config"),
)
def test_an_unknown_architecture_is_one_sentence(config):
    with pytest.raises(ModelError) as caught:
        adapter_for(config)
    message = str(caught.value)
    assert caught.value.code == "E-MODEL-ARCH" and 30 < len(message) < 240 and "\n" not in message
    assert "llama" in message and "opt" in message, "it names what would work"


def test_a_post_norm_opt_is_refused():
    """opt-350m: a permutation behind a norm that is added to the residual cannot be folded."""
    config = AutoConfig.for_model("opt", do_layer_norm_before=False)
    with pytest.raises(ModelError, match="opt-125m") as caught:
        adapter_for(config)
    assert caught.value.code == "E-MODEL-ARCH" and len(str(caught.value)) < 240


@pytest.mark.parametrize("architecture", ("llama", "qwen3"))
def test_partial_rotary_positions_are_refused_or_right(architecture):
    """A configuration that rotates only a part of each head must not be computed as if it rotated all of it."""
    config = tiny_model(architecture).model.config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    try:
        adapter = adapter_for(config)
    except ModelError:
        return
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    expected = model(tokens(1, 9)).logits
    assert torch.allclose(CausalModel.from_transformers(model, adapter)(tokens(1, 9)).logits, expected, atol=1e-4)

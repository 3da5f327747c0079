"""Every adapter names modules that exist and describes the layer that transformers builds; others are refused in a sentence."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from core.errors import ModelError
from core.models.adapter import ModelAdapter
from core.models.architectures import ADAPTERS, adapter_for, supported_model_types
from core.models.convert import EXPERTS
from core.models.decoder import CausalModel
from core.models.io.preflight.config import check_architecture
from core.models.tiny import CONFIGS as TINY
from core.models.tiny import tiny_architectures, tiny_model, tiny_transformers
from core.recipe import SITES
from tests.core.models.variants import VARIANTS
from tests.core.tools import ARCHITECTURES, relative, spec_of, tokens

OF_NORMS = ("norm1", "norm2", "post_norm1", "post_norm2", "attn_sub_norm", "ffn_sub_norm", "q_norm", "k_norm")


def paths_of(adapter: ModelAdapter) -> list[str]:
    """Every module of a layer that an adapter names."""
    norms = [getattr(adapter, name) for name in OF_NORMS]
    return [*filter(None, norms), *adapter.qkv, adapter.o, *adapter.mlp_in, adapter.down]


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_paths_resolve(architecture):
    source = tiny_transformers(architecture)
    adapter = adapter_for(source.config)
    layers, spec = adapter.decoder_layers(source), adapter.spec(source.config)
    assert isinstance(layers, nn.ModuleList) and len(layers) == 2
    wide = {"q_norm": "q", "k_norm": "k"} if spec.wide_qk_norm else {}
    width = {"attn_sub_norm": spec.width("o_in"), "ffn_sub_norm": spec.ffn} | {n: spec.width(s) for n, s in wide.items()}
    width |= {name: spec.head_dim for name in ("q_norm", "k_norm") if name not in wide}

    def rows(paths: tuple[str, ...], layer: nn.Module) -> int:
        return sum(layer.get_submodule(path).weight.numel() for path in paths) // spec.hidden

    for layer in layers:
        assert rows(adapter.qkv, layer) == spec.width("q") + spec.width("k") + spec.width("v")
        assert rows((adapter.o,), layer) == spec.width("o_in")
        if spec.experts:
            mlp = layer.get_submodule(EXPERTS)
            assert mlp.gate.weight.shape == (spec.experts, spec.hidden)
            assert mlp.experts.gate_up_proj.shape == (spec.experts, 2 * spec.ffn, spec.hidden)
            assert mlp.experts.down_proj.shape == (spec.experts, spec.hidden, spec.ffn)
        else:
            assert rows(adapter.mlp_in, layer) == spec.ffn * (1 + spec.gated)
            assert rows((adapter.down,), layer) == spec.ffn
        for name in OF_NORMS:
            if (path := getattr(adapter, name)) is not None:
                assert layer.get_submodule(path).weight.shape == (width.get(name, spec.hidden),)


@pytest.mark.parametrize(("name", "architecture", "fields"), VARIANTS, ids=[v[0].replace(" ", "_") for v in VARIANTS])
def test_no_weight_of_a_layer_is_left_out(name, architecture, fields):
    """A parameter that no path covers would silently not be carried into the block."""
    source = tiny_transformers(architecture, **fields)
    adapter = adapter_for(source.config)
    covered = {f"{path}.{leaf}" for path in paths_of(adapter) for leaf in ("weight", "bias")}
    if adapter.experts is not None:
        covered |= {f"{EXPERTS}.{leaf}" for leaf in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")}
    for layer in adapter.decoder_layers(source):
        assert {name for name, _ in layer.named_parameters()} <= covered


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
    assert len(kinds) == len(set(kinds)) == 23 and {"opt", "llama", "mistral", "qwen2", "qwen3", "bitnet"} <= set(kinds)
    assert all(adapter.name and adapter.norm in ("rms", "layer") for adapter in ADAPTERS)


@pytest.mark.parametrize(
    "config",
    [AutoConfig.for_model("gptj"), AutoConfig.for_model("bloom"), PreTrainedConfig(), AutoConfig.for_model("phimoe"), object()],
    ids=("gptj", "bloom", "none", "phimoe", "not a config"),
)
def test_an_unknown_architecture_is_one_sentence(config):
    with pytest.raises(ModelError) as caught:
        adapter_for(config)
    message = str(caught.value)
    assert caught.value.code == "E-MODEL-ARCH" and 30 < len(message) < 240 and "\n" not in message
    assert "llama" in message and "opt" in message, "it names what would work"


@pytest.mark.parametrize(
    "kind",
    (
        *("qwen2_moe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3", "llama4_text"),
        *("gemma3n_text", "gemma3", "mistral3", "qwen3_next", "falcon_h1", "mamba", "gpt_neo", "gptj"),
        *("bloom", "mpt", "codegen", "phi", "cohere", "cohere2", "olmo", "glm4", "starcoder2", "nemotron"),
    ),
)
def test_other_architectures_are_refused_by_name(kind):
    with pytest.raises(ModelError, match=f"^Architecture '{kind}' has no adapter: use one of [^.]+[.]$") as caught:
        adapter_for(AutoConfig.for_model(kind))
    assert caught.value.code == "E-MODEL-ARCH" and len(str(caught.value)) <= 240


def test_layers_of_linear_attention_are_named():
    """As Qwen3.5 is published: the text model is described inside the whole one."""
    config = {"model_type": "qwen3_5", "text_config": {"layer_types": ["linear_attention", "full_attention"]}}
    with pytest.raises(ModelError, match="'qwen3_5' .* layer_types name 'linear_attention'") as caught:
        check_architecture(config)
    assert caught.value.code == "E-MODEL-ARCH" and len(str(caught.value)) <= 240


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "factor softcap the value 0.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0"),
        ("granite", {"logits_scaling": 0.0}, "factor logits the value 0.0"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}, "3 no_rope_layers for 2 layers"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention'"),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "llama_4_scaling_beta": 2}}, "beta = 2 "),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": -1.0,
                                            "original_max_position_embeddings": 16}}, "llama_4_scaling_beta = -1.0"),
        *((kind, {"head_dim": 8}, "head_dim = 8") for kind in ("bitnet", "gpt2", "gpt_neox", "opt", "stablelm")),
        ("falcon", {"alibi": True}, "alibi = True"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn = 3"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "without parallel_attn"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False, "num_ln_in_parallel_attn": 1}, "parallel_attn"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 of 5 experts"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "0 of 6 experts"),
        ("olmoe", {"num_experts": 2048}, "2 of 2048 experts"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "= 0.2"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_field_that_is_not_covered_is_refused_by_name(architecture, fields, named):
    config = AutoConfig.for_model(architecture, **{**TINY[architecture], "num_hidden_layers": 2, **fields})
    with pytest.raises(ModelError, match=f"^config.json [^.]*{re.escape(named)}") as caught:
        adapter_for(config)
    assert caught.value.code == "E-MODEL-ARCH" and len(str(caught.value)) <= 240


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


@pytest.mark.parametrize("stray", ({"num_key_value_heads": 4}, {"num_kv_heads": 2}, {"sliding_window": 4}), ids=str)
@pytest.mark.parametrize("architecture", [a for a in tiny_architectures() if a != "smollm"])
@torch.inference_mode()
def test_a_field_of_other_architectures_has_the_effect_that_it_has_in_transformers(architecture, stray):
    """Often none: a name that some architectures read must not be read for the others."""
    source, ids = tiny_transformers(architecture, **stray), tokens(1, 40)
    made = CausalModel.from_transformers(source, adapter_for(source.config))
    assert relative(made(ids).logits, source(ids).logits) < 1e-5

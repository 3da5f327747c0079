"""Sizes by name, by numbers, and from configurations: against parameters that transformers counts, without any weight."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.errors import InputError, ModelError
from core.evaluation.describe import model_info
from core.evaluation.shapes import SHAPES, Shape, config_shape, find_shape, model_shape, shape_of, shape_of_loaded
from core.models.io.quantized import parameters_of
from core.models.tiny import save_tiny
from tests.core.models.io.fake_hub import FakeHub, serve
from tests.core.tools import ARCHITECTURES, spec_of, tiny


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_of_a_shape_are_those_of_the_model(architecture):
    """Up to small vectors the formula leaves out: biases of q, k, v (Qwen2), norms per head (Qwen3), sub-norms (BitNet)."""
    loaded = tiny(architecture)
    spec, config = spec_of(loaded), loaded.model.config
    positions = 0 if spec.rope else config.max_position_embeddings + 2
    found = shape_of(spec, 2, 259, tied=bool(config.tie_word_embeddings), positions=positions).parameters
    left_out = {
        "qwen2": 2 * (spec.width("q") + 2 * spec.width("k")),
        "qwen3": 2 * 2 * spec.head_dim,
        "bitnet": 2 * (spec.width("o_in") + spec.ffn),
    }.get(architecture, 0)
    assert found == parameters_of(loaded.model) - left_out
    info = model_info(loaded, 0.0)
    assert (info.gated, info.tied) == (spec.gated, bool(config.tie_word_embeddings)) and info.positions == positions
    assert shape_of_loaded(info) == shape_of(spec, 2, info.vocab, tied=info.tied, positions=positions)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("hidden=10,heads=3", "hidden=10 is not a multiple of heads=3"),
        ("hidden=12,heads=3,kv_heads=2", "heads=3 is not a .*kv_heads=2"),
    ],
)
def test_numbers_that_do_not_divide_are_named(text, rule):
    with pytest.raises(InputError, match=f"^{rule}: choose") as caught:
        find_shape(f"layers=2,{text}")
    assert caught.value.code == "E-PARAM-MODEL"
    assert find_shape("layers=2,hidden=10,heads=3,head_dim=4").head_dim == 4


@pytest.mark.parametrize(
    "text, hidden",
    [
        ("OPT-13B", 5120),
        ("facebook/opt-13b", 5120),
        (" opt-1.3b ", 2048),
        ("layers=2,hidden=64,heads=4", 64),
        ("hidden=64, heads=4, layers=2, ffn=99, vocab=5", 64),
    ],
)
def test_shapes_by_name_and_by_numbers(text, hidden):
    assert find_shape(text).hidden == hidden


def test_own_shapes_have_opts_defaults():
    shape = find_shape("layers=2,hidden=64,heads=4")
    assert (shape.kv_heads, shape.head_dim, shape.ffn, shape.vocab) == (4, 16, 256, 50272)


@pytest.mark.parametrize(
    "text",
    (
        "",
        "opt-9b",
        "layers=2",
        "layers=2,hidden=64",
        "layers=0,hidden=64,heads=4",
        "layers=-1,hidden=64,heads=4",
        "layers=2,hidden=65,heads=4",
        "layers=2,hidden=64,heads=4,depth=3",
        "layers=1e3,hidden=64,heads=4",
        "layers=٣,hidden=64,heads=4",
        "=",
        ",",
        "layers=99999999999,hidden=64,heads=4",
        "x" * 500,
    ),
)
def test_unknown_shapes_are_refused(text):
    with pytest.raises(InputError) as caught:
        find_shape(text)
    assert caught.value.code == "E-PARAM-MODEL" and len(str(caught.value)) <= 240


FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 32},
    "gemma": {"head_dim": 32, "num_key_value_heads": 1},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 300},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 8},
    "gpt_neox": {},
    "gptj": {"n_embd": 128, "n_layer": 3, "n_head": 8, "rotary_dim": 16},
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 300},
    "phi": {},
    "starcoder2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 44, "head_dim": 32},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
}
COMMON = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 128, "intermediate_size": 300, "vocab_size": 1000}
RENAMED = {"gpt2", "gptj"}
"""Their classes take the common names for attributes, and write others."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_raw_configuration_gives_the_parameters_that_transformers_builds(family):
    """Up to small vectors: biases and norms of single families, at most 2 % here and far less at real widths."""
    fields = {"vocab_size": 1000} if family in RENAMED else COMMON
    config = AutoConfig.for_model(family, **(fields | FAMILIES[family]))
    with torch.device("meta"):
        counted = parameters_of(AutoModelForCausalLM.from_config(config))
    for raw in (config.to_diff_dict(), config.to_dict()):  # as files are written, and with every default
        shape = config_shape(json.loads(json.dumps(raw)))
        assert shape.parameters == pytest.approx(counted, rel=0.02), shape
        assert (shape.layers, shape.hidden, shape.heads, shape.vocab) == (3, 128, 8, 1000)
        assert (shape.experts, shape.top_k) == ((6, 3) if "num_experts_per_tok" in FAMILIES[family] else (0, 0))


def test_text_inside_a_model_that_reads_images_is_counted():
    text = AutoConfig.for_model("llama", **COMMON).to_dict()
    assert config_shape({"model_type": "llava", "text_config": text}) == config_shape(text)


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"num_local_experts": 8}, "E-MODEL-ARCH", "num_local_experts = 8"),
        ({"kv_lora_rank": 512}, "E-MODEL-ARCH", "kv_lora_rank"),
        ({"model_type": "mixtral"}, "E-MODEL-BAD", "no num_experts:"),
        ({"model_type": "olmoe", "num_experts": 8}, "E-MODEL-BAD", "no num_experts_per_tok"),
        ({"model_type": "mixtral", "num_experts": "8"}, "E-MODEL-BAD", "num_experts = 8"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "E-MODEL-ARCH", "some layers only"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "E-MODEL-ARCH", "some layers only"),
        ({"is_encoder_decoder": True}, "E-MODEL-ARCH", "is_encoder_decoder"),
        ({"hidden_size": None}, "E-MODEL-BAD", "hidden_size"),
        ({"num_hidden_layers": 10**6}, "E-MODEL-SIZE", "num_hidden_layers"),
        ({"intermediate_size": "9" * 99}, "E-MODEL-BAD", "intermediate_size"),
        ({"intermediate_size": None, "n_inner": 2.5}, "E-MODEL-BAD", "n_inner = 2.5"),
        ({"num_attention_heads": 7}, "E-MODEL-BAD", "7 heads"),
    ],
)
def test_configurations_that_are_not_counted_say_why(change, code, word):
    with pytest.raises(ModelError, match=word) as caught:
        fields = AutoConfig.for_model("llama", **COMMON).to_dict() | change
        config_shape({name: value for name, value in fields.items() if value is not None})
    assert caught.value.code == code and len(str(caught.value)) <= 240


def test_a_model_is_found_by_folder_by_file_and_on_the_hub(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model", "llama")
    shape = model_shape(str(folder))
    assert shape == shape_of_loaded(model_info(tiny("llama"), 0.0)) == model_shape(str(folder / "config.json"))
    with pytest.raises(InputError):
        model_shape(str(folder), allow_local=False)
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    config = (folder / "config.json").read_bytes()
    with serve(FakeHub({"config.json": config, "model.safetensors": b"x" * 999})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        assert model_shape("owner/name", allow_local=False) == shape
        assert not any("safetensors" in path for _, path, _ in hub.requests), "no weight is asked for"
        hub.files = {"config.json": b"[" * (2**20 + 1)}
        with pytest.raises(ModelError, match="bytes") as caught:
            model_shape("owner/name")
        assert caught.value.code == "E-MODEL-SIZE"
        hub.files = {"model.safetensors": b""}
        with pytest.raises(ModelError, match=r"no config\.json"):
            model_shape("owner/name")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError) as caught:
        model_shape("owner/name")
    assert caught.value.code == "E-MODEL-OFFLINE"


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_shapes(name):
    assert isinstance(find_shape(name), Shape) and model_shape(name.upper()) == SHAPES[name]

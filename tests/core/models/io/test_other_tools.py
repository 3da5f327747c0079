"""Checkpoints of other quantisation tools are named as what they are, by each sign they carry; integers are never weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ModelError
from core.models.io.load import load_model
from core.models.io.preflight.config import check_config
from core.models.io.preflight.folder import check_folder
from core.models.tiny import save_tiny
from tests.core.models.io.malformed import LLAMA, good_safetensors, write_folder

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("m") / "llama", "llama", seed=3)


@pytest.fixture
def changed(saved, tmp_path):
    """A copy of the model with tensors, configuration or side files changed."""
    def make(tensors=None, config=None, files=()) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in saved.iterdir():
            if path.name != "manifest.json":
                (folder / path.name).write_bytes(path.read_bytes())
        if tensors:
            state = load_file(folder / "model.safetensors")
            tensors(state)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stated | (config or {})))
        for name in files:
            (folder / name).write_text("{}")
        return folder
    return make


def replaced(**parts: torch.Tensor):
    """Put other tensors in the place of one weight, by their last name."""
    def change(state: dict[str, torch.Tensor]) -> None:
        del state[f"{UP}.weight"]
        state.update({f"{UP}.{name}": tensor.clone() for name, tensor in parts.items()})
    return change


INTS, HALVES = torch.ones(8, 96, dtype=torch.int32), torch.ones(4, 96, dtype=torch.float16)
BYTES = torch.ones(96, 32, dtype=torch.uint8)


def sign(**options):
    """Options of `changed`."""
    return options


SIGNS = {
    "GPTQ": [sign(config={"quantization_config": {"quant_method": "gptq", "bits": 4}}), sign(files=["quantize_config.json"]),
             sign(tensors=replaced(qweight=INTS, qzeros=INTS, scales=HALVES, g_idx=torch.zeros(64, dtype=torch.int32)))],
    "AWQ": [sign(config={"quantization_config": {"quant_method": "awq", "bits": 4}}), sign(files=["quant_config.json"]),
            sign(tensors=replaced(qweight=INTS, qzeros=INTS, scales=HALVES))],
    "MLX": [sign(config={"quantization": {"group_size": 64, "bits": 4}}),
            sign(config={"quantization_config": {"group_size": 64, "bits": 4}, "quantization": {"group_size": 64, "bits": 4}}),
            sign(tensors=replaced(weight=torch.ones(96, 8, dtype=torch.uint32), scales=HALVES, biases=HALVES))],
    "NVIDIA ModelOpt": [sign(files=["hf_quant_config.json"]), sign(config={"quantization_config": {"quant_method": "modelopt"}})],
    "compressed-tensors": [sign(config={"quantization_config": {"quant_method": "compressed-tensors"}}),
                           sign(config={"compression_config": {"format": "pack-quantized"}}),
                           sign(tensors=replaced(weight_packed=INTS, weight_scale=HALVES))],
    "HQQ": [sign(config={"quantization_config": {"quant_method": "hqq"}}), sign(tensors=replaced(W_q=BYTES, meta=HALVES))],
    "bitsandbytes": [sign(config={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
                     sign(tensors=replaced(**{"weight.absmax": HALVES, "weight": BYTES})),
                     sign(tensors=replaced(SCB=HALVES, weight=BYTES.to(torch.int8)))],
    "FBGEMM FP8": [sign(config={"quantization_config": {"quant_method": "fbgemm_fp8"}})],
    "FP8": [sign(config={"quantization_config": {"quant_method": "fp8"}}),
            sign(tensors=replaced(weight=torch.ones(96, 64).to(torch.float8_e4m3fn), weight_scale=torch.ones(1))),
            sign(tensors=replaced(weight=torch.ones(96, 64).to(torch.float8_e4m3fn), weight_scale_inv=torch.ones(1)))],
    "sometool": [sign(config={"quantization_config": {"quant_method": "sometool"}})],
}


@pytest.mark.parametrize(("tool", "index"), [(tool, index) for tool, signs in SIGNS.items() for index in range(len(signs))])
def test_each_sign_names_its_tool(changed, tool, index):
    with pytest.raises(ModelError) as caught:
        load_model(str(changed(**SIGNS[tool][index])))
    sentence = str(caught.value)
    assert f" {tool} checkpoint" in sentence and "original float model" in sentence and "ownload" not in sentence
    assert caught.value.code == "E-MODEL-BAD" and len(sentence) <= 240


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_integers_and_eight_bit_floats_are_no_weights(changed, dtype, name):
    """transformers would take them as numbers: a model of whole numbers, and nonsense."""
    folder = changed(tensors=lambda state: state.update({name: state[name].mul(50).to(dtype)}))
    with pytest.raises(ModelError, match="without a scale") as caught:
        load_model(str(folder))
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_ternary_folders_may_pack_the_projections_alone(changed, name):
    ternary = {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}}
    folder = changed(tensors=lambda state: state.update({name: state[name].to(torch.uint8)}), config=ternary)
    with pytest.raises(ModelError, match=name):
        check_folder(folder)


def test_an_unnamed_tool_is_still_a_tool(tmp_path):
    config = LLAMA | {"quantization_config": {"something": 1}}
    with pytest.raises(ModelError, match="by a tool that is not named"):
        check_folder(write_folder(tmp_path / "m", config=config, weights=good_safetensors()))


@pytest.mark.parametrize(("field", "value"), [
    ("partial_rotary_factor", 0.5), ("logit_scale", 0.0625), ("residual_multiplier", 0.22), ("embedding_multiplier", 12),
    ("attention_multiplier", 0.01), ("attention_multiplier", 1.0), ("final_logit_softcapping", 30.0), ("clip_qkv", 8.0),
    ("num_experts", 8),
    ("num_local_experts", 4), ("use_parallel_residual", True), ("scale_emb", 12), ("no_rope_layers", [1, 0])])
def test_fields_that_would_change_the_model_are_named(field, value):
    for neutral in (None, 0, False):
        check_config(LLAMA | {field: neutral})
    if field in ("partial_rotary_factor", "logit_scale", "residual_multiplier", "embedding_multiplier"):
        check_config(LLAMA | {field: 1.0})
    with pytest.raises(ModelError, match=field) as caught:
        check_config(LLAMA | {field: value})
    assert caught.value.code == "E-MODEL-ARCH"


def test_fields_that_an_architecture_reads_are_accepted():
    for kind, fields in {
        "granite": {"embedding_multiplier": 12, "attention_multiplier": 0.01, "residual_multiplier": 0.2, "logits_scaling": 8},
        "gemma2": {"query_pre_attn_scalar": 224, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True},
        "smollm3": {"no_rope_layers": [1, 0]},
    }.items():
        check_config(LLAMA | {"model_type": kind} | fields)
        with pytest.raises(ModelError, match="clip_qkv"):
            check_config(LLAMA | {"model_type": kind, "clip_qkv": 8.0} | fields)


def test_a_part_of_a_head_that_is_rotated_is_refused_where_it_is_stated():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    for key in ("rope_parameters", "rope_scaling"):
        with pytest.raises(ModelError, match="partial_rotary_factor"):
            check_config(LLAMA | {key: rope})

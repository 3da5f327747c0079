"""Packed checkpoints with a part missing, of another size or with settings that are not read are refused in one sentence."""

from __future__ import annotations

import json

import pytest
import torch

from core.errors import ModelError
from core.models.io.load import load_model
from core.models.tiny import save_tiny
from tests.core.models.io.packed_files import awq, four_bits, fp8, gptq, int8_rows, mlx, write_packed

UP = "model.layers.1.mlp.up_proj"
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
MLX = {"quantization": {"group_size": 32, "bits": 4}}
BNB = {"quantization_config": {"quant_method": "bitsandbytes"}}


def without(*parts):
    return lambda state: [state.pop(f"{UP}.{part}") for part in parts]


def replaced(part, change):
    return lambda state: state.update({f"{UP}.{part}": change(state[f"{UP}.{part}"]).contiguous()})


def added(name, tensor):
    return lambda state: state.update({name: tensor})


def altered(method, **settings):
    return {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 32, **settings}}


NF4 = "weight.quant_state.bitsandbytes__nf4"
STATE = {"quant_type": "nf4", "blocksize": 64, "shape": [96, 64]}


def state_of(**facts):
    return replaced(NF4, lambda t: torch.tensor(list(json.dumps(STATE | facts).encode()), dtype=torch.uint8))


def plain(n, k, random):
    return {"weight": torch.ones(n, k)}, torch.ones(n, k)


CASES = {
    "a scale is missing": (gptq(4, 32), GPTQ, without("scales"), (UP, "GPTQ", "scales is missing")),
    "zero points are missing": (awq(32), AWQ, without("qzeros"), (UP, "AWQ", "qzeros is missing")),
    "scales of another group size": (gptq(4, 16), GPTQ, None, ("qzeros is I32 [6, 8], not I32/U32 [3, 8]",)),
    "codes of other bits": (gptq(2, 32), GPTQ, None, ("qweight is I32 [6, 64], not I32/U32 [12, 64]",)),
    "codes cut": (gptq(4, 32), GPTQ, replaced("qweight", lambda t: t[:-1]), (UP, "qweight", "not I32/U32 [8, 96]")),
    "scales of integers": (gptq(4, 32), GPTQ, replaced("scales", lambda t: t.to(torch.int32)), ("scales is I32", "not F64")),
    "no order": (gptq(4, 32), altered("gptq", desc_act=True), None, ("g_idx is missing",)),
    "an impossible order": (gptq(4, 32, order=True), GPTQ, replaced("g_idx", lambda t: t + 1), ("group 2 of 2", UP)),
    "a negative order": (gptq(4, 32, order=True), GPTQ, replaced("g_idx", lambda t: t - 1), ("group", UP)),
    "5 bits": (gptq(4, 32), altered("gptq", bits=5), None, ("bits = 5", "2, 3, 4, 8", "GPTQ")),
    "bits in words": (gptq(4, 32), altered("gptq", bits="4"), None, ("bits = 4",)),
    "no bits": (gptq(4, 32), altered("gptq", bits=None), None, ("bits = None",)),
    "a group of 0": (gptq(4, 32), altered("gptq", group_size=0), None, ("group_size = 0",)),
    "marlin": (gptq(4, 32), altered("gptq", checkpoint_format="marlin"), None, ("marlin", "gptq_v2")),
    "settings of single layers": (gptq(4, 32), altered("gptq", dynamic={"+:.*": {"bits": 8}}), None, ("single layers",)),
    "gemv": (awq(32), altered("awq", version="GEMV"), None, ("version gemv", "gemm")),
    "a block scale is missing": (fp8("weight_scale_inv", 32, 32), BLOCKS, without("weight_scale_inv"), (UP, "is missing")),
    "blocks of another size": (
        fp8("weight_scale_inv", 16, 32), BLOCKS, None, ("weight_scale_inv is F32 [4, 3], not F64/F32/F16/BF16 [2, 3]",)),
    "blocks that are no numbers": (
        fp8("weight_scale_inv", 32, 32), altered("fp8", weight_block_size=[0, 32]), None, ("weight_block_size [0, 32]",)),
    "MLX biases are missing": (mlx(4, 32), MLX, without("biases"), ("biases is missing",)),
    "MLX in another mode": (mlx(4, 32), {"quantization": MLX["quantization"] | {"mode": "mxfp4"}}, None, ("mxfp4", "affine")),
    "MLX of 7 bits": (mlx(4, 32), {"quantization": {"group_size": 32, "bits": 7}}, None, ("bits = 7",)),
    "SCB is missing": (int8_rows, BNB, without("SCB"), ("SCB is missing",)),
    "another order of int8": (int8_rows, BNB, replaced("weight_format", lambda t: t + 1), ("weight_format",)),
    "a state of another shape": (four_bits("nf4", 64, nested=False), BNB, state_of(shape=[64, 96]), ("[64, 96]", "[96, 64]")),
    "a state of other blocks": (four_bits("nf4", 64, nested=False), BNB, state_of(blocksize=32), ("blocks of 32", UP)),
    "a state without blocks": (four_bits("nf4", 64, nested=False), BNB, state_of(blocksize="x"), ("blocks of x",)),
    "a state that is no JSON": (four_bits("nf4", 64, nested=False), BNB, replaced(NF4, lambda t: t[1:]), ("quant_state",)),
    "a tensor more": (gptq(4, 32), GPTQ, added(f"{UP}.extra", torch.ones(3)), (f"{UP}.extra", "do not belong")),
    "a part more": (gptq(4, 32), GPTQ, added(f"{UP}.biases", torch.ones(3)), ("biases is not part of it",)),
    "a layer more": (gptq(4, 32), GPTQ, added("model.x.qweight", torch.ones(3, dtype=torch.int32)), ("model.x.qweight",)),
    "a layer less": (gptq(4, 32), GPTQ, without("qweight", "qzeros", "scales"), (f"{UP}.weight", "are missing")),
    "integers in a norm": (
        gptq(4, 32), GPTQ, added("model.norm.weight", torch.ones(64, dtype=torch.int8)), ("model.norm.weight", "I8")),
    "float weights": (plain, GPTQ, None, ("no weight is stored so",)),
    "NaN in a scale": (gptq(4, 32), GPTQ, replaced("scales", lambda t: t * torch.nan), ("NaN",)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_said_in_one_sentence(name, tmp_path):
    writer, config, change, said = CASES[name]
    folder, _ = write_packed(tmp_path, writer, config, change=change, equal=True)
    with pytest.raises(Exception) as caught:
        load_model(str(folder))
    sentence = str(caught.value)
    assert caught.value.code in ("E-MODEL-BAD", "E-MODEL-MISSING", "E-NUM-NAN") and "\n" not in sentence and len(sentence) <= 300
    assert [part for part in said if part not in sentence] == []
    assert "original float model" in sentence or "ownload" in sentence


@pytest.mark.parametrize(("change", "said"), [
    ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    ({"config_groups": {}}, "config_groups"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "tensor_group"}}}}, "tensor_group"),
    ({"config_groups": {"a": {"weights": {"num_bits": 9, "type": "int", "strategy": "channel"}}}}, "num_bits = 9"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float", "strategy": "channel"}}}}, "num_bits = 4"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "block"}}}}, "strategy block"),
])
def test_schemes_of_compressed_tensors_that_are_not_read_are_named(change, said, tmp_path):
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {"weights": weights}}}
    folder, _ = write_packed(tmp_path, gptq(4, 32), {"quantization_config": settings | change}, equal=True)
    with pytest.raises(ModelError, match="compressed-tensors checkpoint") as caught:
        load_model(str(folder))
    assert said in str(caught.value) and "original float model" in str(caught.value)


def test_layers_stored_transposed_are_refused_before_anything_is_read(tmp_path):
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | GPTQ))
    with pytest.raises(ModelError, match="GPT-2"):
        load_model(str(folder))


def test_the_memory_of_the_unpacked_weights_counts(tmp_path, monkeypatch):
    folder, _ = write_packed(tmp_path, gptq(2, 32), altered("gptq", bits=2), equal=True)
    count = 2 * (20 * 16 * 64 + 3 * 64 * 96) + 2 * 259 * 64 + 5 * 64
    monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", f"{(4 * count - 1) / 1e9:.9f}")
    with pytest.raises(ModelError, match="memory"):
        load_model(str(folder))
    monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", f"{4 * count / 1e9:.9f}")
    load_model(str(folder))

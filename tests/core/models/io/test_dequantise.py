"""Checkpoints of other tools are opened: every weight is exactly what its format says, and reports tell where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from core.evaluation.describe import lossy_caution
from core.models.export.export import export_model
from core.models.export.unfold import projections
from core.models.io.load import load_model
from tests.core.models.export.export_tools import made
from tests.core.models.io.packed_files import Parts, Writer, awq, codes, four_bits, fp8, gptq, int8_rows, mlx, write_packed


def stated(method: str, **settings: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": method, **settings}}


FORMATS: dict[str, tuple[Writer, dict[str, object]]] = {
    "4-bit GPTQ": (gptq(4, 32), stated("gptq", bits=4, group_size=32, desc_act=False)),
    "GPTQ in another order": (gptq(4, 16, order=True), stated("gptq", bits=4, group_size=16, desc_act=True)),
    "2-bit GPTQ version 2": (gptq(2, 32, 2), stated("gptq", bits=2, group_size=32, checkpoint_format="gptq_v2")),
    "3-bit GPTQ": (gptq(3, 32), stated("gptq", bits=3, group_size=32, checkpoint_format="gptq")),
    "8-bit GPTQ rows": (gptq(8, 10**6), stated("gptq", bits=8, group_size=-1)),
    "4-bit AWQ": (awq(32), stated("awq", bits=4, group_size=32, version="gemm", zero_point=True)),
    "FP8 in blocks": (fp8("weight_scale_inv", 40, 48), stated("fp8", weight_block_size=[40, 48])),
    "FP8 with one scale": (fp8("weight_scale", None, None, ()), stated("fp8", activation_scheme="static")),
    "FBGEMM FP8": (fp8("weight_scale", 1, None), stated("fbgemm_fp8", activation_scale_ub=1200.0)),
    "8-bit bitsandbytes": (int8_rows, stated("bitsandbytes", load_in_8bit=True)),
    "NF4": (four_bits("nf4", 64, nested=False), stated("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "FP4, nested": (four_bits("fp4", 32, nested=True), stated("bitsandbytes", load_in_4bit=True, bnb_4bit_use_double_quant=True)),
    **{f"{bits}-bit MLX": (mlx(bits, 32), {"quantization": {"group_size": 32, "bits": bits}}) for bits in (2, 3, 4, 5, 6, 8)},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_is_what_the_format_says(name, tmp_path):
    writer, config = FORMATS[name]
    packed, plain = write_packed(tmp_path, writer, config, embedding="MLX" in name)
    found, expected = load_model(str(packed)), load_model(str(plain))
    assert_same(found.model, expected.model)
    assert found.origin.lossy and not expected.origin.lossy


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_reports_name_the_format_and_its_bits_and_say_what_that_means(tmp_path):
    packed, _ = write_packed(tmp_path, *FORMATS["4-bit GPTQ"])
    origin = load_model(str(packed)).origin
    count = (8 + 8 + 2 + 2) * 16 * 64 + 3 * 64 * 96  # of one layer's weights
    nbytes = 2 * count * (4 / 8 + 4.0 / 8 / 32 + 2 / 32) + 4 * (2 * 259 * 64 + 5 * 64)
    bits = 8 * nbytes / (2 * count + 2 * 259 * 64 + 5 * 64)
    assert origin.precision == f"4-bit GPTQ and float32 ({bits:.1f} bits per weight), dequantised to float32"
    assert "4-bit GPTQ" in origin.label and "already hold few values" in lossy_caution(origin)


def test_the_weights_become_the_type_that_is_asked_for(tmp_path):
    packed, plain = write_packed(tmp_path, *FORMATS["4-bit AWQ"])
    assert_same(load_model(str(packed), dtype=torch.bfloat16).model, load_model(str(plain), dtype=torch.bfloat16).model)


@pytest.mark.parametrize(("name", "file"), [("4-bit GPTQ", "quantize_config.json"), ("4-bit AWQ", "quant_config.json")])
def test_settings_may_stand_in_a_file_of_their_own(name, file, tmp_path):
    writer, config = FORMATS[name]
    packed, plain = write_packed(tmp_path, writer, {})
    renamed = {"bits": "w_bit", "group_size": "q_group_size"} if name == "4-bit AWQ" else {}
    settings = {renamed.get(key, key): value for key, value in config["quantization_config"].items() if key != "quant_method"}
    Path(packed / file).write_text(json.dumps(settings))
    assert_same(load_model(str(packed)).model, load_model(str(plain)).model)


def test_what_generation_needs_is_kept(tmp_path):
    packed, plain = write_packed(tmp_path, *FORMATS["4-bit GPTQ"])
    for folder in (packed, plain):
        (folder / "generation_config.json").write_text('{"eos_token_id": [257, 13], "pad_token_id": 256}')
    found, expected = (load_model(str(folder)).model.generation_config.to_dict() for folder in (packed, plain))
    assert found == expected and found["eos_token_id"] == [257, 13]


def test_layers_of_an_mlx_folder_may_have_settings_of_their_own(tmp_path):
    def mixed(n, k, random):
        return (mlx(6, 32) if n == 96 else mlx(4, 32 if k == 96 else 64))(n, k, random)

    own = {f"model.layers.{i}.mlp.{name}_proj": {"group_size": 32, "bits": 6} for i in range(2) for name in ("gate", "up")}
    own |= {f"model.layers.{i}.mlp.down_proj": {"group_size": 32, "bits": 4} for i in range(2)}
    settings = {"group_size": 64, "bits": 4, "mode": "affine", **own}
    packed, plain = write_packed(tmp_path, mixed, {"quantization": settings, "quantization_config": settings})
    assert_same(load_model(str(packed)).model, load_model(str(plain)).model)


def test_a_packed_embedding_may_be_the_head_too(tmp_path):
    packed, plain = write_packed(tmp_path, *FORMATS["4-bit MLX"], embedding=True, equal=True, architecture="smollm")
    assert_same(load_model(str(packed)).model, load_model(str(plain)).model)


def test_names_may_have_a_wrapper(tmp_path):
    def wrapped(state):
        state.update({f"module.{name}": state.pop(name) for name in list(state)})

    packed, plain = write_packed(tmp_path, *FORMATS["4-bit AWQ"], equal=True, change=wrapped)
    assert_same(load_model(str(packed)).model, load_model(str(plain)).model)


# compressed-tensors is written by its own library


def compressed(form: str, kind: str = "int", bits: int = 8, **weights: object) -> tuple[Writer, dict[str, object]]:
    """A writer by the library's compressor, and the configuration that it goes with."""
    args = {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False, **weights}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=form)
    symmetric, strategy = args["symmetric"], args["strategy"]

    def write(n: int, k: int, random: Random) -> tuple[Parts, Tensor]:
        rows, columns = {"tensor": (n, k), "channel": (1, k), "group": (1, args.get("group_size")),
                         "block": args.get("block_structure")}[strategy]
        grid = (-(-n // rows), -(-k // columns))
        plain = torch.tensor([[random.gauss(0, 1) for _ in range(k)] for _ in range(n)])
        top = 400.0 if kind == "float" else 2.0 ** (bits - 1)
        scale = torch.tensor([[random.uniform(2, 3) / top for _ in range(grid[1])] for _ in range(grid[0])])
        scale = scale.flatten() if strategy == "tensor" else scale
        stored = {"weight": plain, "weight_scale": scale}
        if not symmetric:
            low, high = -int(top), int(top) - 1
            stored["weight_zero_point"] = torch.tensor(codes(*grid, low, high, random), dtype=torch.int8).reshape(scale.shape)
        compressor = BaseCompressor.get_value_from_registry(form)
        parts = compressor.compress(stored, scheme)
        values = compressor.decompress(dict(parts), scheme)["weight"]
        assert values.dtype == torch.float32 and float((values - plain).abs().max()) > 0
        return {name: tensor.contiguous() for name, tensor in parts.items()}, values

    group = {"targets": ["Linear"], "weights": args, "format": form}
    return write, stated("compressed-tensors", format=form, config_groups={"group_0": group}, ignore=["lm_head"])


COMPRESSED = {
    **{f"{bits} bits per row": compressed("pack-quantized", bits=bits) for bits in (2, 3, 4, 6, 8)},
    "4 bits in groups": compressed("pack-quantized", bits=4, strategy="group", group_size=32),
    "4 bits, zero points": compressed("pack-quantized", bits=4, strategy="group", group_size=16, symmetric=False),
    "3 bits, zero points": compressed("pack-quantized", bits=3, symmetric=False),
    "int8 per row": compressed("int-quantized"),
    "int8, zero points": compressed("int-quantized", symmetric=False),
    "int8 per tensor": compressed("int-quantized", strategy="tensor"),
    "int4 in int8": compressed("naive-quantized", bits=4, strategy="group", group_size=32),
    "FP8 per row": compressed("float-quantized", "float"),
    "FP8 per tensor": compressed("float-quantized", "float", strategy="tensor"),
    "FP8 in blocks": compressed("float-quantized", "float", strategy="block", block_structure=[32, 16]),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_are_what_its_library_unpacks(name, tmp_path):
    packed, plain = write_packed(tmp_path, *COMPRESSED[name])
    found = load_model(str(packed))
    assert_same(found.model, load_model(str(plain)).model)
    assert found.origin.precision.startswith("FP8 " if "FP8" in name else f"{name.removeprefix('int')[0]}-bit ")


@pytest.mark.parametrize("recipe", ["W4A16", "groups", "W4A8 by token", "mixed"])
def test_our_own_export_is_opened_again(recipe, tmp_path):
    q = made(recipe)
    export_model(tmp_path / "out", q.loaded, "compressed-tensors")
    found = {p.name: p.weight for p in projections(load_model(str(tmp_path / "out")).model, floats=True)}
    ours = {p.name: p.weight for p in projections(q.model, floats=True)}
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)

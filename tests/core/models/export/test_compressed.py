"""What is exported for compressed-tensors is the model: its own dequantiser gives our weights, transformers our logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.models.export.export import export_model
from core.models.export.fit import loads_in
from core.models.export.unfold import projections
from tests.core.models.export.export_tools import made
from tests.core.tools import ARCHITECTURES, relative, tokens

EXACT = ["W4A16", "W3A16", "W2A16", "W6A16", "W8A16", "groups", "one cluster", "official", "mixed"]
INTEGER = ["W8A8 static", "W4A8 static", "reordered static", "W4A8 by token"]


def schemes_of(folder: Path) -> tuple[dict[str, QuantizationScheme], set[str]]:
    """The schemes that a folder states by their targets, and the layers that it leaves out."""
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({key: value for key, value in stated.items() if key != "dequantize"})
    return {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}, set(config.ignore)


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Every quantised weight as compressed-tensors' own code unpacks it."""
    schemes, _ = schemes_of(folder)
    stored = load_file(folder / "model.safetensors")
    names = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    found = {}
    for name in names:
        own = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        scheme = schemes.get(name) or schemes["Linear"]
        found[name] = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
    return found


@pytest.mark.parametrize("recipe", EXACT + INTEGER)
def test_its_own_dequantiser_gives_our_weights(recipe, tmp_path):
    q = made(recipe)
    export_model(tmp_path / "out", q.loaded, "compressed-tensors")
    theirs = decompressed(tmp_path / "out")
    ours = {p.name: p.weight for p in projections(q.model, floats=True)}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    floats = {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"} if recipe == "mixed" else set()
    assert theirs.keys() == ours.keys() - floats
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert all(torch.equal(stored[f"{name}.weight"], ours[name]) for name in floats)


@pytest.mark.parametrize(("recipe", "bits", "symmetric", "group", "form"), [
    ("W4A16", 4, False, None, "pack-quantized"),
    ("W3A16", 4, True, None, "pack-quantized"),
    ("W6A16", 8, True, None, "pack-quantized"),
    ("W8A16", 8, False, None, "pack-quantized"),
    ("groups", 4, False, 32, "pack-quantized"),
    ("W4A8 static", 8, True, None, "int-quantized"),
    ("W8A8 static", 8, False, None, "int-quantized"),
])
def test_the_scheme_says_what_is_stored(recipe, bits, symmetric, group, form, tmp_path):
    export_model(tmp_path / "out", made(recipe).loaded, "compressed-tensors")
    schemes, ignored = schemes_of(tmp_path / "out")
    scheme, weights = schemes["Linear"], schemes["Linear"].weights
    assert (weights.num_bits, weights.symmetric, weights.group_size, scheme.format) == (bits, symmetric, group, form)
    assert ignored == {"lm_head"}


def run(folder: Path, ids: Tensor) -> Tensor:
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        return theirs(ids).logits


@pytest.mark.parametrize(("architecture", "recipe"), [
    *((architecture, "W4A16") for architecture in ARCHITECTURES),
    *(("llama", recipe) for recipe in (*EXACT[1:6], *INTEGER[:3], "mixed")),
])
def test_transformers_gives_our_logits(architecture, recipe, tmp_path):
    q, ids = made(recipe, architecture), tokens(2, 21, seed=3)
    export_model(tmp_path / "out", q.loaded, "compressed-tensors")
    assert relative(run(tmp_path / "out", ids), q.model(ids).logits) <= 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == q.loaded.tokenizer("ab").input_ids


def test_the_tests_above_undo_an_order_of_columns():
    """One scale per row does not depend on the order in which RPTQ stores the columns."""
    order = made("reordered static").blocks[0].norm1.order
    assert not torch.equal(order, order.sort().values)


def test_several_schemes_with_zero_points_are_read_right_or_not_at_all(tmp_path):
    """Whole rows, and groups of a head's 16 columns: transformers 5.24 does not read them, 5.14 does."""
    q, ids = made("one cluster"), tokens(2, 21, seed=3)
    export_model(tmp_path / "out", q.loaded, "compressed-tensors")
    assert len(schemes_of(tmp_path / "out")[0]) == 14
    assert loads_in(q.loaded)["transformers"].startswith("yes, as transformers")
    try:
        found = run(tmp_path / "out", ids)
    except RuntimeError as error:
        assert "mismatched" in str(error)
    else:
        assert relative(found, q.model(ids).logits) <= 1e-5


def test_ranges_of_tokens_are_those_of_compressed_tensors(tmp_path):
    """But for the first token, which stays in float here."""
    q, ids = made("W4A8 by token"), tokens(2, 21, seed=3)
    report = export_model(tmp_path / "out", q.loaded, "compressed-tensors")
    assert "first token" in report.differences[0]
    sinks = [block.attention.sink_tokens for block in q.blocks]
    try:
        for block in q.blocks:
            block.attention.sink_tokens = 0
        expected = q.model(ids).logits
    finally:
        for block, count in zip(q.blocks, sinks, strict=True):
            block.attention.sink_tokens = count
    assert relative(run(tmp_path / "out", ids), expected) <= 1e-4

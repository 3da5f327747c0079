"""BitNet folders that this project writes run in plain transformers, which knows 8-bit inputs only, and give our logits there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import ModelError
from core.models.io.bitnet import save_bitnet
from core.models.io.catalog import EMBEDDED
from core.models.io.load import load_model
from core.models.io.preflight.config import bitnet_format
from core.quant.linear.ternary import TernaryLinear
from core.storage import verify
from tests.core.models.io.bitnet_tools import write
from tests.core.tools import relative, tiny_source, tokens

EMBEDDED_BITNET = ("quantscope-bitnet-a4.8-6m", "quantscope-bitnet-b1.58-6m")
CARD = {"title": "Tiny", "description": "Random weights.", "licence": "Apache-2.0"}

pytestmark = pytest.mark.usefixtures("no_compiler")


def with_eight_bit_inputs(folder: Path, target: Path):
    """Our own model of a folder, run by the rules that transformers runs it by."""
    shutil.copytree(folder, target)
    (target / "manifest.json").unlink(missing_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantscope": {"mode": "w1.58a8"}}))
    return load_model(str(target)).model


@torch.inference_mode()
def compare(folder: Path, tmp_path: Path, most: float) -> None:
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(2, 48, seed=5)
    expected = with_eight_bit_inputs(folder, tmp_path / "copy")(ids).logits
    assert relative(theirs(ids).logits, expected) <= most
    assert {t.dtype for t in theirs.state_dict().values()} <= {torch.float32, torch.uint8}


@pytest.mark.parametrize("name", EMBEDDED_BITNET)
def test_the_embedded_models_run_in_transformers(name, tmp_path):
    compare(EMBEDDED / name, tmp_path, 2e-2)  # measured: 2.2e-3 and 5.2e-3 on two processors, roundings on the edge of a code
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / name)
    assert tokenizer.decode(tokenizer("Once upon a time").input_ids) == "Once upon a time"


def test_transformers_refuses_rotated_inputs(tmp_path):
    """It would leave the rotation out and compute something else."""
    loaded = tiny_source("bitnet")
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="v2", card=CARD)
    with pytest.raises(ValueError, match="linear_class"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for claim, stored in (("w1.58a8", None), ("v2", "autobitlinear")):
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        config["quantscope"]["mode"] = claim
        config["quantization_config"]["linear_class"] = stored or config["quantization_config"]["linear_class"]
        with pytest.raises(ModelError, match="BitNet variant"):
            bitnet_format(config)


@pytest.mark.parametrize("name", sorted(path.name for path in EMBEDDED.iterdir()))
def test_the_embedded_files_are_those_of_their_manifest(name):
    verify(EMBEDDED / name, checksums=True)
    assert all(path.stat().st_size < 9_500_000 for path in (EMBEDDED / name).iterdir())


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_ternary_llama_is_opened_as_falcon_e_is_stored(tied, tmp_path):
    """No norms inside a layer, and 1 / α stored, for a `linear_class` that config.json does not name."""
    loaded = tiny_source("llama", hidden_size=128, tie_word_embeddings=tied)
    folder, stated = write(tmp_path / "m", "bitlinear", loaded), {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": stated, "is_bitnet_config": True}
    (folder / "config.json").write_text(json.dumps(config))
    found, ids = load_model(str(folder)), tokens(2, 48, seed=5)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert {t.dtype for t in theirs.state_dict().values()} == {torch.float32, torch.uint8}
    assert relative(theirs(ids).logits, found.model(ids).logits) <= 1e-2
    assert all(isinstance(x, TernaryLinear) for block in found.model.blocks for x in block.linears().values())
    assert found.origin.precision == "ternary (1.58 bits, as trained)"
    assert found.model.blocks[0].rules.fidelity == "trained w1.58a8"


@pytest.mark.parametrize(("architecture", "fields"), [("mistral", {"sliding_window": 8}), ("smollm3", {})])
@torch.inference_mode()
def test_windows_and_layers_without_rope_are_those_of_the_ternary_model(architecture, fields, tmp_path):
    folder = write(tmp_path / "m", "bitlinear", tiny_source(architecture, hidden_size=128, **fields))
    compare(folder, tmp_path, 1e-2)


def test_ternary_weights_that_would_have_to_be_folded_are_refused(tmp_path):
    folder = write(tmp_path / "m", "bitlinear", tiny_source("granite"))
    with pytest.raises(ModelError, match="Ternary weights of Granite"):
        load_model(str(folder))


@pytest.mark.parametrize("mode", ["w1.58a8", "a4.8"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_runs_in_transformers(mode, tied, tmp_path):
    """A model whose parts have different types in memory, as training leaves them."""
    loaded = tiny_source("bitnet", tie_word_embeddings=tied)
    loaded.model.get_input_embeddings().half()
    loaded.model.model.norm.bfloat16()
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode=mode, card=CARD)
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.float32, torch.uint8}
    compare(tmp_path / "m", tmp_path, 1e-2)

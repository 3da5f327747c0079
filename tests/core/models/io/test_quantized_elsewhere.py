"""Folders of quantised models are opened by Quantscope alone, those of earlier versions included."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.models.io.quantized import load_quantized, save_quantized
from core.storage import atomic_dir
from tests.core.tools import quantised, tokens


@pytest.fixture(scope="module")
def made():
    return quantised("llama")


def test_other_programs_do_not_take_the_folder_for_float(made, tmp_path):
    """They would fill what they do not find at random."""
    save_quantized(tmp_path / "q", made.loaded, {})
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["quant_method"] == "quantscope"
    assert not hasattr(load_quantized(tmp_path / "q").model.config, "quantization_config")


def test_a_folder_of_an_earlier_version_is_read(made, tmp_path):
    save_quantized(tmp_path / "q", made.loaded, {})
    with atomic_dir(tmp_path / "old") as stage:
        for path in (tmp_path / "q").iterdir():
            if path.name != "manifest.json":
                (stage / path.name.replace("quantscope.safetensors", "model.safetensors")).write_bytes(path.read_bytes())
        config = json.loads((stage / "config.json").read_text())
        del config["quantization_config"]
        (stage / "config.json").write_text(json.dumps(config))
    ids = tokens(2, 21, seed=1)
    assert torch.equal(load_quantized(tmp_path / "old").model(ids).logits, made.model(ids).logits)

"""Folders of quantised models are opened by Quantscope, those of earlier versions included; others end with its name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.evaluation.shapes import config_shape, shape_of
from core.models.io.catalog import read_config
from core.models.io.quantized import load_quantized, save_quantized
from core.storage import atomic_dir
from tests.core.tools import quantised, spec_of, tokens

OPENED = """
import sys, transformers
for kind in (transformers.AutoModelForCausalLM, transformers.AutoConfig, transformers.LlamaForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1])
        print("opened")
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
"""


@pytest.fixture(scope="module")
def made():
    return quantised("llama")


@pytest.fixture
def saved(made, tmp_path) -> Path:
    save_quantized(tmp_path / "q", made.loaded, {})
    return tmp_path / "q"


def test_without_our_import_the_folder_is_refused_by_name(saved):
    """Other programs would fill what they do not find at random. A process of its own: here another test may have imported it."""
    done = subprocess.run([sys.executable, "-c", OPENED, str(saved)], capture_output=True, text=True, timeout=120, check=True)
    model, config, llama = done.stdout.splitlines()
    assert "model type `quantscope` but Transformers does not recognize" in model and model.startswith("ValueError")
    assert config == model and "no file named model.safetensors" in llama


def test_the_folder_says_what_it_holds(saved, made):
    stored = json.loads((saved / "config.json").read_text())
    assert stored["model_type"] == stored["quantization_config"]["quant_method"] == "quantscope"
    assert stored["text_config"]["model_type"] == "llama"
    assert not hasattr(load_quantized(saved).model.config, "quantization_config")
    config = made.model.config
    shape = shape_of(spec_of(made.base), 2, config.vocab_size, tied=False)
    assert config_shape(read_config(str(saved))) == shape, "what `memory --model FOLDER` counts"


@pytest.mark.parametrize("weights", ["model.safetensors", "quantscope.safetensors"])
def test_a_folder_of_an_earlier_version_is_read(weights, saved, made, tmp_path):
    """First the decoder's configuration lay at the top, alone, then with our `quantization_config`."""
    with atomic_dir(tmp_path / "old") as stage:
        for path in saved.iterdir():
            if path.name != "manifest.json":
                (stage / path.name.replace("quantscope.safetensors", weights)).write_bytes(path.read_bytes())
        config = json.loads((stage / "config.json").read_text())["text_config"]
        if weights == "quantscope.safetensors":
            config["quantization_config"] = {"quant_method": "quantscope", "format": 1}
        (stage / "config.json").write_text(json.dumps(config))
        facts = json.loads((stage / "quantscope.json").read_text())
        (stage / "quantscope.json").write_text(json.dumps(facts | {"format": 1}))
    ids, back = tokens(2, 21, seed=1), load_quantized(tmp_path / "old").model
    assert torch.equal(back(ids).logits, made.model(ids).logits) and not hasattr(back.config, "quantization_config")

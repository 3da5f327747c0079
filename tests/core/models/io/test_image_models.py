"""The text model of a checkpoint that also reads images: it computes what transformers' whole model computes for text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from core.errors import ModelError
from core.evaluation.shapes import model_shape
from core.models.io.catalog import resolve
from core.models.io.layerwise import LayerReader
from core.models.io.load import load_model
from core.models.tiny import CONFIGS, VOCAB_SIZE, tiny_tokenizer
from core.progress import silent
from tests.core.tools import relative, tokens

IDS = tokens(1, 24)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 28,
         "patch_size": 14}
KINDS = {
    "ministral3": ("mistral3", {"vision_config": {"model_type": "pixtral", "head_dim": 8, **SMALL}}),
    "mistral": ("mistral3", {"vision_config": {"model_type": "pixtral", "head_dim": 8, **SMALL}}),
    "gemma3_text": ("gemma3", {"vision_config": {"model_type": "siglip_vision_model", **SMALL}, "mm_tokens_per_image": 1}),
}
"""Text model → `model_type` of the whole model, and the fields of its parts for images."""


def made(text: str, folder: Path, *, tied: bool) -> PreTrainedModel:
    """A random model that reads images and text, saved in `folder`."""
    whole, fields = KINDS[text]
    own = {"model_type": text, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, **CONFIGS[text], "tie_word_embeddings": tied}
    config = AutoConfig.for_model(whole, text_config=own, tie_word_embeddings=tied, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def renamed(folder: Path, rule) -> None:
    """Store the tensors of a folder under the names that `rule` gives them; None leaves one out."""
    tensors = {rule(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def newer(name: str) -> str:
    """The name of a tensor as models of transformers have it since version 4.52, by the one before."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return name.replace("language_model.model.", "model.language_model.") if "language_model.model." in name else f"model.{name}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a small Ministral 3 whose head is its own."""
    made("ministral3", tmp_path_factory.mktemp("images") / "m", tied=False)
    return tmp_path_factory.getbasetemp() / "images0" / "m"


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    assert 20 < len(str(caught.value)) <= 240
    return caught.value


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("text", KINDS)
@torch.inference_mode()
def test_the_text_model_is_opened(text, tied, tmp_path):
    folder = tmp_path / "m"
    expected = made(text, folder, tied=tied)(input_ids=IDS).logits
    loaded = load_model(str(folder))
    assert loaded.model.config.model_type == text and loaded.source == "local folder; only its text model is read"
    assert relative(loaded.model(IDS).logits, expected) < 1e-5
    assert model_shape(str(folder)).tied == tied
    renamed(folder, newer)
    assert torch.equal(load_model(str(folder)).model(IDS).logits, loaded.model(IDS).logits)
    reader = LayerReader(resolve(str(folder)), torch.float32, "cpu", silent)
    whole = reader.shell.model.with_blocks(reader.block(index) for index in range(reader.count))
    assert torch.equal(whole(IDS).logits, loaded.model(IDS).logits)


@pytest.mark.parametrize("stated", (None, True, False))
def test_a_head_that_is_not_stored_is_the_embedding_unless_the_configuration_denies_it(copy, stated):
    renamed(copy, lambda name: None if "lm_head" in name else name)
    config = json.loads((copy / "config.json").read_text())
    for table in (config, config["text_config"]):
        table.pop("tie_word_embeddings", None)
    config |= {} if stated is None else {"tie_word_embeddings": stated}
    (copy / "config.json").write_text(json.dumps(config))
    if stated is False:
        assert "lm_head.weight" in str(refused(copy))
    else:
        model = load_model(str(copy)).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_in_the_format_of_another_tool_are_opened(copy, saved):
    """As Ministral 3 is published: FP8 with one scale, and scales of activations that are not used."""
    tensors = load_file(copy / "model.safetensors")
    expected = load_model(str(saved)).model
    for name in [name for name in tensors if name.startswith("language_model.model.layers.") and "_proj." in name]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{name}_scale_inv": scale, name.replace(".weight", ".activation_scale"): scale.clone()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    loaded = load_model(str(copy))
    assert "FP8" in loaded.origin.label and "text model" in loaded.origin.sentence
    assert 0 < relative(loaded.model(IDS).logits, expected(IDS).logits) < 0.2


def test_what_is_wrong_with_the_text_model_is_named(copy):
    whole = load_file(copy / "model.safetensors")
    renamed(copy, lambda name: None if name.endswith("layers.1.mlp.up_proj.weight") else name)
    assert "1 of 21 tensors are missing" in str(refused(copy)) and "layers.1.mlp.up_proj.weight" in str(refused(copy))
    extra = {"model.language_model.norm.weight": torch.ones(64), **whole}
    save_file(extra, copy / "model.safetensors", metadata={"format": "pt"})
    assert "twice, under two names" in str(refused(copy))
    save_file({"audio_tower.weight": torch.ones(64), **whole}, copy / "model.safetensors", metadata={"format": "pt"})
    assert "audio_tower.weight" in str(refused(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "mamba"}}))
    assert "'mamba' is not supported" in str(refused(copy))

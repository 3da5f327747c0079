"""What people give in place of a model's folder: it stands for one where it can, and is named where it cannot."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import save_file

from core.errors import ModelError
from core.models.io import catalog
from core.models.io.catalog import read_config, resolve
from core.models.io.load import load_model
from core.models.tiny import save_tiny
from tests.core.models.io.gguf_files import write_gguf
from tests.core.tools import tiny_source

HF, GGUF = ("config.json", "model.safetensors", "tokenizer.json"), ("model.gguf",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with every file of a small model, and its GGUF file."""
    folder = save_tiny(tmp_path_factory.mktemp("whole") / "model", "llama", layers=1)
    write_gguf(folder / "model.gguf", tiny_source("llama", layers=1))
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, folder / "lora.safetensors")
    return folder


@pytest.fixture
def some(whole, tmp_path):
    """Copy files of it into a new folder: names, or new name = name."""

    def copy(*names: str, into: str = "some", **renamed: str):
        folder = tmp_path / into
        folder.mkdir(parents=True, exist_ok=True)
        for target, name in {**{name: name for name in names}, **renamed}.items():
            shutil.copy(whole / name, folder / target)
        return folder

    return copy


def refused(path, *said: str) -> None:
    """Every part of the sentence; never the advice to download the same file again."""
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    message = str(caught.value)
    assert all(part in message for part in said) and len(message) <= 240 and "ownload" not in message, message


@pytest.mark.parametrize(("files", "said"), [
    (("model.safetensors",), "config.json is missing beside model.safetensors"),
    ((), "the folder holds nothing. Name the folder of one model"),
    (("tokenizer.json",), "the folder holds tokenizer.json"),
    (("config.json", "model.safetensors"), "no tokenizer: add the tokenizer.json"),
])
def test_a_folder_with_a_part_of_a_model_says_what_lacks(files, said, some):
    refused(some(*files), said)
    if "model.safetensors" in files:
        refused(some(*files) / "model.safetensors", said)


@pytest.mark.parametrize(("renamed", "said"), [
    ({"weights.safetensors": "model.safetensors"}, "rename weights.safetensors to model.safetensors"),
    ({"model-00001-of-00002.safetensors": "model.safetensors", "model-00002-of-00002.safetensors": "model.safetensors"},
     "add the model.safetensors.index.json"),
    ({"model.safetensors": "lora.safetensors"}, "LoRA adapter, not a whole model"),
    ({"adapter_model.safetensors": "lora.safetensors"}, "LoRA adapter, not a whole model"),
])
def test_weights_that_are_called_otherwise_or_are_others(renamed, said, some):
    refused(some("config.json", "tokenizer.json", **renamed), said)


@pytest.mark.parametrize(("renamed", "said"), [
    ({"adapter_model.safetensors": "lora.safetensors"}, "LoRA adapter, not a whole model"),
    ({"params.json": "config.json", "consolidated.safetensors": "model.safetensors"}, "Meta's or Mistral's own code"),
    ({"a.Q4_0.gguf": "model.gguf", "b.Q8_0.gguf": "model.gguf"}, "holds 2 GGUF files: name one of them, such as a.Q4_0.gguf"),
    ({"model_index.json": "config.json"}, "the folder holds model_index.json"),
])
def test_folders_of_other_programs_are_named(renamed, said, some):
    refused(some(**renamed), said)


@pytest.mark.parametrize("names", [
    {"model.gguf": "model.gguf"}, {"model.gguf": "model.gguf", "config.json": "config.json"},
    {"model.gguf": "model.gguf", "mmproj-model-f16.gguf": "model.gguf", "model.imatrix.gguf": "model.gguf"},
])
def test_the_one_gguf_file_of_a_folder_is_its_model(names, some, monkeypatch):
    monkeypatch.setattr(catalog, "_from_gguf", lambda path, name, revision, progress: path)
    folder = some(**names)
    assert resolve(str(folder)) == folder / "model.gguf"
    cached = some(into=f"models--owner--name/snapshots/{'a' * 40}", **names)
    assert resolve(str(cached.parents[1])) == cached / "model.gguf", "in the Hub's cache too"


def test_weights_beside_a_gguf_file_win(some):
    folder = some(*HF, *GGUF)
    assert resolve(str(folder)).path == folder


@pytest.mark.parametrize("file", HF)
def test_a_file_of_a_model_stands_for_its_folder(file, some):
    folder = some(*HF)
    for name in (str(folder / file), f'"{folder / file}"', f"'{folder}'"):
        assert resolve(name).path == folder
    assert read_config(str(folder / file)) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.onnx", "imatrix.dat", "sha256-0a", "notes.txt", "latest.json"])
def test_other_files_are_said_to_be_no_model(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\4 something else")
    refused(tmp_path / name, f"The file {name!r} is not read as a model: give a .gguf or .safetensors file")


def test_a_quantisation_behind_a_colon_is_explained():
    with pytest.raises(ModelError, match=r"names a file by its quantisation: download the \.gguf file"):
        resolve("owner/name-GGUF:Q4_K_M")


def test_a_vocabulary_is_named_without_its_type(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "ggml-vocab.gguf"), "llama")
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "ggml-vocab.gguf", "holds a vocabulary without weights")


def test_mixtures_of_experts_are_named(some):
    folder = some(*HF)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    refused(folder, "num_local_experts = 8: mixtures of experts of this architecture are not supported")

"""A model quantised layer by layer is the one quantised in memory, bit for bit: tensors, structure, report, side files."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import core
from core.errors import InputError, ModelError, NumericError, ResourceError
from core.models.io.catalog import resolve
from core.models.io.layerwise import LayerReader
from core.models.io.load import load_model
from core.models.io.quantized import block_tensors, save_quantized
from core.models.io.shards import shard_name, write_index
from core.models.tiny import save_tiny, tiny_architectures
from core.progress import silent
from core.storage import verify
from tests.core.models.io.packed_files import gptq, write_packed
from tests.core.stream.stream_tools import facts_of, recipe_of, tensors_of

RECIPES = {
    "rptq": {"scheme": "W4A4"},
    "official": {"variant": "official"},
    "rotation": {"method": "rotation", "scheme": "W4A4"},
    "rtn": {"method": "rtn", "scheme": "W3A3KV", "weights": "rtn"},
    "bitnet": {"method": "bitnet"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name, seed=2, layers=3) for name in ("llama", "opt")}


def in_memory(recipe: core.QuantRecipe, folder: Path) -> core.LoadedModel:
    made, report = core.quantize(load_model(recipe.model), recipe)
    save_quantized(folder, made, {"recipe": recipe.to_record(), "report": replace(report, folder=str(folder)).to_dict()})
    return made


def assert_equal_folders(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)
    assert facts_of(one) == facts_of(other)
    kept = {path.name for path in one.iterdir()} - {"manifest.json", "quantscope.json"}
    for name in (name for name in kept if not name.startswith("quantscope")):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_streamed_run_is_the_run_in_memory(folders, tmp_path, architecture, name):
    recipe = recipe_of(folders[architecture], **RECIPES[name])
    made, out = in_memory(recipe, tmp_path / "whole"), tmp_path / "streamed"
    report = core.quantize_streamed(recipe, out)
    assert_equal_folders(tmp_path / "whole", out)
    verify(out, checksums=True)
    assert len(list(out.glob("quantscope-*-of-00004.safetensors"))) == 4 and not list(tmp_path.glob("*.stream"))
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(str(out)).model(ids).logits, made.model(ids).logits)
    assert report.layers and report.loads and report.seconds > 0 and set(report.stages) >= {"read", "observe", "weights"}


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_every_layer_is_read_as_it_is_loaded(tmp_path, architecture):
    folder = save_tiny(tmp_path / "m", architecture, seed=5)
    loaded = load_model(str(folder))
    reader = LayerReader(resolve(str(folder)), torch.float32, "cpu", silent)
    assert reader.count == len(loaded.model.blocks)
    for index in (1, 0):
        wanted, found = block_tensors(loaded.model.blocks[index]), block_tensors(reader.block(index))
        assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    wanted, found = loaded.model.decoder.outside(), reader.shell.model.decoder.outside()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def copied(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """Copy everything but the weights, which are returned."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name not in ("model.safetensors", "manifest.json"):
            (target / path.name).write_bytes(path.read_bytes())
    return load_file(folder / "model.safetensors")


def test_shards_short_names_and_half_precision_are_read(folders, tmp_path):
    tensors = {name.removeprefix("model."): t.bfloat16() for name, t in copied(folders["llama"], tmp_path / "m").items()}
    names, shards = sorted(tensors), {}
    for number in range(3):  # a layer's tensors are spread over all files
        shards[shard_name("model", number + 1, 3)] = own = {f"module.{name}": tensors[name] for name in names[number::3]}
        save_file(own, tmp_path / "m" / shard_name("model", number + 1, 3), metadata={"format": "pt"})
    write_index(tmp_path / "m", "model", shards, 0)
    recipe = recipe_of(tmp_path / "m", method="rtn", weights="rtn")
    in_memory(recipe, tmp_path / "whole")
    core.quantize_streamed(recipe, tmp_path / "out")
    assert_equal_folders(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_of_a_tied_model_is_used_as_when_loaded(folders, tmp_path, equal):
    tensors = copied(folders["opt"], tmp_path / "m")
    embedding = tensors["model.decoder.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone() if equal else embedding + 1}, tmp_path / "m" / "model.safetensors",
              metadata={"format": "pt"})
    recipe = recipe_of(tmp_path / "m", method="rtn", weights="rtn")
    in_memory(recipe, tmp_path / "whole")
    core.quantize_streamed(recipe, tmp_path / "out")
    assert_equal_folders(tmp_path / "whole", tmp_path / "out")
    assert ("shell.lm_head.weight" in tensors_of(tmp_path / "out")) is not equal


def test_layers_with_bits_of_their_own(folders, tmp_path):
    recipe = recipe_of(folders["llama"], overrides=core.recipe.Overrides.parse("layers.1.weights=8,layers.2.k=3"))
    in_memory(recipe, tmp_path / "whole")
    core.quantize_streamed(recipe, tmp_path / "out")
    assert_equal_folders(tmp_path / "whole", tmp_path / "out")


def test_a_damaged_tensor_is_named_when_its_layer_is_reached(folders, tmp_path):
    tensors = copied(folders["llama"], tmp_path / "m")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 NaN"):
        core.quantize_streamed(recipe_of(tmp_path / "m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_streamed_is_refused(folders, tmp_path, monkeypatch):
    ternary = recipe_of(Path("quantscope-bitnet-b1.58-6m"), method="bitnet")
    with pytest.raises(ModelError, match="quantise this model in memory") as caught:
        core.quantize_streamed(ternary, tmp_path / "out")
    assert caught.value.code == "E-MODEL-STREAM"
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}}
    packed, _ = write_packed(tmp_path, gptq(4, 32), settings)
    with pytest.raises(ModelError, match="another tool has packed are not read layer by layer"):
        core.quantize_streamed(recipe_of(packed), tmp_path / "out")
    core.quantize_streamed(recipe_of(folders["opt"], method="rtn", weights="rtn"), tmp_path / "out")
    with pytest.raises(ModelError, match="already quantised"):
        core.quantize_streamed(recipe_of(tmp_path / "out"), tmp_path / "again")
    with pytest.raises(InputError):
        core.quantize_streamed(recipe_of(folders["opt"]), folders["opt"])
    with pytest.raises(InputError, match="choose the order layer"):
        core.quantize_streamed(recipe_of(folders["opt"], order="shared"), tmp_path / "shared")
    with pytest.raises(InputError, match="leave distill out"):
        core.quantize_streamed(recipe_of(folders["opt"], distill=core.recipe.DistillOptions()), tmp_path / "distilled")


def test_the_float_layer_is_gone_before_the_quantised_pass(folders, tmp_path, monkeypatch):
    """Working copies of the quantised layer are as large as it: only one of the two is in memory."""
    alive, read, counts = [], LayerReader.block, []

    def block(self, index):
        made = read(self, index)
        alive.append(weakref.ref(made.mlp.up.weight))
        return made

    def count(stage: str, fraction: float | None = None) -> None:
        if "quantised pass" in stage or "observing" in stage:
            counts.append(("observing" in stage, sum(one() is not None for one in alive)))

    monkeypatch.setattr(LayerReader, "block", block)
    core.quantize_streamed(recipe_of(folders["llama"]), tmp_path / "out", progress=count)
    assert len(alive) == 3 and {number for early, number in counts if early} == {1}
    assert {number for early, number in counts if not early} == {0}


@pytest.mark.parametrize(("module", "name", "code"), [("core.stream.run.free_memory_bytes", "memory", "E-MEM"),
                                                      ("core.stream.run.shutil.disk_usage", "disk", "E-DISK")])
def test_what_does_not_fit_is_said_before_the_start(folders, tmp_path, monkeypatch, module, name, code):
    nothing = {"memory": 1000, "disk": type("Usage", (), {"free": 1000})}[name]
    monkeypatch.setattr(module, lambda *where: nothing)
    with pytest.raises(ResourceError, match=f"GB of {name} more") as caught:
        core.quantize_streamed(recipe_of(folders["opt"]), tmp_path / "out")
    assert caught.value.code == code and not list(tmp_path.glob("out.stream/block-*"))

"""What a configuration asks for is compared with what the files hold before anything is allocated."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import ModelError
from core.models.io.load import load_model
from core.models.io.skeleton import check_tensors
from core.models.tiny import save_tiny, tiny_architectures, tiny_model
from tests.core.tools import tiny_source


def shapes(made) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in made.model.state_dict().items()}


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_a_model_is_what_its_configuration_describes(architecture):
    made = tiny_source(architecture)
    found = shapes(made)
    check_tensors(made.model.config, found)
    if made.model.config.tie_word_embeddings:
        check_tensors(made.model.config, {name: shape for name, shape in found.items() if name != "lm_head.weight"})
    check_tensors(made.model.config, {name.removeprefix("model."): shape for name, shape in found.items()})
    for name in list(found)[::5]:
        if name == "lm_head.weight" and made.model.config.tie_word_embeddings:
            continue
        with pytest.raises(ModelError, match=f"missing.*{name}"):
            check_tensors(made.model.config, {other: shape for other, shape in found.items() if other != name})
        with pytest.raises(ModelError, match=f"another shape.*{name}"):
            check_tensors(made.model.config, found | {name: (*found[name], 1)})
    with pytest.raises(ModelError, match="do not belong.*model.extra"):
        check_tensors(made.model.config, found | {"model.extra": (1,)})


def test_parts_in_another_form_are_not_compared():
    made = tiny_source("bitnet")
    found = {name: (1,) if ".layers." in name else shape for name, shape in shapes(made).items()}
    check_tensors(made.model.config, found, inside="model.layers.")
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        check_tensors(made.model.config, found | {"model.norm.weight": (2,)}, inside="model.layers.")


GREEDY = {
    "no embedding": lambda state: [state.pop(name) for name in list(state) if "embed" in name or "lm_head" in name],
    "a small head": lambda state: state.update({"lm_head.weight": torch.ones(1, 1)}),
    "a small layer": lambda state: state.update({"model.layers.0.mlp.up_proj.weight": torch.ones(1, 1)}),
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_configuration_of_gigabytes_is_refused_before_it_is_allocated(tmp_path, monkeypatch, case):
    folder = save_tiny(tmp_path / "m", "llama", seed=3)
    state = load_file(folder / "model.safetensors")
    GREEDY[case](state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    large = {"intermediate_size": 250_000} if case == "a small layer" else {"vocab_size": 900_000}
    config = json.loads((folder / "config.json").read_text()) | large | {"hidden_size": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    built, build = [], AutoModelForCausalLM.from_config

    def recorded(*arguments, **options):
        built.append(build(*arguments, **options))
        return built[-1]

    def allocate(*arguments, **options):
        raise AssertionError("the weights are loaded before they are compared")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", recorded)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", allocate)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    assert caught.value.code in ("E-MODEL-MISSING", "E-MODEL-BAD")
    assert {p.device.type for model in built for p in model.parameters()} <= {"meta"}


def test_a_short_context_loads(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama", seed=3, max_position_embeddings=256)
    assert load_model(str(folder)).model.config.max_position_embeddings == 256


def test_a_head_of_its_own_beside_the_flag_of_a_tied_one_is_kept(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama", seed=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    found, made = load_model(str(folder)).model, tiny_model("llama", seed=3).model
    ids = torch.arange(40)[None]
    assert torch.equal(found(ids).logits, made(ids).logits)

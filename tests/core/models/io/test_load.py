"""Loading refuses what is not exactly a model's files: tensors deleted, added, reshaped, NaN; code is never run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import ArtifactError, BackendError, InputError, ModelError, NumericError, QuantscopeError
from core.models.io import foreign
from core.models.io.foreign import library_errors, quiet, tokenizer_errors
from core.models.io.load import load_model, require_finite
from core.models.loaded import LoadedModel
from core.models.tiny import save_tiny, tiny_architectures, tiny_model
from core.storage import atomic_dir
from tests.core.tools import relative


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name, seed=3) for name in tiny_architectures()}


@pytest.fixture
def copy(saved, tmp_path):
    """A private copy of a saved model with one file rewritten by `change(tensors)` or `config`."""
    def make(architecture: str, change=None, config: dict | None = None) -> Path:
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in saved[architecture].iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config:
            stated = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(stated | config))
        return folder
    return make


def refused(folder: Path | str, kind: type[QuantscopeError] = ModelError, **options: object) -> QuantscopeError:
    with pytest.raises(kind) as caught:
        load_model(str(folder), **options)
    assert 20 < len(str(caught.value)) <= 240 and os.path.dirname(str(folder) or "x") not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_what_was_saved_is_loaded(saved, architecture):
    loaded, made = load_model(str(saved[architecture])), tiny_model(architecture, seed=3)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.model(ids).logits, made.model(ids).logits)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.adapter is made.adapter and loaded.path == saved[architecture] and loaded.source == "local folder"


@pytest.mark.parametrize("architecture", ["opt", "qwen2", "smollm"])
def test_each_deleted_tensor_is_missed(copy, saved, architecture):
    for name in sorted(load_file(saved[architecture] / "model.safetensors")):
        error = refused(copy(architecture, lambda tensors, gone=name: tensors.pop(gone)))
        assert error.code == "E-MODEL-MISSING" and name in str(error)


def test_many_missing_tensors_are_counted(copy):
    def drop_biases(tensors):
        for name in [name for name in tensors if name.endswith("bias")]:
            del tensors[name]

    error = refused(copy("opt", drop_biases))
    assert "and 14 more" in str(error) or "more" in str(error)


def test_a_foreign_tensor_is_refused(copy):
    error = refused(copy("llama", lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)})))
    assert error.code == "E-MODEL-MISSING" and "model.extra.weight" in str(error) and "belong" in str(error)


def test_buffers_of_old_checkpoints_are_accepted(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_model(str(copy("llama", lambda tensors: tensors.update({name: torch.ones(8)}))))


def test_a_stored_copy_of_a_tied_weight_is_accepted(copy):
    folder = copy("smollm", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(str(folder))


def test_another_shape_is_refused(copy):
    def reshape(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)

    error = refused(copy("llama", reshape))
    assert "model.layers.1.mlp.up_proj.weight" in str(error) and "shape" in str(error)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.float16)])
def test_a_planted_nan_is_found_and_counted(copy, value, dtype):
    def plant(tensors):
        weight = tensors["model.layers.1.self_attn.k_proj.weight"].to(dtype)
        weight.view(-1)[5:8] = value
        tensors["model.layers.1.self_attn.k_proj.weight"] = weight

    error = refused(copy("llama", plant), NumericError)
    assert error.code == "E-NUM-NAN" and "layers.1.self_attn.k_proj.weight has 3 NaN" in str(error)


def test_every_tensor_is_checked_for_nan(saved):
    made = tiny_model("opt")
    for name, tensor in made.model.state_dict().items():
        kept = tensor.view(-1)[0].item()
        tensor.view(-1)[0] = float("nan")
        with pytest.raises(NumericError, match="NaN"):
            require_finite(made.model.state_dict().items())
        tensor.view(-1)[0] = kept
        assert name
    require_finite(made.model.state_dict().items())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("architecture", tiny_architectures())
def test_half_precision_is_widened(copy, architecture, dtype):
    """Factors and offsets are applied after that, in float32."""

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    folder = copy(architecture, halve, {"dtype": str(dtype).removeprefix("torch.")})
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    loaded, ids = load_model(str(folder)), torch.arange(20)[None]
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.decoder.head.weight.to(dtype).float(), loaded.model.decoder.head.weight)
    with torch.inference_mode():
        assert relative(loaded.model(ids).logits, source(ids).logits) < 1e-5


def test_names_of_published_checkpoints_are_known(copy, saved):
    """GPT-2 without its prefix and with buffers, Pythia with the earlier name of its head and with buffers."""

    def as_gpt2(tensors):
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    def as_pythia(tensors):
        head = "lm_head.weight" if "lm_head.weight" in tensors else "embed_out.weight"  # by transformers' version
        tensors["embed_out.weight"] = tensors.pop(head)
        own = {"bias": torch.ones(1, 1, 8, 8), "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(2)}
        tensors.update({f"gpt_neox.layers.0.attention.{name}": tensor for name, tensor in own.items()})

    for architecture, change in (("gpt2", as_gpt2), ("gpt_neox", as_pythia)):
        found, ids = load_model(str(copy(architecture, change))), torch.arange(20)[None]
        assert torch.equal(found.model(ids).logits, tiny_model(architecture, seed=3).model(ids).logits)


@pytest.mark.parametrize(("kind", "name"), [("phi3", "Phi-3"), ("falcon", "Falcon")])
def test_code_that_transformers_has_is_not_run(copy, kind, name):
    """Published repositories name their own files; transformers' class takes their place."""
    folder = copy(kind, config={"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    (folder / "modeling.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
    assert load_model(str(folder)).adapter.name == name and not (folder / "canary").exists()


@pytest.mark.parametrize(("config", "code"), [
    ({"model_type": "mamba"}, "ARCH"), ({"model_type": "no-such-thing"}, "ARCH"), ({"model_type": "gptj"}, "ARCH"),
    ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "CODE"),
    ({"num_hidden_layers": 3}, "MISSING"), ({"num_hidden_layers": 1}, "BAD"), ({"num_hidden_layers": 10**6}, "SIZE"),
    ({"vocab_size": 300}, "BAD"), ({"hidden_act": "no-such-act"}, "BAD"), ({"rms_norm_eps": "x"}, "BAD"),
    ({"rope_parameters": {"rope_type": "none"}}, "BAD"), ({"intermediate_size": 4}, "MISSING"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "BAD"),
])
def test_a_wrong_configuration_is_one_sentence(copy, config, code, capfd):
    folder = copy("llama", config=config)
    canary = folder / "canary"
    (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    assert refused(folder).code == f"E-MODEL-{code}"
    assert not canary.exists() and capfd.readouterr().err == ""


def test_sizes_left_to_defaults_are_checked_too(copy):
    folder = copy("llama")
    stated = json.loads((folder / "config.json").read_text())
    del stated["num_hidden_layers"]  # transformers' default is 32
    (folder / "config.json").write_text(json.dumps(stated))
    assert refused(folder).code == "E-MODEL-MISSING"


def test_memory_is_checked_before_loading(saved, monkeypatch):
    monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", "0.0001")
    assert refused(saved["llama"]).code == "E-MODEL-SIZE"


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "tokenizer.json").unlink(),
    lambda folder: (folder / "tokenizer.json").write_text("{}"),
    lambda folder: (folder / "tokenizer.json").write_text("[" * 1000),
    lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe\0"),
    lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    lambda folder: edit(folder / "tokenizer.json", lambda t: t["pre_tokenizer"].update(type="None such")),
    lambda folder: edit(folder / "tokenizer.json", lambda t: t.update(model={"type": "BPE", "vocab": {}, "merges": 3})),
], ids=["gone", "empty", "deep", "binary", "config a list", "unknown part", "merges"])
def test_a_damaged_tokenizer_is_one_sentence(copy, change):
    folder = copy("mistral")
    change(folder)
    assert refused(folder).code in {"E-MODEL-TOKENIZER", "E-MODEL-BAD"}


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_tokenizer_of_another_model_is_refused(copy):
    def more(document):
        document["model"]["vocab"] |= {f"word{n}": 259 + n for n in range(50)}

    folder = copy("llama")
    edit(folder / "tokenizer.json", more)
    error = refused(folder)
    assert error.code == "E-MODEL-TOKENIZER" and "306 tokens" in str(error)


class Panic(BaseException):
    """What a Rust panic looks like from Python: no Exception."""


def test_a_panic_of_the_tokenizer_is_an_error_of_ours():
    with pytest.raises(ModelError) as caught, tokenizer_errors("The tokenizer is damaged."):
        raise Panic
    assert caught.value.code == "E-MODEL-TOKENIZER"
    for passing in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(passing), tokenizer_errors("x"):
            raise passing


def test_library_errors_keep_our_own():
    with pytest.raises(NumericError), library_errors("x"):
        raise NumericError("y")
    with pytest.raises(QuantscopeError, match="memory ran out"), library_errors("x"):
        raise MemoryError
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError


@pytest.mark.parametrize(("options", "kind", "code"), [
    ({"device": "toaster"}, InputError, "E-PARAM-DEVICE"), ({"device": "meta"}, InputError, "E-PARAM-DEVICE"),
    ({"device": "cuda"}, BackendError, "E-BACKEND"), ({"dtype": torch.int8}, InputError, "E-PARAM-DTYPE"),
    ({"dtype": "float32"}, InputError, "E-PARAM-DTYPE")])
def test_options_are_checked(saved, monkeypatch, options, kind, code):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(saved["llama"], kind, **options).code == code


def test_a_folder_of_our_own_goes_to_its_loader(tmp_path, monkeypatch, saved):
    made = tiny_model("llama")
    seen = []
    monkeypatch.setattr("core.models.io.load.load_quantized", lambda path, progress=None: seen.append(path) or made)
    with atomic_dir(tmp_path / "mine") as stage:
        (stage / "quantscope.json").write_text("{}")
    assert load_model(str(tmp_path / "mine")) is made and seen == [tmp_path / "mine"]
    (tmp_path / "mine" / "quantscope.json").write_text("{ }")
    assert refused(tmp_path / "mine", ArtifactError).code == "E-CKPT-BAD" and len(seen) == 1


def test_progress_is_told_and_nothing_is_printed(saved, capfd):
    stages: list[tuple[str, float | None]] = []
    loaded = load_model(str(saved["opt"]), progress=lambda text, part: stages.append((text, part)))
    assert isinstance(loaded, LoadedModel) and len(stages) >= 3
    assert all(isinstance(text, str) and (part is None or 0 <= part <= 1) for text, part in stages)
    assert capfd.readouterr() == ("", "")


def test_loading_connects_to_nothing(saved, monkeypatch):
    calls: list[str] = []
    recording = True

    def hook(event: str, arguments: tuple) -> None:
        if recording and event in ("socket.connect", "socket.getaddrinfo"):
            calls.append(f"{event} {arguments}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sys.addaudithook(hook)
    for architecture in tiny_architectures():
        load_model(str(saved[architecture]))
    recording = False
    assert calls == []


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "language_model.", "module._orig_mod."])
def test_names_behind_a_wrapper_are_found(copy, saved, wrapper):
    def wrap(tensors):
        for name in list(tensors):
            tensors[wrapper + name] = tensors.pop(name)

    loaded, made = load_model(str(copy("llama", wrap))), load_model(str(saved["llama"]))
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.model(ids).logits, made.model(ids).logits)


def test_a_wrapper_around_some_tensors_is_refused(copy):
    def wrap(tensors):
        tensors["module.model.norm.weight"] = tensors.pop("model.norm.weight")

    assert "model.norm.weight" in str(refused(copy("llama", wrap)))


@pytest.mark.parametrize(("start", "package"), [(b"\n\x0e", "sentencepiece"), (b"IQ== 0", "tiktoken")])
def test_a_tokenizer_that_needs_a_package_names_it(copy, monkeypatch, start, package):
    monkeypatch.setattr(foreign, "_is_installed", lambda module: False)
    folder = copy("llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(start)
    error = refused(folder)
    assert error.code == "E-MODEL-TOKENIZER" and f"pip install {package}" in str(error) and "damaged" not in str(error)

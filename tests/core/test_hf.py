"""After `import core.hf` transformers opens what Quantscope saved, and computes the same; what it cannot honour it refuses."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, pipeline

import core.hf
from core.errors import ArtifactError, BackendError, InputError
from core.evaluation.generate import generate
from core.models.io.quantized import load_quantized, save_quantized
from core.models.tiny import tiny_architectures, tiny_tokenizer
from core.options import BitNetOptions
from core.recipe import SCHEMES, Bits
from tests.core.tools import in_steps, quantised, tokens

IDS = tokens(2, 24, seed=5)
RECIPES = {
    **{f"rptq {scheme}": {"scheme": scheme} for scheme in SCHEMES if scheme != "custom"},
    "official": {"variant": "official"},
    "rtn": {"method": "rtn", "weights": "rtn"},
    "rotation": {"method": "rotation", "scheme": "W4A4"},
    "bitnet a4.8": {"method": "bitnet", "bitnet": BitNetOptions(mode="a4.8", kv_bits=3)},
    "bitnet w1.58a8": {"method": "bitnet", "bitnet": BitNetOptions(mode="w1.58a8")},
    "float weights": {"scheme": "custom", "bits": Bits(k=4, v=4)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "q"
    save_quantized(place, quantised("llama", scheme="W4A4KV").loaded, {})
    return place


def same(q, place) -> None:
    """Save, open by transformers, compare logits, decoding and text."""
    save_quantized(place, q.loaded, {})
    theirs, ours = AutoModelForCausalLM.from_pretrained(place), load_quantized(place)
    assert isinstance(theirs, core.hf.QuantscopeForCausalLM) and not any(p.requires_grad for p in theirs.parameters())
    with torch.inference_mode():
        assert torch.equal(theirs(IDS).logits, q.model(IDS).logits)
        assert torch.equal(in_steps(theirs, IDS), in_steps(q.model, IDS))
    prompt = "Quantised?"
    ids = ours.tokenizer(prompt, return_tensors="pt").input_ids
    found = theirs.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    told = generate(ours.model, ours.tokenizer, prompt, max_new_tokens=12)
    length = told.new_tokens
    assert ours.tokenizer.decode(found[:length], skip_special_tokens=True) == told.text
    assert len(found) == length + (told.stopped == "eos"), "the end token is kept by transformers"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_gives_our_logits_and_text(recipe, tmp_path):
    same(quantised("llama", layers=1, **RECIPES[recipe]), tmp_path / "q")


@pytest.mark.parametrize("architecture", [name for name in tiny_architectures() if name != "llama"])
def test_every_architecture_gives_our_logits_and_text(architecture, tmp_path):
    same(quantised(architecture, layers=1, method="rtn", weights="rtn", scheme="W4A4KV"), tmp_path / "q")


def test_configuration_and_tokenizer_are_the_folders(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is core.hf.QuantscopeConfig and type(config.get_text_config()) is LlamaConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder).config) is LlamaConfig
    read = AutoTokenizer.from_pretrained(folder)
    assert read("héllo <s>").input_ids == tiny_tokenizer()("héllo <s>").input_ids
    assert type(read) is type(load_quantized(folder).tokenizer)


def test_a_pipeline_writes_our_text(folder):
    ours = load_quantized(folder)
    told = generate(ours.model, ours.tokenizer, "abc", max_new_tokens=8)
    found = pipeline("text-generation", model=str(folder))("abc", max_new_tokens=8, do_sample=False)
    assert found[0]["generated_text"] == "abc" + told.text


@pytest.mark.parametrize("options", [
    {"dtype": "auto"}, {"dtype": torch.float32}, {"torch_dtype": "float32"}, {"device_map": "auto"}, {"device_map": "cpu"},
    {"device_map": {"": "cpu"}}, {"trust_remote_code": True, "revision": "main", "local_files_only": True},
    {"attn_implementation": "sdpa"},
], ids=str)
def test_options_that_are_honoured_or_change_nothing(options, folder):
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder, **options)(IDS).logits
        assert torch.equal(theirs, load_quantized(folder).model(IDS).logits)


@pytest.mark.parametrize(("options", "named"), [
    ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16"),
    ({"torch_dtype": "float16"}, "dtype is float16"),
    ({"device_map": "balanced"}, "Device 'balanced' is unknown"),
    ({"device_map": {"decoder": "cpu", "head": "disk"}}, "is unknown: use cpu or cuda"),
    ({"use_cache": False}, "use_cache"),
    ({"output_hidden_states": True}, "output_hidden_states"),
    ({"text_config": {"vocab_size": 8}}, "text_config"),
    ({"load_in_4bit": True}, "load_in_4bit"),
    ({"state_dict": {}}, "state_dict"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"output_loading_info": True}, "output_loading_info"),
], ids=str)
def test_options_that_are_not_honoured_are_refused_by_name(options, named, folder):
    with pytest.raises(InputError, match=named) as caught:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert len(str(caught.value)) < 200 and caught.value.code.startswith("E-PARAM-")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(BackendError, match="No CUDA device"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=0)


def test_a_repository_of_the_hub_is_not_fetched():
    with pytest.raises(InputError, match="'owner/name' is no folder: download the repository"):
        core.hf.QuantscopeForCausalLM.from_pretrained("owner/name")


@pytest.mark.parametrize("name", ["quantscope.safetensors", "quantscope.json"])
def test_a_damaged_folder_is_refused_as_by_our_reader(name, tmp_path):
    save_quantized(tmp_path / "q", quantised("llama", layers=1).loaded, {})
    content = bytearray((tmp_path / "q" / name).read_bytes())
    content[-30] ^= 1
    (tmp_path / "q" / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"The checksum of {name} differs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    (tmp_path / "q" / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_what_is_no_folder_of_ours_gives_no_weights(folder, tmp_path):
    with pytest.raises(TypeError, match="missing"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "quantscope"}))
    with pytest.raises(ArtifactError, match="has no manifest.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_nothing_is_written_by_transformers(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for write in (model.save_pretrained, model.push_to_hub, quantised("llama").base.model.save_pretrained):
        with pytest.raises(InputError, match=r"is not written by transformers \('.*', max_shard_size\): copy the folder"):
            write(str(tmp_path / "out"), max_shard_size="1GB")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is an optional package")
def test_the_harness_takes_the_folder(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours = load_quantized(folder)
    asked = [Instance("loglikelihood", {}, ("one two", " three"), 0), Instance("loglikelihood", {}, ("a", " bc"), 1)]
    by_path = HFLM(pretrained=str(folder), device="cpu", batch_size=1)
    by_model = HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=1)
    assert by_path.loglikelihood(asked) == by_model.loglikelihood(asked)

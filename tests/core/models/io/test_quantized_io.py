"""A saved quantised model is the model: identical logits, or a sentence. Damage is found, nothing is half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from core.errors import ArtifactError, ModelError, QuantscopeError
from core.evaluation.perplexity import Reference, hidden_windows, score
from core.models.io.load import load_model
from core.models.io.quantized import load_quantized, modules_of, read_description, save_quantized
from core.models.tiny import tiny_model, tiny_tokenizer, tiny_transformers
from core.recipe import Bits
from core.storage import atomic_dir
from tests.core.tools import ARCHITECTURES, Quantised, in_steps, quantised, relative, tokens

RECIPES = {
    "rptq": {},
    "official": {"variant": "official"},
    "rtn": {"method": "rtn", "weights": "rtn"},
    "kv only": {"scheme": "W3A3KV"},
    "weights only": {"scheme": "W4A16"},
    "float weights": {"scheme": "custom", "bits": Bits(q=4, k=3, v=2, down_in=8)},
    "every width": {"scheme": "custom", "bits": Bits(7, 8, 7, 6, 5, 8, 4, 3, 2)},
    "softmax only": {"scheme": "custom", "bits": Bits(softmax=8)},
    "8-bit weights": {"scheme": "custom", "bits": Bits(weights=8, v=8)},
}


@pytest.fixture(scope="module")
def made() -> Quantised:
    return quantised("llama")


@pytest.fixture
def saved(made, tmp_path) -> Path:
    save_quantized(tmp_path / "q", made.loaded, {"recipe": made.recipe.to_dict(), "report": {}})
    return tmp_path / "q"


def reseal(folder: Path, change) -> None:
    """Rewrite files of a saved folder and give it a manifest that fits, as a different program might have written it."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    with atomic_dir(folder, replace=True) as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content)
        change(stage)


def refused(folder: Path) -> QuantscopeError:
    with pytest.raises(ArtifactError) as caught:
        load_quantized(folder)
    message = str(caught.value)
    assert 20 < len(message) <= 240 and "\n" not in message and caught.value.code.startswith("E-CKPT")
    return caught.value


def round_trip(q: Quantised, folder: Path) -> None:
    save_quantized(folder, q.loaded, {"recipe": q.recipe.to_dict()})
    back = load_quantized(folder)
    ids = tokens(2, 21, seed=1)
    assert torch.equal(back.model(ids).logits, q.model(ids).logits)
    caches = q.model.decoder.new_cache(), back.model.decoder.new_cache()
    assert [type(layer) for layer in caches[0].layers] == [type(layer) for layer in caches[1].layers]
    assert torch.equal(in_steps(back.model, ids, caches[1]), in_steps(q.model, ids, caches[0]))
    one, other = (dict(m.state_dict()) for m in (q.model, back.model))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)
    assert [(m.bits, m.effective_bits, m.choice) for m in modules_of(q.model)] == [
        (m.bits, m.effective_bits, m.choice) for m in modules_of(back.model)
    ]
    differing = {k for k, v in back.model.config.to_dict().items() if q.model.config.to_dict()[k] != v}
    assert differing <= {"_name_or_path"}
    assert back.path == folder and back.source == q.loaded.source and not any(p.requires_grad for p in back.model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip(recipe, tmp_path):
    round_trip(quantised("qwen3", layers=1, **RECIPES[recipe]), tmp_path / "q")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_of_every_architecture(architecture, tmp_path):
    round_trip(quantised(architecture, layers=3), tmp_path / "q")


@pytest.mark.parametrize(
    "options",
    [{"tie_word_embeddings": True}, {"word_embed_proj_dim": 32}, {"sliding_window": 9}],
    ids=("tied llama", "projected opt", "sliding mistral"),
)
def test_round_trip_of_options(options, tmp_path):
    architecture = {"tie_word_embeddings": "llama", "word_embed_proj_dim": "opt", "sliding_window": "mistral"}[
        next(iter(options))
    ]
    round_trip(quantised(architecture, base=tiny_model(architecture, **options), scheme="W4A4KV"), tmp_path / "q")


def test_mixed_layer_types_survive(tmp_path):
    options = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    round_trip(quantised("qwen2", base=tiny_model("qwen2", layers=3, **options), scheme="W4A4KV"), tmp_path / "q")


def test_the_folder_needs_nothing_of_the_float_model(saved, made):
    assert {p.name for p in saved.iterdir()} >= {
        "quantscope.json",
        "quantscope.safetensors",
        "config.json",
        "manifest.json",
        "tokenizer.json",
    }
    tensors = load_file(saved / "quantscope.safetensors")
    hidden = made.base.model.config.hidden_size
    floats = [k for k, t in tensors.items() if t.is_floating_point() and t.dim() == 2 and min(t.shape) >= hidden]
    assert all(k.startswith("shell.") for k in floats), "no float copy of a decoder weight"
    facts = read_description(saved)
    assert facts["recipe"] == made.recipe.to_dict() and facts["base"]["name"] == made.base.name and len(facts["layers"]) == 2


def test_load_model_accepts_the_folder(saved, made):
    loaded = load_model(str(saved))
    ids = tokens(1, 12)
    assert torch.equal(loaded.model(ids).logits, made.model(ids).logits)
    assert loaded.tokenizer("héllo").input_ids == made.base.tokenizer("héllo").input_ids


def test_what_generation_needs_is_kept(tmp_path):
    """Several end tokens and prefix ids live in generation_config.json: they decide texts and the evaluation protocol."""
    base = tiny_model("llama")
    base.model.generation_config = GenerationConfig(eos_token_id=[257, 10], prefix_token_ids=[256, 5])
    q = quantised("llama", base=base)
    save_quantized(tmp_path / "q", q.loaded, {})
    back = load_quantized(tmp_path / "q").model.generation_config
    assert back.eos_token_id == [257, 10] and back.prefix_token_ids == [256, 5]


def test_saving_twice_replaces_and_a_failed_save_leaves_the_old(saved, made, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises((ValueError, TypeError)):
        save_quantized(saved, made.loaded, {"report": {"bad": math.nan}})
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before and [p.name for p in saved.parent.iterdir()] == ["q"]
    other = quantised("llama", scheme="W4A16")
    save_quantized(saved, other.loaded, {"report": {}})
    assert torch.equal(load_quantized(saved).model(tokens(1, 8)).logits, other.model(tokens(1, 8)).logits)


def test_a_save_that_fails_leaves_nothing(made, tmp_path, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk")

    monkeypatch.setattr(type(made.loaded.tokenizer), "save_pretrained", fail)
    with pytest.raises(RuntimeError):
        save_quantized(tmp_path / "q", made.loaded, {})
    assert list(tmp_path.iterdir()) == []


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(ArtifactError, match="not quantised") as caught:
        save_quantized(tmp_path / "q", tiny_model("llama"), {})
    assert caught.value.code == "E-CKPT-KIND" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ("quantscope.json", "quantscope.safetensors", "config.json", "manifest.json", "tokenizer.json"))
def test_a_missing_file_is_refused(saved, name):
    (saved / name).unlink()
    refused(saved)


@pytest.mark.parametrize("name", ("quantscope.json", "quantscope.safetensors", "config.json", "manifest.json"))
@pytest.mark.parametrize("damage", ("cut", "empty", "longer"))
def test_a_file_of_another_size_is_refused(saved, name, damage):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes({"cut": content[:-40], "empty": b"", "longer": content + b"}"}[damage])
    refused(saved)


@pytest.mark.parametrize("name", ("quantscope.json", "quantscope.safetensors", "config.json"))
def test_changed_bytes_of_equal_length_are_refused(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-30] ^= 1
    (saved / name).write_bytes(content)
    refused(saved)


def edit_json(name: str, change):
    def apply(stage: Path) -> None:
        facts = json.loads((stage / name).read_text())
        change(facts)
        (stage / name).write_text(json.dumps(facts))

    return apply


def edit_tensors(change):
    def apply(stage: Path) -> None:
        tensors = load_file(stage / "quantscope.safetensors")
        change(tensors)
        save_file(tensors, stage / "quantscope.safetensors")

    return apply


FACTS = {
    "other format": lambda f: f.update(format=99),
    "no format": lambda f: f.pop("format"),
    "no layers": lambda f: f.pop("layers"),
    "fewer layers": lambda f: f["layers"].pop(),
    "layers of another type": lambda f: f.update(layers=[1, 2]),
    "layers null": lambda f: f.update(layers=None),
    "layer null": lambda f: f["layers"].__setitem__(0, None),
    "no base": lambda f: f.pop("base"),
    "base null": lambda f: f.update(base=None),
    "more bits": lambda f: f["layers"][0]["linears"]["qkv"].update(bits=5),
    "9 bits": lambda f: f["layers"][0]["linears"]["o"].update(bits=9),
    "bits as text": lambda f: f["layers"][0]["linears"]["o"].update(bits="4"),
    "bits null": lambda f: f["layers"][0]["linears"]["o"].update(bits=None),
    "a float weight that is not there": lambda f: f["layers"][0]["linears"]["o"].update(bits=16),
    "other width": lambda f: f["layers"][1]["linears"]["down"].update(in_features=97),
    "no site": lambda f: f["layers"][0]["sites"].pop("k"),
    "negative input bits": lambda f: f["layers"][0]["linears"]["o"].update(input_bits=-3),
    "40 input bits": lambda f: f["layers"][0]["linears"]["o"].update(input_bits=40),
    "site bits as text": lambda f: f["layers"][0]["sites"].update(k="x"),
    "no softmax": lambda f: f["layers"][0].pop("softmax_bits"),
    "softmax 0": lambda f: f["layers"][0].update(softmax_bits=0),
    "sink null": lambda f: f["layers"][0].update(sink_tokens=None),
    "no quantiser where there was one": lambda f: f["layers"][0]["sites"].update(k=None),
}


@pytest.mark.parametrize("change", FACTS)
def test_facts_that_do_not_fit_the_tensors_are_refused(saved, change):
    reseal(saved, edit_json("quantscope.json", FACTS[change]))
    refused(saved)


def test_facts_that_are_not_an_object_are_refused(saved):
    for text in ("[]", "null", "3", "{", "\x00", '{"format": 1'):
        reseal(saved, lambda stage, t=text: (stage / "quantscope.json").write_text(t))
        refused(saved)


TENSORS = {
    "a block tensor missing": lambda t: t.pop("blocks.0.qkv.packed"),
    "a scale missing": lambda t: t.pop("blocks.1.k_quantizer.scale"),
    "the embedding missing": lambda t: t.pop("shell.model.embed_tokens.weight"),
    "the last norm missing": lambda t: t.pop("shell.model.norm.weight"),
    "the head missing": lambda t: t.pop("shell.lm_head.weight"),
    "an order missing": lambda t: t.pop("blocks.0.norm1.order"),
    "a norm missing": lambda t: t.pop("blocks.0.norm1.weight"),
    "R2 missing": lambda t: t.pop("blocks.0.rope_order"),
    "an unknown shell tensor": lambda t: t.update({"shell.extra": torch.zeros(2)}),
    "an unknown block tensor": lambda t: t.update({"blocks.0.extra": torch.zeros(2)}),
    "a block too many": lambda t: t.update({"blocks.2.qkv.packed": torch.zeros(2)}),
    "a foreign tensor": lambda t: t.update({"x": torch.zeros(2)}),
    "packed cut": lambda t: t.update({"blocks.0.o.packed": t["blocks.0.o.packed"][:, :-1].contiguous()}),
    "offsets not covering": lambda t: t.update({"blocks.0.o.offsets": t["blocks.0.o.offsets"] + 1}),
    "an order out of range": lambda t: t.update({"blocks.0.norm1.order": t["blocks.0.norm1.order"] + 1}),
    "an order that repeats": lambda t: t.update({"blocks.0.norm1.order": torch.zeros_like(t["blocks.0.norm1.order"])}),
    "R2 out of range": lambda t: t.update({"blocks.0.rope_order": t["blocks.0.rope_order"] + 3}),
    "a norm of another width": lambda t: t.update({"blocks.0.norm1.weight": t["blocks.0.norm1.weight"][:-1].contiguous()}),
    "an embedding of another width": lambda t: t.update({"shell.model.embed_tokens.weight": torch.zeros(259, 63)}),
    "nan": lambda t: t["blocks.0.o.weight_scale"].fill_(math.nan),
    "a zero scale": lambda t: t["blocks.0.k_quantizer.scale"].zero_(),
    "infinity": lambda t: t["shell.model.norm.weight"].fill_(math.inf),
}


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_do_not_fit_are_refused(saved, change):
    reseal(saved, edit_tensors(TENSORS[change]))
    refused(saved)


def test_a_configuration_of_another_architecture_is_refused(saved):
    reseal(saved, edit_json("config.json", lambda c: c["text_config"].update(model_type="gpt2")))
    with pytest.raises(QuantscopeError):
        load_quantized(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 128},
        {"num_attention_heads": 4},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 8},
        {"intermediate_size": 50},
        {"vocab_size": 12},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_configuration_of_another_shape_is_refused(saved, change):
    reseal(saved, edit_json("config.json", lambda c: c["text_config"].update(change)))
    refused(saved)


@pytest.mark.parametrize("value", ("big", 1e9, -1, None, 2**40), ids=str)
def test_an_impossible_configuration_is_refused(saved, value):
    """Before transformers reads it."""
    reseal(saved, edit_json("config.json", lambda c: c["text_config"].update(intermediate_size=value)))
    if value == 2**40:
        with pytest.raises(ModelError, match="limit"):
            load_quantized(saved)
    else:
        refused(saved)


def test_code_beside_a_quantised_model_is_refused(saved):
    reseal(saved, edit_json("tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["x.X", None]})))
    refused(saved)


def test_memory_is_checked_before_a_quantised_model_is_loaded(saved, monkeypatch):
    monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", "0.00001")
    with pytest.raises(ModelError, match="limit") as caught:
        load_quantized(saved)
    assert caught.value.code == "E-MODEL-SIZE"


@pytest.mark.parametrize("source", ["in memory", "from a folder"])
def test_a_head_of_its_own_beside_a_flag_that_says_tied(source, tmp_path):
    """`tie_word_embeddings` is true, and the checkpoint has an lm_head all the same: the head is what counts."""
    theirs = tiny_transformers("llama")
    theirs.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base = load_model(str(tmp_path / "base"))
    assert relative(base.model(tokens(1, 9)).logits, theirs(tokens(1, 9)).logits) < 1e-5
    made = quantised("llama", base=base, scheme="W4A4KV", weights="rtn")
    save_quantized(tmp_path / "q", made.loaded, {})
    back = load_quantized(tmp_path / "q") if source == "in memory" else load_model(str(tmp_path / "q"))
    windows = tokens(2, 16)
    reference = Reference("before", made.model.decoder.head, hidden_windows(made.model, windows))
    scored = score(back.model, windows, reference=reference)
    assert scored.kld_mean <= 1e-6 and torch.equal(back.model.decoder.head.weight, theirs.lm_head.weight)

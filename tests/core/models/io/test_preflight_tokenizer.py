"""Tokenizers that are bombs are refused before the tokenizers library sees them, and published ones pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from core.errors import ModelError
from core.models.io.load import load_model
from core.models.io.preflight.folder import check_folder
from core.models.io.preflight.tokenizer import MAX_ADDED, check_brackets, check_settings, check_tokenizer
from core.models.tiny import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    save_tiny(tmp_path / "m", "llama")
    (tmp_path / "m" / "manifest.json").unlink()
    return tmp_path / "m"


def replace(content: str, **pattern: str) -> dict:
    """A normaliser that replaces text."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict) -> dict:
    """A normaliser of several."""
    return {"type": "Sequence", "normalizers": list(steps)}


BOMBS: dict[str, Callable[[dict], object]] = {
    "added tokens": lambda t: t["added_tokens"].extend({"id": i, "content": f"<{i}>"} for i in range(300, 301 + MAX_ADDED)),
    "long token": lambda t: t["model"]["vocab"].update({"x" * 10**6: 5000}),
    "long added": lambda t: t["added_tokens"].append({"id": 999, "content": "x" * 10**6}),
    "growth": lambda t: t.update(normalizer=sequence(*[replace("e" * 100, String="e")] * 3)),
    "nothing": lambda t: t.update(normalizer=sequence(*[replace("ee", Regex="")] * 4)),
    "nested": lambda t: t.update(normalizer=sequence(sequence(sequence(replace("e" * 100, String="e"))))),
    "steps": lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}] * 65}),
    "depth": lambda t: t.update(normalizer=sequence(sequence(sequence(sequence(sequence(sequence())))))),
    "pattern": lambda t: t.update(normalizer=replace("", Regex="a" * 10**5)),
    "decoder": lambda t: t.update(decoder={"type": "Sequence", "decoders": [replace("e" * 100, String="e")]}),
    "no model": lambda t: t.pop("model"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_the_library_reads_it_and_its_file_named(model, name, monkeypatch):
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    BOMBS[name](tokenizer)
    file.write_text(json.dumps(tokenizer))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("the library reads it"))
    with pytest.raises(ModelError, match=r"^tokenizer\.json ") as refused:
        load_model(str(model))
    assert refused.value.code == "E-MODEL-TOKENIZER"


@pytest.mark.parametrize("content", [{"a": "x" * 10**5}, {"additional_special_tokens": ["x"] * 30_000}, {"x" * 10**5: 1},
                                     {"added_tokens_decoder": {str(i): {"content": "x"} for i in range(30_000)}},
                                     {"extra_special_tokens": 7}])  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_settings_that_are_bombs_are_refused(model, name, content):
    (model / name).write_text(json.dumps(content))
    with pytest.raises(ModelError) as refused:
        check_folder(model)
    assert str(refused.value).startswith(name)


def test_millions_of_lists_are_refused_before_they_are_parsed(model, monkeypatch):
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda raw, **more: parse(raw, **more) if len(raw) < 10**6 else pytest.fail("parsed"))
    (model / "tokenizer.json").write_text('{"model": [' + "[]," * 4_100_000 + "[]]}")
    with pytest.raises(ModelError, match="millions of lists"):
        check_folder(model)
    check_brackets(b"[]" * 1000, "x")


def test_published_forms_pass():
    llama = {"model": {"vocab": {"a": 0}, "merges": [["a", "b"], "a b"]},
             "normalizer": sequence({"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),
             "decoder": {"type": "Sequence", "decoders": [replace(" ", String="▁"), {"type": "ByteFallback"}]}}  # fmt: skip
    qwen = {"model": {"vocab": {"a": 0}}, "normalizer": {"type": "NFC"}, "added_tokens": [{"content": "<|im_start|>"}] * 30,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "a|b"}}]}}  # fmt: skip
    unigram = {"model": {"vocab": [["<pad>", 0.0], ["▁the", -3.2]]}, "normalizer": {"type": "Precompiled",
               "precompiled_charsmap": "A" * 400_000}}  # fmt: skip
    for tokenizer in (llama, qwen, unigram):
        check_tokenizer(tokenizer)
    check_settings({"chat_template": "x" * 10**5, "additional_special_tokens": ["<a>"], "model_max_length": 10**30}, "t")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
                    max_leaves=10)  # fmt: skip
KEYS = ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON), JSON)
def test_any_content_is_taken_or_refused(tokenizer, part):
    replacing = {"model": {"vocab": part}, "normalizer": {"type": "Replace", "pattern": part, "content": part}}
    for content in (tokenizer, {"model": {}, **tokenizer}, replacing):
        try:
            check_tokenizer(content)
        except ModelError as refused:
            assert refused.code == "E-MODEL-TOKENIZER"
    if isinstance(part, dict):
        try:
            check_settings(part, "f")
        except ModelError as refused:
            assert str(refused).startswith("f ")


def test_what_only_the_configuration_promises_is_not_allocated(model):
    """A file of 600 kB whose configuration describes an embedding of 4 GB that it does not hold."""
    width, row = 32_768, torch.bfloat16
    shapes = {"self_attn.q_proj": (2, width), "self_attn.k_proj": (2, width), "self_attn.v_proj": (2, width),
              "self_attn.o_proj": (width, 2), "mlp.gate_proj": (1, width), "mlp.up_proj": (1, width),
              "mlp.down_proj": (width, 1), "input_layernorm": (width,), "post_attention_layernorm": (width,)}  # fmt: skip
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(shape, dtype=row) for name, shape in shapes.items()}
    save_file(tensors | {"model.norm.weight": torch.zeros(width, dtype=row)}, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": width, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 1,
               "num_hidden_layers": 1, "vocab_size": 30_000, "tie_word_embeddings": True}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    before = _peak_bytes()
    with pytest.raises(ModelError, match="embed_tokens"):
        load_model(str(model))
    assert _peak_bytes() - before < 100e6


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

"""What is exported as GGUF is the model: gguf's own dequantiser gives our weights, our own loader our logits and tokenizer."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer

from core.errors import InputError
from core.models.export.export import export_model
from core.models.export.unfold import projections
from core.models.io.catalog import EMBEDDED
from core.models.io.gguf import stored_name
from core.models.io.gguf_tokenizer import tokenizer_of
from core.models.io.load import load_model
from core.models.io.preflight.gguf import read_gguf_header
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model
from tests.core.models.export.export_tools import made
from tests.core.models.io.conftest import own_cache  # noqa: F401 - a fixture
from tests.core.models.io.gguf_files import LLAMA3, write_gguf
from tests.core.tools import quantised, relative, tiny_source, tokens

pytestmark = pytest.mark.usefixtures("own_cache")
IDS = tokens(2, 40, seed=3)


def read_back(folder) -> LoadedModel:
    return load_model(str(folder / "model.gguf"))


def types_of(folder) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize(("architecture", "recipe", "kinds"), [
    ("llama", "W4A16", {"Q8_0"}),
    ("llama", "W3A16", {"Q4_0"}),
    ("llama", "W2A16", {"Q4_0"}),
    ("llama", "W6A16", {"Q8_0"}),
    ("llama", "groups", {"Q8_0"}),
    ("mistral", "W4A16", {"Q8_0"}),
    ("qwen2", "W3A16", {"Q4_0"}),
    ("qwen3", "W4A16", {"Q8_0"}),
    ("smollm", "W3A16", {"Q4_0"}),
])
def test_weights_and_logits_are_ours(architecture, recipe, kinds, tmp_path):
    q = made(recipe, architecture)
    export_model(tmp_path / "out", q.loaded, "gguf")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {stored[stored_name(f"{p.name}.weight")].tensor_type.name for p in projections(q.model)} == kinds
    heads = q.model.config.num_attention_heads, q.model.config.num_key_value_heads
    for p in projections(q.model, floats=True):
        tensor = stored[stored_name(f"{p.name}.weight")]
        found, expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)), p.weight
        if architecture != "qwen2" and architecture != "qwen3" and p.name.endswith(("q_proj", "k_proj")):
            count = heads[p.name.endswith("k_proj")]
            expected = expected.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)  # llama.cpp's order of rows
        assert torch.equal(found, expected), p.name
    back = read_back(tmp_path / "out")
    assert relative(back.model(IDS).logits, q.model(IDS).logits) <= 1e-5
    assert back.tokenizer("Two words 12").input_ids == q.loaded.tokenizer("Two words 12").input_ids


def test_ternary_weights_keep_their_codes(tmp_path):
    q = made("ternary")
    report = export_model(tmp_path / "out", q.loaded, "gguf")
    assert "float16" in report.differences[0]
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    kinds = set()
    for p in projections(q.model):
        if p.name.endswith(("q_proj", "k_proj")):
            continue
        tensor = stored[stored_name(f"{p.name}.weight")]
        kinds.add(tensor.tensor_type.name)
        scale = p.weight.scale.half().float()
        assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), (p.weight.codes.float() * scale).numpy())
    assert kinds == {"TQ2_0", "Q4_0"}  # 256 columns, and the 128 of the heads
    back = read_back(tmp_path / "out")
    ours = {p.name: p.weight for p in projections(q.model, floats=True)}
    theirs = {p.name: p.weight for p in projections(back.model, floats=True)}
    assert all(torch.equal(theirs[name].sign(), ours[name].sign()) for name in ours)
    assert all(torch.allclose(theirs[name], ours[name], rtol=5e-4, atol=0) for name in ours)


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_rotary_positions_are_carried_over(rope, tmp_path):
    q = quantised("llama", base=tiny_model("llama", rope_parameters=rope), method="rtn", weights="rtn", scheme="W4A16")
    export_model(tmp_path / "out", q.loaded, "gguf")
    assert relative(read_back(tmp_path / "out").model(IDS).logits, q.model(IDS).logits) <= 1e-5


def test_every_token_that_ends_a_text_is_carried_over(tmp_path):
    base = tiny_model("llama")
    base.model.generation_config.eos_token_id = [257, 258]
    export_model(tmp_path / "out", quantised("llama", base=base, method="rtn", weights="rtn", scheme="W4A16").loaded, "gguf")
    assert read_back(tmp_path / "out").model.generation_config.eos_token_id == [257, 258]


def test_an_embedded_tokenizer_is_carried_over(tmp_path):
    """The embedding has three rows more than the tokenizer has tokens."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "quantscope-llama-6m")
    base = replace(tiny_model("llama", vocab_size=len(tokenizer) + 3), tokenizer=tokenizer)
    q = quantised("llama", base=base, method="rtn", weights="rtn", scheme="W4A16")
    export_model(tmp_path / "out", q.loaded, "gguf")
    back, text = read_back(tmp_path / "out").tokenizer, "Once upon a time, there were 12 cats; they'd slept."
    ids = tokenizer(text).input_ids
    assert back(text).input_ids == ids and back.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_the_rule_of_a_tokenizer_is_found(name, tmp_path):
    tokens = {"tokenizer.ggml.pre": name}
    path = write_gguf(tmp_path / "m.gguf", tiny_source("llama"), keys=tokens)
    tokenizer = tokenizer_of(read_gguf_header(path))
    base = replace(tiny_model("llama"), tokenizer=tokenizer)
    q = quantised("llama", base=base, method="rtn", weights="rtn", scheme="W4A16")
    export_model(tmp_path / "out", q.loaded, "gguf")
    back = read_back(tmp_path / "out").tokenizer
    assert back.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    with pytest.raises(InputError, match="no byte-level BPE that cuts text by a rule known here"):
        export_model(tmp_path / "other", q.loaded, "gguf")

"""A GGUF file's tokenizer cuts texts as its rule says, and keeps its added tokens, ends and template."""

from __future__ import annotations

import numpy as np
import pytest

from core.models.io.load import load_model
from tests.core.models.io.gguf_files import REMOVE, write_gguf
from tests.core.tools import tiny_source

pytestmark = pytest.mark.usefixtures("own_cache")


def test_texts_are_cut_as_the_name_says(tmp_path):
    made = tiny_source("llama", seed=3)
    letters = [made.tokenizer.convert_ids_to_tokens(index) for index in range(256)]
    words = ["12", "123", "'s", "'S", "ab", "Ġab"]
    tokens = [*letters, "<s>", "</s>", "<unk>", *words]
    merges = ["1 2", "12 3", "' s", "' S", "a b", "Ġ ab"]
    expected = {
        "gpt-2": (["123", "Ġab", "'s"], "123 ab's"),
        "smollm": (["1", "2", "3", "Ġab"], "123 ab"),
        "llama-bpe": (["123", "4", "'S"], "1234'S"),
        "qwen2": (["1", "2", "'s"], "12's"),
        "tekken": (["1", "2", "ab"], "12ab"),
    }
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3 + [1] * len(words),
    }
    table = {"token_embd.weight": np.ones((len(tokens), 64), np.float32), "output.weight": np.ones((len(tokens), 64), np.float32)}
    for rule, (pieces, text) in expected.items():
        path = write_gguf(tmp_path / f"{rule}.gguf", made, keys=keys | {"tokenizer.ggml.pre": rule}, tensors=table)
        tokenizer = load_model(str(path)).tokenizer
        assert tokenizer.tokenize(text) == pieces, rule
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
        starts = tokenizer("a").input_ids[0] == 256
        assert starts == (rule in ("llama-bpe", "tekken"))


def test_added_tokens_ends_and_template_are_kept(tmp_path):
    made = tiny_source("llama", seed=3)
    tokens = [made.tokenizer.convert_ids_to_tokens(index) for index in range(256)] + ["<|start|>", "<|end|>", "<think>"]
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 4],
        "tokenizer.ggml.eot_token_id": 256,
        "tokenizer.ggml.unknown_token_id": REMOVE,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|end|>",
    }
    found = load_model(str(write_gguf(tmp_path / "x.gguf", made, keys=keys)))
    ids = found.tokenizer("a<think>b<|end|>").input_ids
    assert (ids[0], ids[-1]) == (256, 257) and 258 in ids and ids[-2] == 257
    assert found.tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert found.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<|end|>"
    assert set(found.model.generation_config.eos_token_id) == {256, 257}
    assert (found.tokenizer.eos_token, found.tokenizer.bos_token) == ("<|end|>", "<|start|>")


def test_a_sentencepiece_vocabulary_merges_by_score(tmp_path):
    made = tiny_source("llama", seed=3)
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(230)], "▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab"]
    pieces += [f"<pad{index}>" for index in range(259 - len(pieces))]
    scores = {"bc": -1.0, "ab": -2.0, "▁a": -3.0, "▁ab": -4.0}
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [scores.get(piece, -100.0) for piece in pieces],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 230 + [1] * 26,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": REMOVE,
    }
    tokenizer = load_model(str(write_gguf(tmp_path / "x.gguf", made, keys=keys))).tokenizer
    assert tokenizer.tokenize("abc ab") == ["▁a", "bc", "▁ab"]
    assert (
        tokenizer("ab").input_ids[0] == 1
        and tokenizer.decode(tokenizer("ab é c").input_ids, skip_special_tokens=True) == "ab é c"
    )

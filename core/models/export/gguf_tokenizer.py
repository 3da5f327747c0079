"""Write a byte-level BPE tokenizer into the header of a GGUF file, as `core.models.io.gguf_tokenizer` reads it."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from core.models.export.scheme import Unfit
from core.models.io.gguf_tokenizer import cut_by

RULES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
"""Names of `tokenizer.ggml.pre`, one for each known way to cut text into words."""


def pre_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the rule by which a tokenizer cuts text. Raises: Unfit for another kind of tokenizer or rule."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = {} if backend is None else json.loads(backend.to_str())
    kind = own.get("model") or {}
    if kind.get("type") != "BPE" or kind.get("byte_fallback"):
        raise Unfit("its tokenizer is not byte-level BPE")
    for name in RULES:
        other = Tokenizer(models.BPE())
        cut_by(other, name)
        known = json.loads(other.to_str())
        if all(_core(own[part]) == _core(known[part]) for part in ("pre_tokenizer", "normalizer")):
            return name
    raise Unfit("its tokenizer cuts text by a rule that GGUF has no name for here")


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Add the keys of a tokenizer.

    Args: size: rows of the model's embedding; rows without a token get names of their own.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED for entry in document["added_tokens"]}
    kinds = [added.get(index, TokenType.NORMAL if index in tokens else TokenType.UNUSED) for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_rule(tokenizer))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(kinds)
    merges = document["model"]["merges"]
    if merges:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _core(value: Any) -> Any:
    """Return a part of a tokenizer's description without what changes offsets alone, or is off."""
    if isinstance(value, dict):
        return {name: _core(part) for name, part in value.items() if name != "trim_offsets"}
    return [_core(part) for part in value] if isinstance(value, list) else value

"""Write a byte-level BPE tokenizer into the header of a GGUF file, as `core/models/io` reads it."""

from __future__ import annotations

import json

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from core.models.io.gguf_tokenizer import rule_of


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, stops: int | list[int] | None = None
) -> None:
    """Add the keys of a tokenizer whose rule has a name (`rule_of`).

    Args:
        size: rows of the model's embedding; rows without a token get names of their own.
        stops: ids of the tokens that end a text; two are stated beside the tokenizer's own.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED for entry in document["added_tokens"]}
    kinds = [added.get(index, TokenType.NORMAL if index in tokens else TokenType.UNUSED) for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_of(tokenizer))
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
    others = [number for number in (stops if isinstance(stops, list) else []) if number != tokenizer.eos_token_id]
    for number, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)

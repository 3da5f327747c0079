"""Build the tokenizer that a GGUF header describes, with the tokenizers library.

    tokenizer.ggml.model gpt2     byte-level BPE; `tokenizer.ggml.pre` names how text is cut before merging (`_SPLITS`)
    tokenizer.ggml.model llama    SentencePiece BPE with byte fallback; merges follow from the scores of the tokens

A file with a rule that is not in the table is refused: other rules cut text into other tokens, and the model's output would be
wrong. Source of names and rules: github.com/ggml-org/llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of the models.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from core.errors import ModelError
from core.models.io.foreign import tokenizer_errors
from core.models.io.preflight.gguf import GgufHeader

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = "gpt2", "digits"
_SPLITS = (
    dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais", "mpt", "trillion"), _GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS)
    | dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), _LLAMA3)
    | dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _QWEN2)
    | {"tekken": _TEKKEN}
)
"""Rules by the name in `tokenizer.ggml.pre`: a regular expression, GPT-2's own, or single digits followed by GPT-2's."""

_UNKNOWN, _CONTROL, _USER = 2, 3, 4


def tokenizer_of(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Build the fast tokenizer of a checked header, with its special tokens and its chat template.

    Raises: ModelError E-MODEL-TOKENIZER naming what is missing or not supported.
    """
    kind, tokens = _value(header, "model", ""), _tokens(header)
    if kind not in ("gpt2", "llama"):
        raise _bad(header, f"its tokenizer is of the kind {str(kind)[:20]!r} (tokenizer.ggml.model); gpt2 and llama are read")
    with tokenizer_errors(f"The tokenizer in {header.file} cannot be rebuilt. Choose another file."):
        backend = _byte_level(header, tokens) if kind == "gpt2" else _sentencepiece(header, tokens)
        types = _value(header, "token_type", [])
        for number, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER, False)):
            backend.add_tokens(
                [
                    AddedToken(token, normalized=False, special=special)
                    for token, own in zip(tokens, types, strict=False)
                    if own == number and token
                ]
            )
        names = {
            name: _special(header, tokens, key)
            for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
        }
        _add_ends(backend, header, names, tokens)
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            **{name: token for name, token in names.items() if token is not None},
        )
    template = header.values.get("tokenizer.chat_template")
    if isinstance(template, str):
        made.chat_template = template
    return made


def _byte_level(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    name = _value(header, "pre", None)
    if name not in _SPLITS:
        stated = "does not say how text is cut into words" if name is None else f"cuts text by the rule {str(name)[:30]!r}"
        raise _bad(header, f"it {stated} (tokenizer.ggml.pre), and only the rules of known models are read")
    rule, merges = _SPLITS[name], [_text(entry) for entry in _value(header, "merges", [])]
    letters = sum(
        1
        for token, own in zip(tokens, _value(header, "token_type", [1] * len(tokens)), strict=False)
        if own == 1 and len(token) > 1
    )
    if not merges and letters:
        raise _bad(header, "it has no tokenizer.ggml.merges")
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            ignore_merges=_joins_whole_words(rule),
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
        )
    )
    _cut_by(backend, rule)
    backend.decoder = decoders.ByteLevel()
    return backend


def rule_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Find the name, of `tokenizer.ggml.pre`, of the rule by which a byte-level tokenizer cuts text; None where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = {} if backend is None else json.loads(backend.to_str())
    kind = own.get("model") or {}
    if kind.get("type") != "BPE" or kind.get("byte_fallback"):
        return None
    for name, rule in _SPLITS.items():
        other = Tokenizer(models.BPE())
        _cut_by(other, rule)
        known = json.loads(other.to_str())
        if all(_without_offsets(own[part]) == _without_offsets(known[part]) for part in ("pre_tokenizer", "normalizer")):
            return name
    return None


def _without_offsets(value: Any) -> Any:
    """Return a part of a tokenizer's description without what changes offsets alone."""
    if isinstance(value, dict):
        return {name: _without_offsets(part) for name, part in value.items() if name != "trim_offsets"}
    return [_without_offsets(part) for part in value] if isinstance(value, list) else value


def _cut_by(backend: Tokenizer, rule: str) -> None:
    """Set how a tokenizer cuts text into words: a value of `_SPLITS`."""
    if rule in (_GPT2, _DIGITS):
        cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if rule == _DIGITS:
            cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        cuts = [
            pre_tokenizers.Split(Regex(rule), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    backend.pre_tokenizer = cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(cuts)
    if rule == _QWEN2:
        backend.normalizer = normalizers.NFC()


def _joins_whole_words(rule: str) -> bool:
    """Say whether a word that is a token is never split, whatever the merges say: Llama 3's and Mistral's rule."""
    return rule in (_LLAMA3, _TEKKEN)


def _sentencepiece(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    scores, unknown = _value(header, "scores", []), _special(header, tokens, "unknown")
    if len(scores) != len(tokens):
        raise _bad(header, f"it has {len(scores):,} tokenizer.ggml.scores for {len(tokens):,} tokens")
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _value(header, "add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """List the pairs of tokens that join to a token, best score of the result first: SentencePiece's rule, as merges."""
    ids = {token: index for index, token in enumerate(tokens)}
    found = [
        (-score, ids[left], ids[right], left, right)
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if (left := token[:cut]) in ids and (right := token[cut:]) in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _add_ends(backend: Tokenizer, header: GgufHeader, names: dict[str, str | None], tokens: list[str]) -> None:
    """Add the tokens around a text that the header asks for; where it says nothing, llama.cpp's defaults."""
    default = _value(header, "model", "") == "llama" or _joins_whole_words(_SPLITS.get(_value(header, "pre", None), ""))
    first = names["bos_token"] if _value(header, "add_bos_token", default) else None
    last = names["eos_token"] if _value(header, "add_eos_token", False) else None
    parts = [part for part in (first, "$A", last) if part is not None]
    if len(parts) > 1:
        special = [(token, tokens.index(token)) for token in dict.fromkeys((first, last)) if token is not None]
        byte_level = processors.ByteLevel(trim_offsets=False)
        backend.post_processor = processors.Sequence(
            [byte_level, processors.TemplateProcessing(single=" ".join(parts), special_tokens=special)]
        )


def _tokens(header: GgufHeader) -> list[str]:
    found = _value(header, "tokens", [])
    if not found:
        raise _bad(header, "it has no tokenizer.ggml.tokens")
    return [_text(entry) for entry in found]


def _special(header: GgufHeader, tokens: list[str], name: str) -> str | None:
    """Return the token whose id the header gives, or None."""
    index = header.values.get(f"tokenizer.ggml.{name}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise _bad(header, f"its tokenizer.ggml.{name}_token_id is {str(index)[:20]} of {len(tokens):,} tokens")
    return tokens[index]


def _value(header: GgufHeader, name: str, default: Any) -> Any:
    """Return a key of the tokenizer; a value of another type than the default's refuses the file."""
    value = header.values.get(f"tokenizer.ggml.{name}", default)
    if default is not None and type(value) is not type(default):
        raise _bad(header, f"its tokenizer.ggml.{name} is of another type than it must be")
    return value


def _text(entry: Any) -> str:
    return entry.decode("utf-8", "replace") if isinstance(entry, bytes) else str(entry)


def _bad(header: GgufHeader, reason: str) -> ModelError:
    return ModelError(
        f"The tokenizer of {header.file} cannot be used: {reason}. Choose another file, or the model's safetensors folder.",
        code="E-MODEL-TOKENIZER",
    )

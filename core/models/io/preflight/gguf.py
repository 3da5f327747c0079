"""Read a GGUF file's header within fixed limits: keys, values, places of tensors; no tensor data.

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian: magic "GGUF", uint32 version, uint64 tensor count,
uint64 key count; per key: string key, uint32 type, value; per tensor: string name, uint32 dimensions, uint64 each,
uint32 type, uint64 offset; padding to `general.alignment`; data. A string is a uint64 length and its bytes. The reader of
the `gguf` package is not used: it follows any stated length, so a file of 49 bytes can keep it busy for hours.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from core.errors import ModelError
from core.models.io.preflight.config import MAX_HIDDEN, MAX_LAYERS, MAX_VOCAB

MAX_KEYS = 10_000
MAX_TENSORS = 20_000
MAX_STRING = 2**20
MAX_ARRAY = 1_000_000
MAX_ELEMENTS = 3_000_000
MAX_HEADER_BYTES = 64 * 2**20
MAX_ALIGNMENT = 4_096
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
          10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
          16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
          23: (256, 136), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36)}
"""ggml type number → (elements per block, bytes per block), for the types that the `gguf` package can unpack."""
UNREAD = {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", **dict.fromkeys(range(24, 28), "integers"), 28: "float64",
          31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "I2_S of bitnet.cpp", 37: "TL1 of bitnet.cpp",
          38: "TL2 of bitnet.cpp", 41: "Q1_0"}
"""ggml type number → name, for types without an unpacker. Forks reuse numbers: 36 to 38 were other types of llama.cpp once."""
OTHER_KINDS = {"adapter": "a LoRA adapter, not a whole model: merge it into its base model first",
               "mmproj": "the image or sound encoder beside a language model: choose the model's own file",
               "imatrix": "an importance matrix for quantising, not a model: choose the model's own file",
               "vocab": "a vocabulary without weights: choose the model's own file",
               "dataset": "a data set, not a model: choose the model's own file"}
"""What a file holds, and the remedy, by `general.type`."""
_OLDER_SIGNS = {"clip": "mmproj", "adapter.type": "adapter", "imatrix.datasets": "imatrix"}
"""Architectures or keys of such files that state no `general.type`."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_LAYER = re.compile(r"blk\.(\d{1,6})\.")


@dataclass(frozen=True)
class GgufTensor:
    """The place of one tensor in the file.

    Attributes:
        name: as stored, such as `blk.0.attn_q.weight`.
        shape: elements per dimension, the fastest first: a matrix [N, K] of torch is stored as (K, N).
        kind: ggml type number, a key of `BLOCKS`.
        nbytes: bytes of its data.
        offset: of its first byte; from the start of the data section in an entry, from the start of the file in a header.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    nbytes: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """The contents of a header.

    Attributes:
        file: name of the file, for sentences.
        architecture: value of `general.architecture`, such as `llama`.
        values: key → value as Python number, bool or str; an array as a list of numbers or of bytes (texts undecoded).
        tensors: every tensor by name.
    """

    file: str
    architecture: str
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def layers(self) -> int:
        """Number of decoder layers, as stated; the tensors of each are there."""
        return uniform(self.values.get(f"{self.architecture}.block_count", 0))

    @property
    def parameters(self) -> int:
        """Number of elements over all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises: ModelError E-MODEL-BAD (malformed, beyond a bound), -CUT (ends early), -SIZE (config caps),
        -MISSING (layers absent); never another exception for anything the file contains.
    """
    size = path.stat().st_size
    if size < 32:
        raise ModelError(f"{path.name[:60]} is cut: it has {size} bytes. Download it again.", code="E-MODEL-CUT")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walk = _Walk(data, path.name[:60])
        keys, tensors = walk.counts()
        values = walk.keys(keys)
        _check_kind(values, tensors, walk)
        found = _placed([walk.tensor() for _ in range(tensors)], walk.position, values, size, walk)
    if not found:
        raise walk.bad("it holds no tensors")
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not _NAME.fullmatch(architecture):
        raise walk.bad("it does not name its architecture")
    _check_sizes(architecture, values, found, walk)
    return GgufHeader(walk.name, architecture, values, {tensor.name: tensor for tensor in found})


class _Walk:
    """A cursor over the mapped file; every read is checked against the limit of the header and the file's end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.position, self.elements = data, name, 0, 0
        self.limit = min(len(data), MAX_HEADER_BYTES)

    def bad(self, reason: str) -> ModelError:
        """Make the error E-MODEL-BAD with this reason."""
        return ModelError(f"{self.name} is not a usable GGUF file: {reason}. Download it again.", code="E-MODEL-BAD")

    def take(self, count: int) -> int:
        """Advance by `count` bytes and return where they start."""
        start, end = self.position, self.position + count
        if end > self.limit:
            if end > len(self.data):
                raise ModelError(f"{self.name} is cut or damaged: it ends inside its header. Download it again.",
                                 code="E-MODEL-CUT")
            raise self.bad(f"its header is larger than {MAX_HEADER_BYTES // 2**20} MiB")
        self.position = end
        return start

    def scalar(self, form: str) -> Any:
        """Read the next number, in a struct format."""
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        """Read the next string, of at most MAX_STRING bytes."""
        length = self.scalar("<Q")
        if length > MAX_STRING:
            raise self.bad(f"a text of {length:,} bytes, at most {MAX_STRING:,} are read")
        start = self.take(length)
        return self.data[start:start + length]

    def counts(self) -> tuple[int, int]:
        """Read (number of keys, number of tensors) after checking magic and version."""
        start = self.data[self.take(8):8]
        if start.startswith(b"version "):
            raise ModelError(f"{self.name} is a Git LFS pointer, not the weights: run `git lfs pull`.",
                             code="E-MODEL-CUT")
        if start[:4] != b"GGUF" or start[4:] not in (b"\2\0\0\0", b"\3\0\0\0"):
            raise self.bad("wrong magic or version; little-endian versions 2 and 3 are read")
        tensors, keys = self.scalar("<Q"), self.scalar("<Q")
        if keys > MAX_KEYS or tensors > MAX_TENSORS:
            raise self.bad(f"it states {tensors:,} tensors and {keys:,} keys")
        return keys, tensors

    def keys(self, count: int) -> dict[str, Any]:
        """Read the next `count` entries: key → value."""
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.text().decode("utf-8", "replace")
            if not key or len(key) > 256 or key in values:
                raise self.bad("a key is empty, endless or given twice")
            values[key] = self.value(self.scalar("<I"))
        return values

    def value(self, kind: int) -> Any:
        """Read the next value, of a type number."""
        if kind in _SCALARS:
            value = self.scalar(_SCALARS[kind])
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self.text().decode("utf-8", "replace")
        if kind == _ARRAY:
            return self.array()
        raise self.bad(f"unknown value type {kind}")

    def array(self) -> list[Any]:
        """Read the next array: numbers, or texts as bytes."""
        kind, count = self.scalar("<I"), self.scalar("<Q")
        self.elements += count
        if count > MAX_ARRAY or self.elements > MAX_ELEMENTS:
            raise self.bad(f"an array of {count:,} elements, at most {MAX_ARRAY:,} are read")
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind][1]}"
            return list(struct.unpack_from(form, self.data, self.take(struct.calcsize(form))))
        if kind == _STRING:
            return self.texts(count)
        raise self.bad("an array of arrays or of an unknown type")

    def texts(self, count: int) -> list[bytes]:
        """Read the next `count` strings, without a call for each: vocabularies have hundreds of thousands."""
        unpack, data, limit, position = struct.Struct("<Q").unpack_from, self.data, self.limit, self.position
        found: list[bytes] = []
        for _ in range(count):
            if position + 8 > limit:
                self.take(limit + 1 - self.position)
            length = unpack(data, position)[0]
            start, position = position + 8, position + 8 + length
            if length > MAX_STRING or position > limit:
                raise self.bad("a text reaches past the header's end")
            found.append(data[start:position])
        self.position = position
        return found

    def tensor(self) -> GgufTensor:
        """Read the next tensor entry; its offset counts from the start of the data section."""
        name = self.text().decode("utf-8", "replace")
        dimensions = self.scalar("<I")
        if not _NAME.fullmatch(name) or not 1 <= dimensions <= 4:
            raise self.bad("a tensor has an unusable name or more than 4 dimensions")
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))
        kind, offset = self.scalar("<I"), self.scalar("<Q")
        if kind not in BLOCKS:
            raise ModelError(f"{self.name} stores {name[:60]} as {UNREAD.get(kind, 'an unknown type')} (ggml type {kind}), which "
                             "is not read: choose a file of another quantisation.", code="E-MODEL-ARCH")
        if min(shape) < 1 or shape[0] % BLOCKS[kind][0]:
            raise self.bad(f"tensor {name[:60]} has an impossible shape")
        elements, block_bytes = BLOCKS[kind]
        return GgufTensor(name, shape, kind, prod(shape) // elements * block_bytes, offset)


def _check_kind(values: dict[str, Any], tensors: int, walk: _Walk) -> None:
    """Refuse a whole file that holds something else than a model, naming what it is."""
    signs = (*values, values.get("general.architecture"))
    kind = values.get("general.type") or next((kind for sign, kind in _OLDER_SIGNS.items() if sign in signs), None)
    if not tensors and "tokenizer.ggml.model" in values:
        kind = "vocab"
    if isinstance(kind, str) and kind in OTHER_KINDS:
        raise ModelError(f"{walk.name} holds {OTHER_KINDS[kind]}.", code="E-MODEL-BAD")


def uniform(value: Any) -> Any:
    """Return `value`, or the one number of an array that repeats it for every layer."""
    return value[0] if isinstance(value, list) and value and all(entry == value[0] for entry in value) else value


def _placed(entries: list[GgufTensor], header_end: int, values: dict[str, Any], size: int, walk: _Walk) -> list[GgufTensor]:
    """Return the tensors with offsets from the start of the file, after checking that they are aligned, inside the file, without
    overlap, and that no name repeats."""
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise walk.bad("its alignment is not a power of two up to 4096")
    if len({entry.name for entry in entries}) != len(entries):
        raise walk.bad("two tensors share a name")
    start = -(-header_end // alignment) * alignment
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset % alignment or entry.offset < end:
            raise walk.bad(f"tensor {entry.name[:60]} is misplaced")
        end = entry.offset + entry.nbytes
    if start + end > size:
        raise ModelError(f"{walk.name} is cut: {size / 1e6:,.1f} of {(start + end) / 1e6:,.1f} MB. Download it again.",
                         code="E-MODEL-CUT")
    return [replace(entry, offset=start + entry.offset) for entry in entries]


def _check_sizes(architecture: str, values: dict[str, Any], infos: list[GgufTensor], walk: _Walk) -> None:
    """Apply the limits of `preflight.config` to the header's sizes, and compare the layers present with those stated."""
    if values.get("split.count", 1) != 1:
        raise ModelError(f"{walk.name} is one part of several: merge them with llama-gguf-split first.",
                         code="E-MODEL-BAD")
    caps = {"block_count": MAX_LAYERS, "embedding_length": MAX_HIDDEN, "vocab_size": MAX_VOCAB,
            "feed_forward_length": 8 * MAX_HIDDEN, "context_length": 2**24, "attention.head_count": 1_024}
    for key, cap in caps.items():
        value = uniform(values.get(f"{architecture}.{key}", 1))
        if type(value) is not int or value < 1:
            raise walk.bad(f"{key} is {str(value)[:20]}")
        if value > cap:
            raise ModelError(f"{walk.name} states {key} = {value:,}; the limit is {cap:,}. Choose a smaller model.",
                             code="E-MODEL-SIZE")
    layers = uniform(values.get(f"{architecture}.block_count", 0))
    found = {int(match[1]) for info in infos if (match := _LAYER.match(info.name))}
    if found != set(range(layers)):
        raise ModelError(f"{walk.name} promises {layers} layers and holds {len(found)}. Download it again.",
                         code="E-MODEL-MISSING")

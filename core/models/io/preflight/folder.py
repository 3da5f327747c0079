"""Check untrusted model folders before any library parses them, within fixed limits.

safetensors layout (github.com/huggingface/safetensors): 8 bytes little-endian length N, N bytes of JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the data. The library accepts duplicate keys, names of any
length and a million empty tensors; this parser does not. Nothing is mapped or allocated beyond the header.

Each refusal is a ModelError with one sentence and one of the codes E-MODEL-PICKLE (weights that could run code),
-CODE (needs its own Python), -CUT (the file is not whole), -BAD (malformed), -SIZE, -MISSING.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any

from core.errors import ModelError
from core.models.io.preflight.config import bitnet_format, check_config, check_layers, refuse_code, text_model_name
from core.models.io.preflight.other_tools import (
    SETTINGS_FILES,
    refuse_quantized_files,
    refuse_quantized_tensors,
    stated_format,
)
from core.models.io.preflight.tokenizer import check_brackets, check_settings, check_tokenizer

MAX_HEADER_BYTES = 2 * 2**20
MAX_TENSORS, MAX_TENSORS_A_FILE = 200_000, 20_000
MAX_DIMENSIONS = 8
MAX_SHARDS = 1_000
MAX_INDEX_BYTES = 8 * 2**20
MAX_JSON_BYTES = 2**20
MAX_TOKENIZER_BYTES = 48 * 10**6
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
               "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
"""Bytes per element of the accepted safetensors types."""

SAVED_WEIGHTS = "quantscope.safetensors"
WEIGHTS = ("model.safetensors", SAVED_WEIGHTS)
"""Names of a single file of weights; the second is that of folders that Quantscope saves. Indexes of several files are named
after them."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack", ".onnx")
WRAPPERS = ("module.", "_orig_mod.", "language_model.")
"""Prefixes that data-parallel training, torch.compile and models of several parts put before the names of all tensors."""
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_SMALL_FILES = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
                "chat_template.jinja", "preprocessor_config.json")
_CONVERT = "Only safetensors weights are read: choose a revision that has them, or save the model with safetensors."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a weight file: element type (`F32`, …), shape, the name of the file, and the tensor's name there."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    name: str

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class FolderReport:
    """The parts of a model folder that `check_folder` read: the raw config and all tensors, by their names without `WRAPPERS`.

    `images`: whether config and tensors are those of the text model of one that also reads images.
    `quantised`: the tool that quantised the weights, by its `quant_method`, and the settings it states; None for float weights
    and for BitNet's.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    images: bool = False
    quantised: tuple[str, Mapping[str, Any]] | None = None

    @property
    def parameters(self) -> int:
        """Number of elements over all tensors, as stored (a tied tensor once)."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.count * DTYPE_BYTES[tensor.dtype] for tensor in self.tensors.values())


def check_folder(folder: Path) -> FolderReport:
    """Check a folder of config, tokenizer and safetensors weights without loading anything.

    Raises: ModelError with the code of the first problem (see the module's list); never another exception for
        anything the files contain.
    """
    report = check_files(folder)
    ternary = bitnet_format(report.config) is not None
    if not ternary:
        report = replace(_unwrapped(report), quantised=_quantised(folder, report.config))
    if report.quantised is None:
        refuse_quantized_tensors(report.tensors, ternary=ternary)
    check_layers(report.config, report.tensors)
    return report


def _quantised(folder: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Find the tool that quantised the weights, and its settings, in the configuration or in a file of their own."""
    files = [(name, method) for name, method in SETTINGS_FILES.items() if (folder / name).exists()]
    return stated_format(config) or next(((method, read_json(folder, name)) for name, method in files), None)


def _unwrapped(report: FolderReport) -> FolderReport:
    """Take the wrappers that all tensors share off their names; leave out what reads images."""
    config, tensors = report.config, report.tensors
    while found := next((w for w in WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(found): tensor for name, tensor in tensors.items()}
    if report.images:
        kept = [(own, tensor) for name, tensor in tensors.items() if (own := text_model_name(name)) is not None]
        tensors = dict(kept)
        if len(tensors) < len(kept):
            raise _bad("The weights hold tensors of the text model twice, under two names. Download the model again.")
        config = {"tie_word_embeddings": "lm_head.weight" not in tensors} | config
    return replace(report, config=config, tensors=tensors)


def check_files(folder: Path) -> FolderReport:
    """Check a folder as `check_folder` does, except for tensor names, which differ in folders saved by Quantscope."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(f"No model folder named {folder.name[:60]!r} can be read ({error.strerror}): check its name.",
                         code="E-MODEL-NOTFOUND") from None
    if {"adapter_config.json", "adapter_model.safetensors"} & set(names):
        raise _adapter()
    if "config.json" not in names:
        raise _no_config(names)
    stated = read_json(folder, "config.json")
    config = check_config(stated)
    refuse_quantized_files(folder)
    _check_side_files(folder)
    tensors = read_weights(folder)
    if tensors and all("lora_" in name for name in tensors):
        raise _adapter()
    return FolderReport(config, tensors, images=config is not stated)


def read_weights(folder: Path) -> dict[str, TensorInfo]:
    """Read the tensors of the single file of weights, or of the shards that an index names, by tensor name.

    Raises: ModelError: no safetensors (PICKLE or MISSING), or as `read_safetensors_header`.
    """
    for name in WEIGHTS:
        if (folder / name).exists():
            return read_safetensors_header(regular_file(folder, name))
    index = next((f"{name}.index.json" for name in WEIGHTS if (folder / f"{name}.index.json").exists()), None)
    if index is None:
        raise _no_weights(sorted(path.name for path in folder.iterdir()))
    shards = _read_index(folder, index)
    tensors: dict[str, TensorInfo] = {}
    for shard, names in shards.items():
        header = read_safetensors_header(regular_file(folder, shard))
        if set(header) != names or tensors.keys() & header.keys():
            raise _bad(f"The index and {shard} disagree about the tensors. Download the model again.")
        tensors |= header
    if len(tensors) > MAX_TENSORS:
        raise _bad(f"The weights hold {len(tensors):,} tensors; at most {MAX_TENSORS:,} are read. Choose another model.")
    return tensors


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file; the data is not read.

    Returns: name → TensorInfo. Raises: ModelError E-MODEL-PICKLE, -CUT, -BAD or -SIZE, see the module.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
        _check_magic(path.name, start, size)
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        raw = file.read(length)
    header = strict_json(raw, path.name)
    if not isinstance(header, dict):
        raise _bad(f"The header of {path.name} is not a table of tensors. Download it again.")
    _check_metadata(header.pop("__metadata__", {}), path.name)
    if len(header) > MAX_TENSORS_A_FILE:
        raise _bad(f"{path.name} holds {len(header):,} tensors; at most {MAX_TENSORS_A_FILE:,} are read. Choose another model.")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _check_entry(name, entry, path.name)
        spans.append(span)
    _check_coverage(sorted(spans), size - 8 - length, path.name, size)
    return tensors


def read_json(folder: Path, name: str, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a small file of a model folder. Raises: ModelError E-MODEL-MISSING, -SIZE or -BAD."""
    path = regular_file(folder, name)
    size = path.stat().st_size
    if size > limit:
        raise _too_large(name, size, limit)
    value = strict_json(path.read_bytes(), name)
    if not isinstance(value, dict):
        raise _bad(f"{name} is not a JSON object. Download it again.")
    return value


def strict_json(raw: bytes, name: str) -> Any:
    """Parse JSON in UTF-8, refusing duplicate keys, NaN, deep nesting. Raises: ModelError E-MODEL-BAD."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        raise _bad(f"{name} is damaged: its JSON cannot be read. Download it again.") from None


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder` if it is a regular file inside it (or in the Hub cache's `blobs` beside it).

    Raises: ModelError E-MODEL-MISSING when absent, E-MODEL-BAD for a link that leaves the folder, a pipe, a device.
    """
    path = folder / name
    try:
        real = Path(os.path.realpath(path, strict=True))
        mode = real.stat().st_mode
    except (OSError, ValueError):
        raise ModelError(f"{name[:80]} is missing from the model folder. Download the model again.",
                         code="E-MODEL-MISSING") from None
    here = Path(os.path.realpath(folder))
    if not stat.S_ISREG(mode) or not (real.is_relative_to(here) or real.parent == here.parent.parent / "blobs"):
        raise _bad(f"{name[:80]} is not a plain file of the model folder: links out of it are not followed. Copy the file "
                   "itself into the folder.")
    return path


def _check_side_files(folder: Path) -> None:
    """Check size and kind of the files that transformers reads in addition to config and weights."""
    limits = dict.fromkeys(_SMALL_FILES, MAX_JSON_BYTES) | dict.fromkeys(_TOKENIZER_FILES, MAX_TOKENIZER_BYTES)
    for name, limit in (limits | {"tokenizer_config.json": 4 * MAX_JSON_BYTES}).items():
        if not os.path.lexists(folder / name):
            continue
        size = regular_file(folder, name).stat().st_size
        if size > limit:
            raise _too_large(name, size, limit)
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            settings = read_json(folder, name, limit=4 * MAX_JSON_BYTES)
            check_settings(settings, name)
            refuse_code(settings)
    if (folder / "tokenizer.json").exists():
        raw = (folder / "tokenizer.json").read_bytes()
        check_brackets(raw, "tokenizer.json")
        tokenizer = strict_json(raw, "tokenizer.json")
        check_tokenizer(tokenizer if isinstance(tokenizer, dict) else {})


def _adapter() -> ModelError:
    return ModelError("This folder holds a LoRA adapter, not a whole model: merge it into its base model first.",
                      code="E-MODEL-BAD")


def _no_config(names: list[str]) -> ModelError:
    """Make the error for a folder of these files, which has no config.json, by what it holds instead."""
    files = [name for name in names if name.endswith(".gguf")]
    if "run.json" in names:
        return _bad("The folder is a training run, not a model. Export it with the verb train and --export.")
    if files:
        fault = f"The folder holds {len(files)} GGUF files: name one of them, such as {files[0][:60]}"
    elif "params.json" in names:
        fault = "The folder has the layout of Meta's or Mistral's own code: choose the model's version for transformers"
    elif weights := [name for name in names if name.endswith(".safetensors")]:
        fault = (f"config.json is missing beside {weights[0][:60]}: weights alone do not say what they compute. Put the "
                 "config.json and the tokenizer of their model into the folder")
    else:
        held = ", ".join(name[:40] for name in names[:3]) + ", …" * (len(names) > 3)
        fault = f"config.json is missing: the folder holds {held or 'nothing'}. Name the folder of one model, or a .gguf file"
    return ModelError(f"{fault}.", code="E-MODEL-MISSING")


def _no_weights(names: list[str]) -> ModelError:
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        return ModelError(f"The weights are in {pickles[0][:60]}, a format that can run code. {_CONVERT}",
                          code="E-MODEL-PICKLE")
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        remedy = (f"rename {others[0][:60]} to model.safetensors, if it holds the whole model" if len(others) == 1
                  else "add the model.safetensors.index.json that belongs to its files")
        return ModelError(f"The folder has no model.safetensors and no index of weights: {remedy}.", code="E-MODEL-MISSING")
    return ModelError("The folder has no model.safetensors and no model.safetensors.index.json. Choose a folder that "
                      "transformers saved.", code="E-MODEL-MISSING")


def _read_index(folder: Path, name: str) -> dict[str, set[str]]:
    """Read an index of weights: shard name → names of its tensors."""
    index = read_json(folder, name, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise _bad(f"{name} has no weight_map. Download it again.")
    shards: dict[str, set[str]] = {}
    for tensor, shard in index.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            if isinstance(shard, str) and shard.lower().endswith(PICKLE_SUFFIXES):
                raise ModelError(f"The index names pickle weights. {_CONVERT}", code="E-MODEL-PICKLE")
            raise _bad(f"{name} points outside the model's own files: only plain names of "
                       ".safetensors files are followed. Download it again.")
        shards.setdefault(shard, set()).add(tensor)
    if len(shards) > MAX_SHARDS:
        raise _bad(f"The index names {len(shards):,} files; at most {MAX_SHARDS:,} are read. Choose another model.")
    return shards


def _check_magic(name: str, start: bytes, size: int) -> None:
    """Refuse a pickle, an archive, a Git LFS pointer or a cut file by the first bytes of what should be a safetensors file."""
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{name} is a Git LFS pointer, not the weights: run `git lfs pull`, or download the file.",
                         code="E-MODEL-CUT")
    if start[8:9] != b"{" and (start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")):
        raise ModelError(f"{name} is a pickle or an archive under another name. {_CONVERT}", code="E-MODEL-PICKLE")
    if size < 10:
        raise ModelError(f"{name} is cut: it has {size} bytes. Download it again.", code="E-MODEL-CUT")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length < 2:
        raise _bad(f"{name} is not a safetensors file. Download it again.")
    if length > MAX_HEADER_BYTES:
        raise _bad(f"{name} states a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read. Download it again.")
    if 8 + length > size:
        raise ModelError(f"{name} is cut: {size:,} bytes end inside its header. Download it again.", code="E-MODEL-CUT")


def _check_metadata(metadata: Any, file_name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(f"The metadata of {file_name} is malformed. Download it again.")


def _check_entry(name: str, entry: Any, file_name: str) -> tuple[TensorInfo, tuple[int, int]]:
    """Check one header entry; return its TensorInfo and its [begin, end) in the data."""
    if not _TENSOR_NAME.fullmatch(name):
        raise _bad(f"{file_name} has a tensor with an unusable name: letters, digits, dots, at most 256. Choose another model.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"The entry of tensor {name[:80]} in {file_name} is malformed. Download it again.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(f"Tensor {name[:80]} has the type {str(dtype)[:20]!r}, which is not read. Choose a revision in a "
                   "floating-point type.")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS or not _whole_numbers(offsets) or len(offsets) != 2:
        raise _bad(f"Tensor {name[:80]} in {file_name} has an impossible shape or place. Download it again.")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise _bad(f"Tensor {name[:80]} in {file_name} has a shape that does not fit its bytes. Download it again.")
    return TensorInfo(dtype, tuple(shape), file_name, name), (begin, end)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_coverage(spans: list[tuple[int, int]], data_bytes: int, name: str, size: int) -> None:
    """Check that the tensors cover the data exactly: no overlap, no hole, no bytes behind the last."""
    position = 0
    for begin, end in spans:
        if begin != position:
            raise _bad(f"The tensors of {name} overlap or leave holes. Download it again.")
        position = end
    if position > data_bytes:
        raise ModelError(f"{name} is cut: {size / 1e6:,.1f} of {(size - data_bytes + position) / 1e6:,.1f} MB. "
                         "Download it again.", code="E-MODEL-CUT")
    if position < data_bytes:
        raise _bad(f"{name} has {data_bytes - position:,} bytes that belong to no tensor. Download it again.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _too_large(name: str, size: int, limit: int) -> ModelError:
    return ModelError(f"{name} is {size / 1e6:.1f} MB; at most {limit / 1e6:.0f} MB are read. Choose another model.",
                      code="E-MODEL-SIZE")


def _bad(sentence: str) -> ModelError:
    return ModelError(sentence, code="E-MODEL-BAD")

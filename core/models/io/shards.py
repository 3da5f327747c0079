"""Weights in several safetensors files, and the index that says which tensor is in which file.

    model-00001-of-00003.safetensors …, model.safetensors.index.json: {"metadata": {"total_size"}, "weight_map": {tensor: file}}

The stem is "model" for weights that other programs read, and that of `SAVED_WEIGHTS` for those of Quantscope alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def shard_name(stem: str, number: int, count: int) -> str:
    """Return the name of shard `number` of `count`, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, stem: str, shards: Mapping[str, Iterable[str]], nbytes: int) -> None:
    """Write the index of a folder's shards.

    Args: shards: file → names of its tensors. nbytes: of all tensors.
    """
    index = {name: file for file, names in shards.items() for name in names}
    facts = {"metadata": {"total_size": nbytes}, "weight_map": index}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(facts, indent=1))


def read_tensors(folder: Path, files: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name. The files are open only meanwhile: their pages count as memory of the process while they are.

    Args: files: name of a tensor → the file of `folder` that holds it.
    """
    for file in sorted(set(files.values())):
        with safe_open(folder / file, framework="pt") as handle:
            for name in (name for name, own in files.items() if own == file):
                yield name, handle.get_tensor(name)

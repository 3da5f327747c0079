"""Write a model folder that other programs read: weights in shards, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from core.models.io.shards import shard_name, write_index
from core.storage import atomic_dir

SHARD_BYTES = 5 * 10**9
"""Tensors are gathered into files of at most this many bytes; a single larger tensor has a file of its own."""


def config_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a configuration as JSON types, without the folder that it was read from: that is a fact of this machine."""
    return {name: value for name, value in json.loads(config.to_json_string(use_diff=False)).items() if name != "_name_or_path"}


def write_model(
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    files: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder in one step, whole or not at all.

    Args:
        folder: new, empty, or an earlier folder of Quantscope, which is replaced.
        tensors: by their names in the checkpoint.
        config: content of `config.json`.
        files: text of other files by name.
    Raises: InputError E-PARAM-OUT, ResourceError E-DISK, as `atomic_dir`.
    """
    with atomic_dir(folder) as stage:
        _write_shards(stage, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, shard_bytes)
        (stage / "config.json").write_text(json.dumps(config, indent=1))
        (stage / "generation_config.json").write_text(generation.to_json_string())
        tokenizer.save_pretrained(stage)
        for name, text in files.items():
            (stage / name).write_text(text, encoding="utf-8")


def _write_shards(folder: Path, tensors: dict[str, Tensor], limit: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {shard_name("model", number, len(shards)): shard for number, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        save_file(shard, folder / file, metadata={"format": "pt"})
    write_index(folder, "model", files, sum(t.nbytes for t in tensors.values()))

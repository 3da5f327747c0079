"""Builders of small weight files, well formed and otherwise, written byte by byte without any library."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
TENSORS = {"model.embed_tokens.weight": (10, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8)}


def safetensors_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """8-byte length, header (an object, or the raw bytes of one), data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def float_header(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], int]:
    """A header of float32 tensors side by side, and the bytes of their data."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 4
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return header, position


def good_safetensors(shapes: dict[str, tuple[int, ...]] = TENSORS) -> bytes:
    header, size = float_header(shapes)
    return safetensors_bytes({"__metadata__": {"format": "pt"}} | header, bytes(size))


def write_folder(folder: Path, *, config: Any = None, weights: bytes | None = None) -> Path:
    """A model folder that passes preflight, unless given something else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    (folder / "model.safetensors").write_bytes(good_safetensors() if weights is None else weights)
    return folder


def text(value: str | bytes) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    """A GGUF key with its type number and encoded value."""
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A GGUF tensor entry."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GOOD_KEYS = [key("general.architecture", 8, text("llama")), key("llama.block_count", 4, struct.pack("<I", 1)),
             key("tokenizer.ggml.pre", 8, text("smollm")),
             key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 3) + text("a") + text("b") + text("ü")),
             key("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 2) + bytes(8))]
GOOD_TENSORS = [tensor("token_embd.weight", (32, 2), 2, 0), tensor("blk.0.attn_q.weight", (4, 4), 0, 64)]


def gguf_bytes(keys: list[bytes] | None = None, tensors: list[bytes] | None = None, *, magic: bytes = b"GGUF",
               version: int = 3, n_keys: int | None = None, n_tensors: int | None = None, data: int = 128,
               alignment: int = 32) -> bytes:
    """A GGUF file; counts may lie."""
    keys = GOOD_KEYS if keys is None else keys
    tensors = GOOD_TENSORS if tensors is None else tensors
    head = magic + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                               len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(data)

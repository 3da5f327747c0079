"""GGUF files of tiny models, written key by key as llama.cpp's converter writes them, with changes on demand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from core.models.loaded import LoadedModel

REMOVE = object()
"""As the value of a key or a tensor: leave it out."""
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
"""A configuration of rotary positions of Llama 3."""

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def stored_name(name: str) -> str:
    """The GGUF name of a transformers parameter of a Llama-like model."""
    module, leaf = name.rsplit(".", 1)
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    _, _, index, part = module.split(".", 3)
    return f"blk.{index}.{LAYER[part]}.{leaf}"


def header_of(made: LoadedModel, architecture: str) -> dict[str, Any]:
    """The keys of a float model; names without a dot before them belong to the architecture."""
    c = made.model.config
    own = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.key_length": made.adapter.spec(c).head_dim,
        "attention.value_length": made.adapter.spec(c).head_dim,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "vocab_size": c.vocab_size,
    }
    if architecture == "llama":
        own["rope.dimension_count"] = made.adapter.spec(c).head_dim
    tokens = [made.tokenizer.convert_ids_to_tokens(index) for index in range(c.vocab_size)]
    shared = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * (c.vocab_size - 256),
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.unknown_token_id": 258,
        "tokenizer.ggml.padding_token_id": 257,
        "general.name": "tiny",
        "general.file_type": 0,
    }
    return {f"{architecture}.{name}": value for name, value in own.items()} | shared


def write_gguf(
    path: Path,
    made: LoadedModel,
    *,
    architecture: str = "llama",
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> Path:
    """Write `made` as a GGUF file in float32.

    Args: keys: full key → value on top of the usual ones. tensors: GGUF name → array on top of the model's.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in (header_of(made, architecture) | (keys or {})).items():
        if value is not REMOVE:
            add_key(writer, key, value)
    config = made.model.config
    arrays = {}
    for name, tensor in made.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, stored = tensor.numpy(), stored_name(name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(stored.split(".")[-2])
        if heads and architecture == "llama":  # llama.cpp interleaves the halves of each head
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        arrays[stored] = np.ascontiguousarray(array)
    for name, array in (arrays | (tensors or {})).items():
        if array is not REMOVE:
            writer.add_tensor(name, np.asarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one key, its GGUF type chosen by the Python type."""
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.INT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
        list: gguf.GGUFValueType.ARRAY,
    }
    writer.add_key_value(key, value, kinds[type(value)])


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight for a Llama 3 configuration."""
    low, high = (rope["original_max_position_embeddings"] / rope[f"{end}_freq_factor"] for end in ("low", "high"))
    factors = []
    for exponent in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (exponent / head_dim)
        share = (low / wave - 1) / (low / high - 1)
        factors.append(1.0 if wave < high else rope["factor"] if wave > low else 1 / ((1 - share) / rope["factor"] + share))
    return np.asarray(factors, np.float32)


def scaling(architecture: str, kind: str, **more: object) -> dict[str, object]:
    """Keys of a rope scaling by factor 4."""
    names = {"context": "original_context_length"}
    return {f"{architecture}.rope.scaling.type": kind, f"{architecture}.rope.scaling.factor": 4.0} | {
        f"{architecture}.rope.scaling.{names.get(name, name)}": value for name, value in more.items()
    }

"""Translate a GGUF header into a configuration of transformers, with a decision about every key.

A key is used; or it is known not to change what the model computes (`_IRRELEVANT`); or it is accepted only with a value that
changes nothing (`_NEUTRAL`); a file with any other key is refused, and the key named. Key names and defaults:
github.com/ggml-org/llama.cpp (src/llama-arch.cpp, src/llama-model.cpp). Architectures: llama, qwen2, qwen3; Mistral and SmolLM
files state llama.

Rotary positions: angle = position * inv_freq, with inv_freq[i] = freq_base ** (-2 i / E), E the head size, then changed by

    rope.scaling.type linear     inv_freq / factor
    rope.scaling.type yarn       YaRN (arXiv:2309.00071), as transformers computes it
    tensor rope_freqs.weight     inv_freq[i] / rope_freqs[i]: how llama.cpp stores Llama 3's long-context rule
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from core.errors import ModelError
from core.models.io.preflight.gguf import GgufHeader, uniform

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Class of transformers by `general.architecture`."""

_USED = frozenset(
    (
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    )
)
"""Keys of the architecture that `fields_of` reads."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "pooling_type": (0,),
}
"""Keys of the architecture that are accepted only with a value that leaves the model as it is."""

_IRRELEVANT_OWN = frozenset(("rope.scaling.finetuned", "tensor_data_layout"))
"""Keys of the architecture that llama.cpp itself does not compute with."""

_TOKENIZER = frozenset(
    (
        "ggml.model",
        "ggml.pre",
        "ggml.tokens",
        "ggml.token_type",
        "ggml.scores",
        "ggml.merges",
        "ggml.bos_token_id",
        "ggml.eos_token_id",
        "ggml.eot_token_id",
        "ggml.eom_token_id",
        "ggml.unknown_token_id",
        "ggml.padding_token_id",
        "ggml.add_bos_token",
        "ggml.add_eos_token",
        "ggml.add_space_prefix",
        "chat_template",
    )
)
"""Keys below `tokenizer.` that `gguf_tokenizer` and `fields_of` read."""

_IRRELEVANT = re.compile(
    r"general\.[a-z0-9_.]+"  # provenance, licence, sampling advice; the preflight uses alignment
    r"|split\.(no|count|tensors\.count)"  # the preflight has refused a file in parts
    r"|(quantize|imatrix|mradermacher)\.[a-zA-Z0-9_.]+"  # added by programs that made the file
    r"|tokenizer\.ggml\.(fim_(pre|suf|mid|pad|rep|sep)|prefix|suffix|middle|seperator|cls|mask)_token_id"  # tasks not run here
    r"|tokenizer\.ggml\.token_type_count|tokenizer\.huggingface\.json"
    r"|tokenizer\.chat_templates|tokenizer\.chat_template\.[a-zA-Z0-9_.-]+"
)  # alternatives to the default template
"""Keys that do not change what the model computes or how text is split."""

_ROPE_DECIMALS = 2e-6
"""Largest relative difference of an inverse frequency rebuilt from Llama 3's parameters; float32 rounding is 1e-7."""


def fields_of(header: GgufHeader) -> dict[str, Any]:
    """Return the fields of the transformers configuration for a checked header, `model_type` among them.

    Biases and `rope_freqs.weight` are tensors: see `gguf.py`. Raises: ModelError E-MODEL-ARCH naming what is not supported,
    E-MODEL-BAD for an impossible value.
    """
    if header.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{header.file} holds the architecture {header.architecture[:40]!r}, which is not read here: choose "
            f"a file of {', '.join(ARCHITECTURES)}, or the model's safetensors folder.",
            code="E-MODEL-ARCH",
        )
    _check_keys(header)
    width, layers = _size(header, "embedding_length"), _size(header, "block_count")
    heads = _size(header, "attention.head_count")
    head_dim = _size(header, "attention.key_length", width // heads)
    rotated, values = _size(header, "rope.dimension_count", head_dim), _size(header, "attention.value_length", head_dim)
    if rotated != head_dim:
        raise _unsupported(header, "rope.dimension_count", rotated, f"only the head size, {head_dim}, is read")
    if values != head_dim:
        raise _unsupported(header, "attention.value_length", values, f"only the size of keys, {head_dim}, is read")
    if header.architecture == "qwen2" and head_dim * heads != width:
        raise _unsupported(header, "attention.key_length", head_dim, "for qwen2 only embedding_length / head_count is read")
    context = _size(header, "context_length")
    window = _own(header, "attention.sliding_window", 0)
    if type(window) is not int or 0 < window < context:
        raise _unsupported(header, "attention.sliding_window", window, "only full attention is read from GGUF")
    fields = {
        "model_type": header.architecture,
        "architectures": [ARCHITECTURES[header.architecture]],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _size(header, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": _size(header, "feed_forward_length"),
        "max_position_embeddings": context,
        "rms_norm_eps": _number(header, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": _vocabulary(header),
    }
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        fields[field] = header.values.get(f"tokenizer.ggml.{key}_token_id")
    return fields


def stop_ids(header: GgufHeader) -> list[int]:
    """List the ids of the tokens that end a text: end of sequence, end of turn, end of message, each once."""
    found = (header.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(value for value in found if type(value) is int))


def rope_with_factors(rope: dict[str, Any], factors: np.ndarray, head_dim: int, context: int, file: str) -> dict[str, Any]:
    """Return the `rope_parameters` that divide the inverse frequencies by `factors`.

    Llama 3's rule is used where it gives these factors (transformers then needs no branch on the length); else the factors
    themselves, as transformers' rule "longrope", with the same list for short and long texts and no attention factor.

    Args:
        rope: parameters without the factors. factors: [head_dim / 2] float32, of `rope_freqs.weight`. context: of the model.
    Raises: ModelError E-MODEL-BAD for impossible factors; E-MODEL-ARCH beside another scaling.
    """
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(
            f"{file}: rope_freqs.weight must hold {head_dim // 2} positive numbers. Download the file again.", code="E-MODEL-BAD"
        )
    if bool((factors == 1).all()):
        return rope
    if rope["rope_type"] != "default":
        raise ModelError(
            f"{file} holds rope_freqs.weight beside rope.scaling.type {rope['rope_type']}: only one of the two is "
            "read. Choose another file.",
            code="E-MODEL-ARCH",
        )
    theta = rope["rope_theta"]
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return _llama3(theta, waves, factors.astype(np.float64)) or {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": context,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _llama3(theta: float, waves: np.ndarray, factors: np.ndarray) -> dict[str, Any] | None:
    """Find Llama 3's parameters that give `factors` at wavelengths `waves` (ascending), or None.

    With the published low_freq_factor 1 and high_freq_factor 4, waves shorter than context / 4 keep their frequency, waves longer
    than context have theirs divided by the largest factor, and between them 1 / factor is linear in context / wave.
    """
    low, high, factor = 1.0, 4.0, float(factors.max())
    if factor <= 1:
        return None
    middle = (factors > 1) & (factors < factor)
    if middle.any():
        smooth = (1 / factors[middle] - 1 / factor) / (1 - 1 / factor)
        context = round(float(np.mean(waves[middle] * (low + (high - low) * smooth))))
    else:  # any context between the last unchanged wave and the first changed one gives the same
        kept, slowed = waves[factors == 1], waves[factors == factor]
        context = round(math.sqrt(high * (kept.max() if len(kept) else slowed.min() / high) * slowed.min()))
    if not 1 <= context < 2**31:
        return None
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    rebuilt = 1 / ((1 - smooth) / factor + smooth)
    if float(np.abs(rebuilt / factors - 1).max()) > _ROPE_DECIMALS:
        return None
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _rope(header: GgufHeader) -> dict[str, Any]:
    """Read `rope_parameters` from the header's keys. llama.cpp takes a factor without a type as linear."""
    theta = _number(header, "rope.freq_base", 10_000.0)
    factor = _number(header, "rope.scaling.factor", _number(header, "rope.scale_linear", 0.0, least=0), least=0) or 1.0
    kind = _own(header, "rope.scaling.type", "linear")
    if kind == "none" or factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "yarn":
        raise _unsupported(header, "rope.scaling.type", kind, "none, linear and yarn are read")
    extrapolation = _number(header, "rope.scaling.yarn_ext_factor", 1.0, least=-1.0)
    if extrapolation not in (1.0, -1.0):  # -1 is how llama.cpp writes "not set"
        raise _unsupported(header, "rope.scaling.yarn_ext_factor", extrapolation, "only 1 is read")
    rope = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": _size(header, "rope.scaling.original_context_length"),
    }
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if (value := _number(header, f"rope.scaling.{key}", 0.0, least=-1.0)) > 0:
            rope[name] = value
    scale = _number(header, "rope.scaling.attn_factor", 1.0) * _number(header, "rope.scaling.yarn_attn_factor", 1.0)
    if scale != 1.0:
        rope["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    return rope


def _check_keys(header: GgufHeader) -> None:
    """Refuse the first key that is neither used nor known to be irrelevant, and a key whose value is not neutral."""
    own = f"{header.architecture}."
    for key, value in header.values.items():
        name = key.removeprefix(own)
        if key.startswith(own) and name in _NEUTRAL:
            if uniform(value) not in _NEUTRAL[name]:
                raise _unsupported(header, name, value, "this part of a model is not supported")
        elif key in ("general.quantization_version", "general.type"):
            if value not in (2, "model"):
                raise _unsupported(header, key, value, "whole models with blocks of version 2 are read")
        elif not (
            key.startswith(own)
            and (name in _USED or name in _IRRELEVANT_OWN)
            or key.startswith("tokenizer.")
            and key.removeprefix("tokenizer.") in _TOKENIZER
            or key in ("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.add_sep_token")
            and value is False
            or _IRRELEVANT.fullmatch(key)
        ):
            raise _unsupported(header, key, value, "this key is not known, and it may change the result")


def _own(header: GgufHeader, name: str, default: Any = None) -> Any:
    """Return the value of a key of the architecture; an array of equal values becomes one value."""
    return uniform(header.values.get(f"{header.architecture}.{name}", default))


def _size(header: GgufHeader, name: str, default: int | None = None) -> int:
    """Return a whole number of at least 1. Raises: ModelError when it is missing without default, per layer, or not positive."""
    value = _own(header, name, default)
    if isinstance(value, list):
        raise _unsupported(header, name, "another number for each layer", "one number for all layers is read")
    if type(value) is not int or value < 1:
        raise ModelError(
            f"{header.file} states {name} = {str(value)[:20]}: it must be a whole number from 1. Download the file again.",
            code="E-MODEL-BAD",
        )
    return value


def _number(header: GgufHeader, name: str, default: float | None = None, *, least: float = 1e-30) -> float:
    """Return a finite number of at least `least`. Raises: ModelError when it is missing without default, or not such a number."""
    value = _own(header, name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        raise ModelError(
            f"{header.file} states {name} = {str(value)[:20]}: it must be a number of at least {least:g}. Download "
            "the file again.",
            code="E-MODEL-BAD",
        )
    return float(value)


def _vocabulary(header: GgufHeader) -> int:
    """Return the number of embedding rows, after comparing it with the stated vocabulary."""
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(
            f"{header.file} holds no token_embd.weight of two dimensions. Download the file again.", code="E-MODEL-MISSING"
        )
    tokens = header.values.get("tokenizer.ggml.tokens")
    for name, stated in (
        ("vocab_size", _own(header, "vocab_size", table.shape[1])),
        ("tokenizer.ggml.tokens", len(tokens) if isinstance(tokens, list) else None),
    ):
        if stated is not None and stated != table.shape[1]:
            raise ModelError(
                f"{header.file} states {str(stated)[:20]} tokens in {name} and embeds {table.shape[1]:,}: they do "
                "not belong together. Download the file again.",
                code="E-MODEL-BAD",
            )
    return table.shape[1]


def _unsupported(header: GgufHeader, key: str, value: Any, rule: str) -> ModelError:
    return ModelError(
        f"{header.file} states {key[:60]} = {str(value)[:30]}: {rule}. Choose another file, or the model's safetensors folder.",
        code="E-MODEL-ARCH",
    )

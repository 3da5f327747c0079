"""Configurations of every supported architecture in which it computes something else: (name for tests, architecture, fields)."""

from __future__ import annotations

from typing import Any

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
"""Rotations other than the usual one. The shortest contexts are exceeded by the tests."""
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Fields of a configuration with one of ROPES."""
    return {"rope_parameters": {"rope_theta": 10000.0, **ROPES[kind], **more}}


SHAPES: dict[str, dict[str, Any]] = {
    "all heads": {"num_key_value_heads": 8},
    "one kv head": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 32},
    "small head_dim": {"head_dim": 6},
}
TYPES = ["full_attention", "sliding_attention"]
_MADE: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **{kind: rope(kind) for kind in ROPES},
        "dynamic beyond": rope("dynamic") | {"max_position_embeddings": 32},
        **SHAPES,
        "biases": {"attention_bias": True, "mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "eps": {"rms_norm_eps": 0.1},
        "tied": {"tie_word_embeddings": True},
    },
    "mistral": {
        "window": {"sliding_window": 8},
        "head_dim": {"head_dim": 32},
        "yarn": rope("yarn"),
        "tied": {"tie_word_embeddings": True},
    },
    "ministral": {
        "types": {"layer_types": TYPES},
        "all sliding": {"layer_types": None, "sliding_window": 7},
        "yarn": rope("yarn"),
    },
    "ministral3": {
        "window": {"sliding_window": 8},
        "no growth": rope("yarn", llama_4_scaling_beta=0),
        "llama3": rope("llama3", llama_4_scaling_beta=0.5),
        "tied": {"tie_word_embeddings": True},
    },
    "qwen2": {
        "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "yarn": rope("yarn"),
        "tied": {"tie_word_embeddings": True},
    },
    "qwen3": {
        "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "biases": {"attention_bias": True},
        "head_dim": {"head_dim": 32},
        "llama3": rope("llama3"),
        "tied": {"tie_word_embeddings": True},
    },
    "bitnet": {"all heads": {"num_key_value_heads": 8}, "silu": {"hidden_act": "silu"}, "tied": {"tie_word_embeddings": True}},
    "smollm": {"linear": rope("linear")},
    "phi3": {
        "window": {"sliding_window": 8},
        "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "longrope": {"rope_parameters": {"rope_theta": 1e4, **LONG}, "original_max_position_embeddings": 128},
        "all heads": {"num_key_value_heads": 8},
        "tied": {"tie_word_embeddings": True},
    },
    "smollm3": {
        "no_rope_layers": {"no_rope_layers": [0, 1]},
        "all rope": {"no_rope_layers": [1, 1]},
        "window": {"use_sliding_window": True, "sliding_window": 8},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "untied": {"tie_word_embeddings": False},
        "yarn": rope("yarn"),
    },
    "granite": {
        "neutral": {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
        "linear": rope("linear"),
    },
    "gemma": {"head_dim": {"head_dim": 32}, "biases": {"attention_bias": True}, "linear": rope("linear")},
    "gemma2": {
        "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "tight caps": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 1.0},
        "types": {"layer_types": TYPES},
        "biases": {"attention_bias": True},
        "untied": {"tie_word_embeddings": False},
    },
    "gemma3_text": {
        "types": {"layer_types": TYPES},
        "one type": {"layer_types": ["sliding_attention"] * 2},
        "cap": {"final_logit_softcapping": 2.0},
        "two ropes": {"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}},
        "head_dim": {"head_dim": 32},
    },
    "olmo2": {
        "all heads": {"num_key_value_heads": 8},
        "head_dim": {"head_dim": 32},
        "biases": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
        "yarn": rope("yarn"),
    },
    "olmo3": {
        "types": {"layer_types": TYPES},
        "published": {"layer_types": TYPES, "rope_scaling": {**ROPES["yarn"], "attention_factor": 1.2}, "rope_theta": 300.0},
        "head_dim": {"head_dim": 32},
    },
    "stablelm": {
        "parallel": {"use_parallel_residual": True},
        "biases": {"use_qkv_bias": True},
        "whole": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        "linear": rope("linear", partial_rotary_factor=0.25),
        "all heads": {"num_key_value_heads": 8},
    },
    "mixtral": {
        "window": {"sliding_window": 8},
        "one expert": {"num_experts_per_tok": 1},
        "all experts": {"num_experts_per_tok": 5},
        "head_dim": {"head_dim": 32},
        "tied": {"tie_word_embeddings": True},
        "yarn": rope("yarn"),
    },
    "qwen3_moe": {
        "shares of one": {"norm_topk_prob": True},
        "one expert": {"num_experts_per_tok": 1},
        "every second": {"decoder_sparse_step": 2},
        "some dense": {"mlp_only_layers": [0]},
        "window": {"use_sliding_window": True, "sliding_window": 8},
        "biases": {"attention_bias": True},
        "llama3": rope("llama3"),
    },
    "olmoe": {"shares of one": {"norm_topk_prob": True}, "biases": {"attention_bias": True}},
    "gpt_neox": {
        "sequential": {"use_parallel_residual": False},
        "no biases": {"attention_bias": False},
        "whole": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        "yarn": rope("yarn", partial_rotary_factor=0.5),
        "relu": {"hidden_act": "relu"},
        "tied": {"tie_word_embeddings": True},
    },
    "falcon": {
        "two norms": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "one norm": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "sequential": {"parallel_attn": False, "multi_query": False},
        "all heads": {"multi_query": False},
        "biases": {"bias": True, "new_decoder_architecture": True, "num_kv_heads": 1},
        "yarn": rope("yarn"),
        "untied": {"tie_word_embeddings": False},
    },
    "gpt2": {
        "n_inner": {"n_inner": None},
        "unscaled": {"scale_attn_weights": False},
        "relu": {"activation_function": "relu"},
        "untied": {"tie_word_embeddings": False},
    },
    "opt": {
        "gelu": {"activation_function": "gelu"},
        "no biases": {"enable_bias": False},
        "plain norms": {"layer_norm_elementwise_affine": False},
        "projected": {"word_embed_proj_dim": 32},
        "no last norm": {"_remove_final_layer_norm": True},
        "post-norm": {"do_layer_norm_before": False},
        "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        "untied": {"tie_word_embeddings": False},
    },
}  # fmt: skip
VARIANTS = [(f"{a}-{n}", a, f) for a, made in _MADE.items() for n, f in {"plain": {}, **made}.items()]
ARCHITECTURES = tuple(_MADE)
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
"""Architectures with experts, which the method rotation does not quantise."""

"""Configurations with the fields and spellings of published ones, of several years: they are read as transformers reads them.

Sizes are small and weights are random. The other fields were written down by hand, not compared with the files of today's
repositories. `config.json` is not written by transformers, whose class would complete and rename it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from core.models.io.foreign import quiet
from core.models.io.load import load_model
from core.models.tiny import VOCAB_SIZE, tiny_tokenizer
from tests.core.tools import relative, tokens

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "initializer_range": 0.02,
    "attention_dropout": 0.0, "use_cache": True, "bos_token_id": 256, "eos_token_id": [256, 257], "hidden_act": "silu"}
LLAMA: dict[str, Any] = SIZES | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False,
    "max_position_embeddings": 131072, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}
PHI: dict[str, Any] = SIZES | {
    "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5, "pad_token_id": 257}
GEMMA: dict[str, Any] = SIZES | {
    "attention_bias": False, "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "pad_token_id": 0}
FALCON: dict[str, Any] = SIZES | {
    "model_type": "falcon", "architectures": ["FalconForCausalLM"], "alibi": False, "bias": False,
    "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-5, "parallel_attn": True,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig", "AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"}}
OLMO3 = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 2": LLAMA | {"max_position_embeddings": 4096, "num_key_value_heads": 8, "rope_scaling": None},
    "Llama 3": LLAMA | {"max_position_embeddings": 8192, "rope_scaling": None},
    "Llama 3.1": LLAMA | {"rope_scaling": LLAMA3},
    "Llama 3.2": LLAMA | {"head_dim": 64, "rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "Falcon 3": LLAMA | {"head_dim": 256, "rope_theta": 1000042, "activation": "swiglu", "rms_norm_eps": 1e-6},
    "Mistral 7B v0.1": LLAMA | {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
    "Qwen2.5": SIZES | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768,
        "max_window_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_sliding_window": False},
    "Qwen2.5 with YaRN": SIZES | {
        "model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}, "use_sliding_window": False},
    "Qwen3": SIZES | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 32,
        "max_position_embeddings": 40960, "max_window_layers": 36, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False},
    "Phi-3 mini 128k": PHI | {
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 1e4, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1 + i for i in range(8)], "short_factor": [1.1] * 8, "type": "longrope"},
        "tie_word_embeddings": False},
    "Phi-4": PHI | {
        "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_scaling": None, "rope_theta": 250000,
        "sliding_window": None, "tie_word_embeddings": False},
    "Phi-4 mini": PHI | {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "partial_rotary_factor": 0.75,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 1e4, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1 + i for i in range(6)], "short_factor": [1.0] * 6, "type": "longrope"},
        "tie_word_embeddings": True},
    "Gemma 2": GEMMA | {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "rope_theta": 10000.0,
        "sliding_window": 4096},
    "Gemma 3 1B": GEMMA | {
        "model_type": "gemma3_text", "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "final_logit_softcapping": None, "max_position_embeddings": 32768, "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 8,
        "sliding_window_pattern": 2},
    "OLMo 2": SIZES | {
        "model_type": "olmo2", "attention_bias": False, "max_position_embeddings": 4096, "pad_token_id": 0,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False},
    "OLMo 3": SIZES | {
        "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "attention_bias": False,
        "layer_types": OLMO3, "max_position_embeddings": 65536, "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_theta": 500000,
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                         "original_max_position_embeddings": 8192, "rope_type": "yarn"},
        "sliding_window": 8, "tie_word_embeddings": False},
    "Falcon 7B": FALCON | {"multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 8},
    "Falcon 40B": FALCON | {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 4},
    "Falcon 11B": FALCON | {
        "ff_factor": 4, "ffn_hidden_size": 512, "multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0, "rope_scaling": None, "tie_word_embeddings": False},
    "SmolLM3": SIZES | {
        "model_type": "smollm3", "attention_bias": False, "layer_types": ["full_attention"] * 4,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0], "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0,
        "sliding_window": None, "use_sliding_window": False, "pad_token_id": 256},
    "Granite 3": SIZES | {
        "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "logits_scaling": 8.0, "max_position_embeddings": 4096, "mlp_bias": False, "pad_token_id": 0,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True},
    "Pythia": SIZES | {
        "model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True},
    "StableLM 2": SIZES | {
        "model_type": "stablelm", "hidden_dropout": 0.0, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 10000,
        "tie_word_embeddings": False, "use_parallel_residual": False, "use_qkv_bias": True},
}  # fmt: skip


@torch.inference_mode()
def folder_of(config: dict[str, Any], folder: Path) -> PreTrainedModel:
    """Write a folder with `config` as it is and random weights; return transformers' model of them."""
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    left_out = "lm_head" if model.config.tie_word_embeddings else " "
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if left_out not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("name", PUBLISHED)
@torch.inference_mode()
def test_a_published_configuration_is_read_as_transformers_reads_it(name, tmp_path):
    source, ids = folder_of(PUBLISHED[name], tmp_path), tokens(2, 40)
    assert relative(load_model(str(tmp_path)).model(ids).logits, source(ids).logits) < 1e-5

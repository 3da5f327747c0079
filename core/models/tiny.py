"""Make small random models, one per supported architecture, with a byte-level tokenizer.

They are for tests, and have what is hard in large models: norm gains far from one with a few outlier channels (so that
activations are skewed as in trained models), non-zero biases where the architecture has them, grouped-query attention
with 4 query heads per key/value head where there are groups, and, for `smollm`, tied embeddings. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from core.errors import InputError
from core.models.architectures import adapter_for
from core.models.decoder import CausalModel
from core.models.io.foreign import quiet
from core.models.loaded import LoadedModel
from core.storage import atomic_dir

SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
OUTLIER_CHANNELS = 3
"""Number of norm gains per norm that are about twenty times the others."""

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 1024, "tie_word_embeddings": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"sliding_window": None},
    "qwen2": _LLAMA_LIKE | {"hidden_size": 128},  # its head size is always hidden_size / heads
    "qwen3": _LLAMA_LIKE,
    "bitnet": _LLAMA_LIKE | {"hidden_size": 128, "hidden_act": "relu2"},  # its head size is hidden_size / heads too
    "smollm": _LLAMA_LIKE | {"model_type": "llama", "tie_word_embeddings": True},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_attention_heads": 4,
            "max_position_embeddings": 1024, "dropout": 0.0, "attention_dropout": 0.0, "do_layer_norm_before": True,
            "activation_function": "relu", "tie_word_embeddings": True},
    "phi3": _LLAMA_LIKE | {"hidden_size": 128},
    "gpt2": {"n_embd": 64, "n_inner": 96, "n_head": 4, "n_positions": 1024},
    "gemma": _LLAMA_LIKE | {"tie_word_embeddings": True},
    "gemma2": _LLAMA_LIKE | {"sliding_window": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    "gemma3_text": _LLAMA_LIKE | {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24,
                                  "tie_word_embeddings": True},
    "granite": _LLAMA_LIKE | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
                              "attention_multiplier": 0.1},
    "olmo2": _LLAMA_LIKE,
    "olmo3": _LLAMA_LIKE | {"sliding_window": 16},
    "smollm3": _LLAMA_LIKE | {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "stablelm": _LLAMA_LIKE | {"hidden_size": 128},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 1024},
    "falcon": {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 1024},
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": _LLAMA_LIKE | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48},
    "olmoe": _LLAMA_LIKE | {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    "ministral": _LLAMA_LIKE | {"sliding_window": 16},
    "ministral3": _LLAMA_LIKE | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}},
}
"""Fields of each tiny model's transformers configuration, by the name that `tiny_model` takes."""


def tiny_architectures() -> list[str]:
    """List the names that `tiny_model` knows: every supported `model_type`, and smollm (llama with tied embeddings)."""
    return list(CONFIGS)


def tiny_model(architecture: str, *, seed: int = 0, layers: int = 2, **overrides: Any) -> LoadedModel:
    """Make the model of `tiny_transformers` ready to be observed and run: a LoadedModel without path.

    Raises: as `tiny_transformers`; ModelError E-MODEL-ARCH as `adapter_for`.
    """
    source = tiny_transformers(architecture, seed=seed, layers=layers, **overrides)
    adapter = adapter_for(source.config)
    model = CausalModel.from_transformers(source, adapter).requires_grad_(False)
    name, origin = f"tiny-random-{architecture}", f"random weights, seed {seed}"
    return LoadedModel(model, tiny_tokenizer(), adapter, name, None, origin, None)


def tiny_transformers(architecture: str, *, seed: int = 0, layers: int = 2, **overrides: Any) -> PreTrainedModel:
    """Make a random transformers model of `architecture`, float32 on the CPU; equal arguments give equal models.

    Args:
        architecture: one of `tiny_architectures()`.
        layers: decoder layers, 1 or more.
        overrides: fields of the architecture's transformers configuration, such as `hidden_size`.
    Returns: a causal model in eval mode whose outputs are finite and of order one.
    Raises: InputError E-PARAM-ARCHITECTURE for an unknown name.
    """
    if architecture not in CONFIGS:
        raise InputError(f"No tiny model {architecture[:40]!r}: use one of {', '.join(CONFIGS)}.",
                         code="E-PARAM-ARCHITECTURE")
    fields = {"model_type": architecture, "num_hidden_layers": layers, "vocab_size": VOCAB_SIZE, "bos_token_id": 256,
              "eos_token_id": 257, "pad_token_id": 257} | CONFIGS[architecture] | overrides
    config = AutoConfig.for_model(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # with sdpa, transformers 5.14 leaves the cap of Gemma 2's scores out
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    _randomize(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per UTF-8 byte (ids 0 to 255), then <s>, </s>, <unk>; decoding restores the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="</s>", clean_up_tokenization_spaces=False)


def save_tiny(folder: Path | str, architecture: str, *, seed: int = 0, layers: int = 2, **overrides: Any) -> Path:
    """Write the model of `tiny_model` as a folder that `load_model` accepts (safetensors and tokenizer).

    Returns: the folder. Raises: as `tiny_model` and `atomic_dir`.
    """
    model = tiny_transformers(architecture, seed=seed, layers=layers, **overrides)
    adapter_for(model.config)
    with atomic_dir(folder) as stage, quiet():
        model.save_pretrained(stage)
        tiny_tokenizer().save_pretrained(stage)
    return Path(folder)


def _randomize(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrite every parameter: matrices ~ N(0, 1/K), untied embeddings ~ N(0, 1), biases ~ N(0, 0.01), gains uniform
    in [0.5, 1.5] and, except in the last norm (so that logits stay of order one), with outliers."""
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                inputs = parameter.shape[0 if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else -1]
                scale = 1.0 if "embed" in name and not tied else inputs**-0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif _is_gain(model, name):
                gains = _gains(parameter, generator, outliers=name.startswith(f"{adapter_for(model.config).layers}."))
                parameter.copy_(gains - 1 if adapter_for(model.config).unit_offset else gains)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _is_gain(model: PreTrainedModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and not isinstance(model.get_submodule(owner), (nn.Linear, Conv1D))


def _gains(parameter: nn.Parameter, generator: torch.Generator, *, outliers: bool) -> torch.Tensor:
    """Draw gains [C]; a few are 20 times as large, with either sign. Per-head norms (C = head size) get one outlier."""
    gains = torch.rand(parameter.shape, generator=generator) + 0.5
    if not outliers:
        return gains
    count = min(OUTLIER_CHANNELS, max(1, len(gains) // 20))
    chosen = torch.randperm(len(gains), generator=generator)[:count]
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    gains[chosen] *= 20.0 * signs
    return gains

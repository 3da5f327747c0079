"""The table of supported architectures: which checkpoint tensors are which part of the model.

`core.models.adapter` says what an entry is made of, docs/architectures.md what is supported and how to add an architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PretrainedConfig

from core.errors import ModelError
from core.models.adapter import Experts, Factors, ModelAdapter


def _gemma_factors(config: PretrainedConfig) -> Factors:
    return Factors(embed=config.hidden_size**0.5)


def _gemma2_factors(config: PretrainedConfig) -> Factors:
    scores, caps = config.query_pre_attn_scalar**-0.5, (config.attn_logit_softcapping, config.final_logit_softcapping)
    return Factors(embed=config.hidden_size**0.5, scores=scores, softcap=caps[0], logit_softcap=caps[1])


def _gpt2_factors(config: PretrainedConfig) -> Factors:
    return Factors(scores=None if config.scale_attn_weights else 1.0)


def _granite_factors(config: PretrainedConfig) -> Factors:
    embed, residual = config.embedding_multiplier, config.residual_multiplier
    return Factors(embed, residual, config.logits_scaling, config.attention_multiplier)


def _all_heads(config: PretrainedConfig) -> int:
    return config.num_attention_heads


def _falcon_kv_heads(config: PretrainedConfig) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else _all_heads(config)


def _falcon_rejects(config: PretrainedConfig) -> str | None:
    norms = config.num_ln_in_parallel_attn
    if norms not in ((None, 1, 2) if config.new_decoder_architecture else (None, 1)):
        return f"config.json says num_ln_in_parallel_attn = {str(norms)[:20]}, which does not fit its new_decoder_architecture."
    if config.new_decoder_architecture and not config.parallel_attn:
        return "config.json says new_decoder_architecture without parallel_attn, which is not supported."
    return _rejects("alibi")(config)


def _mixtral_experts(config: PretrainedConfig, layer: int) -> Experts:
    return Experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, True)


def _qwen_experts(config: PretrainedConfig, layer: int) -> Experts | None:
    if not config.num_experts or layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step:
        return None
    return Experts(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob)


def _olmo_experts(config: PretrainedConfig, layer: int) -> Experts:
    return Experts(config.num_experts, config.num_experts_per_tok, config.intermediate_size, config.norm_topk_prob)


def _rejects(*fields: str) -> Callable[[PretrainedConfig], str | None]:
    """Make the function that rejects a configuration in which one of these fields is set."""

    def rejects(config: PretrainedConfig) -> str | None:
        found = next((field for field in fields if getattr(config, field, None)), None)
        return found and f"config.json says {found} = {str(getattr(config, found))[:20]}, which is not supported."

    return rejects


# an RMSNorm per head on q and k, before the rotation
_QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
# Gemma 2 and 3: a norm before and after attention and MLP
_FOUR_NORMS = {
    "norm2": "pre_feedforward_layernorm",
    "post_norm1": "post_attention_layernorm",
    "post_norm2": "post_feedforward_layernorm",
    "post_norms": "output",
}
# no norm before attention and MLP: they read the residual stream
_OLMO2 = ModelAdapter(
    name="OLMo 2",
    model_types=("olmo2",),
    norm="rms",
    norm1=None,
    norm2=None,
    post_norm1="post_attention_layernorm",
    post_norm2="post_feedforward_layernorm",
    post_norms="output",
    wide_qk_norm=True,
    **_QK_NORM,
)
_STABLELM = ModelAdapter(
    name="StableLM",
    model_types=("stablelm",),
    norm="layer",
    fixed_head=True,
    serves=lambda config: not config.use_parallel_residual,
    partial_rope=True,
    eps_field="layer_norm_eps",
    rejects=_rejects("qk_layernorm"),
)
# Falcon 7B and 11B: one norm for attention and MLP
_FALCON = ModelAdapter(
    name="Falcon",
    model_types=("falcon",),
    norm="layer",
    layers="transformer.h",
    embed="word_embeddings",
    final_norm="ln_f",
    norm2="input_layernorm",
    qkv=("self_attention.query_key_value",),
    interleaved=True,
    kv_heads=_falcon_kv_heads,
    o="self_attention.dense",
    mlp_in=("mlp.dense_h_to_4h",),
    gated=False,
    down="mlp.dense_4h_to_h",
    parallel="parallel_attn",
    ffn_field="ffn_hidden_size",
    activation_field="activation",
    eps_field="layer_norm_epsilon",
    rejects=_falcon_rejects,
)
# the paper's architecture
_OPT = ModelAdapter(
    name="OPT",
    model_types=("opt",),
    norm="layer",
    serves=lambda config: config.do_layer_norm_before,
    layers="model.decoder.layers",
    final_norm="final_layer_norm",
    positions="embed_positions",
    position_offset=2,
    norm1="self_attn_layer_norm",
    norm2="final_layer_norm",
    kv_heads=_all_heads,
    fixed_head=True,
    o="self_attn.out_proj",
    mlp_in=("fc1",),
    gated=False,
    down="fc2",
    ffn_field="ffn_dim",
    activation_field="activation_function",
    eps_field=None,
)
ADAPTERS = (
    # SmolLM and SmolLM2 are this architecture
    ModelAdapter(name="Llama", model_types=("llama",), norm="rms"),
    ModelAdapter(name="Mistral", model_types=("mistral",), norm="rms", window="all"),
    ModelAdapter(name="Mixtral", model_types=("mixtral",), norm="rms", window="all", experts=_mixtral_experts),
    ModelAdapter(name="Ministral", model_types=("ministral",), norm="rms", window="layer_types"),
    # queries grow with their position beyond the context of the pretraining
    ModelAdapter(name="Ministral 3", model_types=("ministral3",), norm="rms", window="all", query_growth=True),
    # biases on q, k and v: R2 and R3 permute them with their rows
    ModelAdapter(name="Qwen2", model_types=("qwen2",), norm="rms", window="layer_types"),
    ModelAdapter(name="Qwen3", model_types=("qwen3",), norm="rms", window="layer_types", **_QK_NORM),
    ModelAdapter(name="Qwen3-MoE", model_types=("qwen3_moe",), norm="rms", window="all", experts=_qwen_experts, **_QK_NORM),
    ModelAdapter(
        name="OLMoE", model_types=("olmoe",), norm="rms", wide_qk_norm=True, experts=_olmo_experts, **_QK_NORM
    ),
    ModelAdapter(
        name="Phi-3",
        model_types=("phi3",),
        norm="rms",
        window="all",
        partial_rope=True,
        qkv=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
    ),
    ModelAdapter(name="SmolLM3", model_types=("smollm3",), norm="rms", window="layer_types", no_rope="no_rope_layers"),
    ModelAdapter(name="Granite", model_types=("granite",), norm="rms", factors=_granite_factors),
    ModelAdapter(
        name="Gemma",
        model_types=("gemma",),
        norm="rms",
        unit_offset=True,
        factors=_gemma_factors,
        rejects=_rejects("use_bidirectional_attention"),
    ),
    ModelAdapter(
        name="Gemma 2",
        model_types=("gemma2",),
        norm="rms",
        window="layer_types",
        unit_offset=True,
        activation_field="hidden_activation",
        factors=_gemma2_factors,
        rejects=_rejects("use_bidirectional_attention"),
        **_FOUR_NORMS,
    ),
    ModelAdapter(
        name="Gemma 3",
        model_types=("gemma3_text",),
        norm="rms",
        window="layer_types",
        ropes=True,
        unit_offset=True,
        activation_field="hidden_activation",
        factors=lambda config: replace(_gemma2_factors(config), softcap=None),
        rejects=_rejects("use_bidirectional_attention", "attn_logit_softcapping"),
        **_FOUR_NORMS,
        **_QK_NORM,
    ),
    _OLMO2,
    replace(_OLMO2, name="OLMo 3", model_types=("olmo3",), window="layer_types", ropes=True),
    _STABLELM,
    # one norm for attention and MLP
    replace(
        _STABLELM,
        name="StableLM (parallel)",
        serves=lambda config: config.use_parallel_residual,
        norm2="input_layernorm",
        parallel="use_parallel_residual",
    ),
    # Pythia is this architecture
    ModelAdapter(
        name="GPT-NeoX",
        model_types=("gpt_neox",),
        norm="layer",
        layers="gpt_neox.layers",
        embed="embed_in",
        final_norm="final_layer_norm",
        partial_rope=True,
        qkv=("attention.query_key_value",),
        interleaved=True,
        kv_heads=_all_heads,
        fixed_head=True,
        o="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",),
        gated=False,
        down="mlp.dense_4h_to_h",
        parallel="use_parallel_residual",
        eps_field="layer_norm_eps",
    ),
    # Falcon 40B and 180B
    replace(
        _FALCON,
        name="Falcon (two norms)",
        serves=lambda config: config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1,
        norm1="ln_attn",
        norm2="ln_mlp",
    ),
    replace(
        _FALCON,
        name="Falcon (sequential)",
        serves=lambda config: not config.new_decoder_architecture and not config.parallel_attn,
        norm2="post_attention_layernorm",
    ),
    _FALCON,
    ModelAdapter(
        name="GPT-2",
        model_types=("gpt2",),
        norm="layer",
        layers="transformer.h",
        embed="wte",
        final_norm="ln_f",
        positions="wpe",
        norm1="ln_1",
        norm2="ln_2",
        qkv=("attn.c_attn",),
        kv_heads=_all_heads,
        fixed_head=True,
        o="attn.c_proj",
        mlp_in=("mlp.c_fc",),
        gated=False,
        down="mlp.c_proj",
        ffn_field="n_inner",
        activation_field="activation_function",
        eps_field="layer_norm_epsilon",
        factors=_gpt2_factors,
        rejects=_rejects("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    ),
    # arXiv:2504.12285: a squared ReLU gate, and norms before o and before down. Weights are trained to be ternary;
    # `core/models/io/bitnet.py` says how such checkpoints are stored
    ModelAdapter(
        name="BitNet",
        model_types=("bitnet",),
        norm="rms",
        fixed_head=True,
        attn_sub_norm="self_attn.attn_sub_norm",
        ffn_sub_norm="mlp.ffn_sub_norm",
    ),
    _OPT,
    # opt-350m normalises the residual sums, and has no norm before attention, MLP and head
    replace(
        _OPT,
        name="OPT (post-norm)",
        serves=lambda config: not config.do_layer_norm_before,
        final_norm=None,
        norm1=None,
        norm2=None,
        post_norm1="self_attn_layer_norm",
        post_norm2="final_layer_norm",
        post_norms="sum",
    ),
)


def adapter_for(config: PretrainedConfig) -> ModelAdapter:
    """Find the adapter that serves `config`.

    Raises: ModelError (E-MODEL-ARCH) naming the architecture, or what in its configuration is not covered.
    """
    kind = getattr(config, "model_type", None)
    for adapter in ADAPTERS:
        if kind in adapter.model_types and (adapter.serves is None or adapter.serves(config)):
            problem = adapter.problem(config)
            if problem:
                raise ModelError(f"{problem} Choose another model.", code="E-MODEL-ARCH")
            return adapter
    raise ModelError(f"Architecture {str(kind)[:40]!r} has no adapter: use {some_architectures()}.", code="E-MODEL-ARCH")


def some_architectures() -> str:
    """Write what may be used in place of an architecture without adapter: their number, some names, and where all are."""
    named = ", ".join(("llama", "mistral", "mixtral", "qwen3", "gemma2", "phi3", "gpt2"))
    return f"one of the {len(supported_model_types())} in docs/architectures, such as {named} and opt"


def supported_model_types() -> list[str]:
    """List every `model_type` that has an adapter, each once."""
    return list(dict.fromkeys(kind for adapter in ADAPTERS for kind in adapter.model_types))

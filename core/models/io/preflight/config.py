"""Check a model's `config.json`: no size beyond its limit, and no code to run.

transformers reads a configuration before any weight: `num_hidden_layers: 200000` beside an 8 kB file keeps it busy
for minutes, `num_labels: 10**9` fills the memory, `auto_map` asks for the repository's own Python. The limits are
above the sizes of every published dense model of the supported architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from core.errors import ModelError
from core.models.io.preflight.other_tools import FLOAT_TYPES, stated_format
from core.options import ROTATED_MODES
from core.recipe import BITNET_MODES

if TYPE_CHECKING:
    from core.models.io.preflight.folder import TensorInfo

MAX_LAYERS = 256
MAX_HIDDEN = 32_768
MAX_VOCAB = 1_000_000
MAX_DEPTH = 8
MAX_LIST = 20_000

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_CAPS = (
    dict.fromkeys(_LAYERS, MAX_LAYERS) | dict.fromkeys(_HIDDEN, MAX_HIDDEN) | dict.fromkeys(_HEADS, 1_024)
    | {"vocab_size": MAX_VOCAB, "num_key_value_heads": 1_024, "num_kv_heads": 1_024, "head_dim": 4_096,
       "intermediate_size": 8 * MAX_HIDDEN, "ffn_dim": 8 * MAX_HIDDEN, "ffn_hidden_size": 8 * MAX_HIDDEN,
       "moe_intermediate_size": 8 * MAX_HIDDEN, "decoder_sparse_step": MAX_LAYERS, "n_inner": 8 * MAX_HIDDEN,
       "max_position_embeddings": 2**24, "n_positions": 2**24, "num_labels": 10_000}
)
"""Largest accepted value of each size; the smallest is 1."""

ONLINE_MASTERS = "masters"
_OUTSIDE = ("lm_head", "lm_head.weight", "embed_tokens", "model.embed_tokens")
ROTATED = "h-bitlinear"
"""Our linear class of packed ternary weights behind rotated inputs (BitNet v2), which transformers refuses."""
_LINEAR_CLASSES = ("autobitlinear", "bitlinear", ROTATED)

_FACTORS = frozenset((
    "embedding_multiplier", "logit_scale", "logits_scaling", "partial_rotary_factor", "residual_multiplier",
    "rotary_emb_fraction", "rotary_pct", "scale_emb"))
_FOREIGN_MATHS = _FACTORS | frozenset((
    "add_cross_attention", "alibi", "altup_num_inputs", "attention_multiplier", "attn_logit_softcapping", "clip_qkv",
    "final_logit_softcapping", "llama_4_scaling_beta", "n_routed_experts", "no_rope_layers", "num_experts",
    "num_local_experts", "parallel_attn", "qk_layernorm", "query_pre_attn_scalar", "rotary_dim",
    "scale_attn_by_inverse_layer_idx", "scale_depth", "use_alibi", "use_bidirectional_attention", "use_parallel_residual",
    "use_qk_norm"))
"""Fields that change what a model computes, factors among them. An architecture that does not read one would ignore it without a
message."""
_READ = {
    "phi3": {"partial_rotary_factor"},
    "ministral3": {"llama_4_scaling_beta"},
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), {"num_experts", "num_local_experts"}),
    "smollm3": {"no_rope_layers"},
    "granite": {"attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"},
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"},
    "gemma3_text": {"final_logit_softcapping", "query_pre_attn_scalar"},
    "falcon": {"parallel_attn"},
    "stablelm": {"partial_rotary_factor", "use_parallel_residual"},
    "gpt_neox": {"partial_rotary_factor", "rotary_pct", "use_parallel_residual"},
}
"""Those of these fields that an architecture reads."""

_MAY_BE_NULL = {"num_key_value_heads", "num_kv_heads", "ffn_hidden_size", "head_dim", "n_inner", "num_labels"}
IMAGE_MODELS = ("gemma3", "mistral3")
"""`model_type` of models that also read images, and whose text model, described by `text_config`, is read."""
_OF_IMAGES = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
_TEXT_MODEL = re.compile(r"^(model\.)?language_model\.")
"""What stands before the names of the text model: "language_model.model.", or "model.language_model."."""
_OF_THE_WHOLE = ("quantization_config", "compression_config", "quantization", "tie_word_embeddings")
"""Fields in which the configuration of such a model speaks of its text model too."""
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk)\.(\d{1,6})\.")


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """Check a raw `config.json` at any depth: limits, types, divisibility, no code, no quantisation that is not read.

    Returns: the configuration of the model that is read: `config`, or that of the text model of one that also reads images.
    Raises: ModelError E-MODEL-CODE, E-MODEL-SIZE (above a cap) or E-MODEL-BAD.
    """
    named_only = config.get("model_type") in ("bitnet", "falcon", "phi3")  # they name code that is part of transformers
    refuse_code({key: value for key, value in config.items() if key != "auto_map"} if named_only else config)
    check_sizes(config)
    if config.get("model_type") in IMAGE_MODELS and isinstance(config.get("text_config"), dict):
        config = config["text_config"] | {name: config[name] for name in _OF_THE_WHOLE if name in config}
    if not isinstance(config.get("model_type"), str):
        raise ModelError("config.json does not say its model_type. Download the model again.", code="E-MODEL-BAD")
    if bitnet_format(config) is None:
        stated_format(config)
    _refuse_foreign_maths(config)
    return config


def text_model_name(name: str) -> str | None:
    """Return the name that a tensor of one of IMAGE_MODELS has in its text model; None for a part that reads images."""
    return None if _OF_IMAGES.match(name) else _TEXT_MODEL.sub(r"\1", name)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Check the sizes in a raw `config.json` at any depth: whole numbers up to a limit each, and heads that divide.

    Raises: ModelError E-MODEL-SIZE (above a cap) or E-MODEL-BAD.
    """
    for table in _tables(config):
        for key, cap in _CAPS.items():
            _check_size(table, key, cap)
        _check_heads(table)


def bitnet_format(config: Mapping[str, Any]) -> str | None:
    """Return how a raw `config.json` says that ternary weights are stored; None where it mentions none.

    Returns: ONLINE_MASTERS (floating, to be rounded), "autobitlinear" (packed, weight_scale multiplies), ROTATED (so too) or
        "bitlinear" (packed, weight_scale divides).
    Raises: ModelError E-MODEL-BAD for a BitNet configuration that is not one of these.
    """
    stored, own = config.get("quantization_config"), config.get("quantscope")
    mode = own.get("mode") if isinstance(own, Mapping) else None
    if own is not None and not (mode in ("fp", *BITNET_MODES) and _is_share(own.get("keep", 0.5))):
        raise ModelError('config.json has a "quantscope" entry that is not understood: it needs a known mode, and keep above '
                         "0 and up to 1.", code="E-MODEL-BAD")
    if not stored:
        return None if mode in (None, "fp") else ONLINE_MASTERS
    if not isinstance(stored, Mapping) or stored.get("quant_method") != "bitnet":
        return None
    kept = stored.get("modules_to_not_convert") or ["lm_head"]
    kind, when = stored.get("linear_class", "bitlinear"), stored.get("quantization_mode", "offline")
    outside = isinstance(kept, list) and all(name in _OUTSIDE for name in kept)
    if mode == "fp" or stored.get("use_rms_norm") or not outside or kind not in _LINEAR_CLASSES or (
            when not in ("offline", "online")) or (kind != "autobitlinear" and when == "online") or (
            kind == ROTATED) != (mode in ROTATED_MODES):
        raise ModelError("config.json describes a BitNet variant that is not read: use linear_class autobitlinear or "
                         "bitlinear, all decoder linears ternary, no extra norm inside them.", code="E-MODEL-BAD")
    return ONLINE_MASTERS if when == "online" else kind


def weight_bytes(config: Mapping[str, Any], parameters: int, outside: int, *, itemsize: int = 4) -> int:
    """Compute the bytes of a model's weights in memory.

    Masters of ternary weights are packed while they are read and take one byte each, the working copy included; packed ones
    take four bytes for their four weights; all other weights are float32.

    Args: parameters: stored elements, of which `outside` lie outside the decoder layers. itemsize: of a float model's type.
    """
    found = bitnet_format(config)
    if found is None:
        return parameters * itemsize
    return parameters + 3 * outside if found == ONLINE_MASTERS else 4 * parameters


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse a raw `config.json` without adapter for its `model_type`. Raises: ModelError E-MODEL-ARCH."""
    from core.models.adapter import LAYER_TYPES  # imported here, as they load torch and transformers
    from core.models.architectures import some_architectures, supported_model_types

    known, inner = supported_model_types(), config.get("text_config")
    kinds = [table.get("layer_types") for table in (config, inner) if isinstance(table, Mapping)]
    for kind in (kind for listed in kinds if isinstance(listed, list) for kind in listed):
        if kind not in LAYER_TYPES:
            raise ModelError(f"Architecture {str(config.get('model_type'))[:40]!r} is not supported: its layer_types name "
                             f"{str(kind)[:40]!r}, and only {' and '.join(LAYER_TYPES)} are read.", code="E-MODEL-ARCH")
    if config.get("model_type") not in known:
        raise ModelError(f"Architecture {str(config.get('model_type'))[:40]!r} is not supported: use "
                         f"{some_architectures()}.", code="E-MODEL-ARCH")


def refuse_code(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for the repository's own Python or for a downloaded kernel, at any depth.

    Raises: ModelError E-MODEL-CODE; E-MODEL-BAD for absurd nesting.
    """
    for table in _tables(config):
        attention = [value for key, value in table.items() if key.endswith(("attn_implementation", "_internal"))]
        downloaded = any("/" in str(value) for value in attention)  # transformers reads owner/name as a Hub kernel
        if table.get("auto_map") or table.get("trust_remote_code") or table.get("custom_generate") or downloaded:
            raise ModelError("This model needs its own code to run; Quantscope never runs a model's code. "
                             "Choose a model of a built-in architecture.", code="E-MODEL-CODE")


def check_layers(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that the weights hold the layers and the vocabulary that the configuration promises.

    Args:
        config: raw `config.json`; a size it does not state is not checked.
        tensors: name → shape, as stored.
    Raises: ModelError E-MODEL-MISSING (layers absent) or E-MODEL-BAD (more layers, another embedding shape).
    """
    layers = next((config[key] for key in _LAYERS if key in config), None)
    found = {int(match[1]) for name in tensors if (match := _LAYER_INDEX.search(name))}
    if layers is not None and found != set(range(layers)):
        code = "E-MODEL-MISSING" if len(found) < layers else "E-MODEL-BAD"
        raise ModelError(f"config.json promises {layers} layers, the weights hold {len(found)}. "
                         "Download the model again.", code=code)
    width = config.get("word_embed_proj_dim") or config.get("hidden_size")
    for name, tensor in tensors.items():
        stated = width is not None and "vocab_size" in config
        if not name.endswith("embed_tokens.weight") or not stated or tensor.dtype not in FLOAT_TYPES:
            continue  # a packed embedding has another shape
        if tensor.shape != (config["vocab_size"], width):
            raise ModelError(f"{name} has shape {list(tensor.shape)[:4]}, config.json says "
                             f"[{config['vocab_size']}, {width}]. Download the model again.", code="E-MODEL-BAD")


def _refuse_foreign_maths(config: Mapping[str, Any]) -> None:
    """Refuse a field that changes what a model computes and that its architecture does not read.

    Raises: ModelError E-MODEL-ARCH naming the first such field with a value that is not neutral.
    """
    rope = [config[key] for key in ("rope_parameters", "rope_scaling") if isinstance(config.get(key), Mapping)]
    rope += [own for table in rope for own in table.values() if isinstance(own, Mapping)]  # one of each layer type
    read = _READ.get(str(config.get("model_type")), set())
    for table in (config, *rope):
        for key in sorted(_FOREIGN_MATHS & table.keys() - read):
            value = table[key]
            if value and not (key in _FACTORS and type(value) in (int, float) and value == 1):
                part = "mixtures of experts of this architecture are" if "expert" in key else "this part of a model is"
                raise ModelError(f"config.json says {key} = {str(value)[:30]}: {part} not supported, and leaving that out would "
                                 "change the model. Choose another model.", code="E-MODEL-ARCH")


def _tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every JSON object in `config`, itself first, within limits of depth and list length."""
    pending: list[tuple[Any, int]] = [(config, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH or (isinstance(value, (list, Mapping)) and len(value) > MAX_LIST):
            raise ModelError("config.json is nested too deeply or holds an endless list. Choose another model.",
                             code="E-MODEL-BAD")
        if isinstance(value, Mapping):
            yield value
            pending += [(child, depth + 1) for child in value.values() if isinstance(child, (list, Mapping))]
        elif isinstance(value, list):
            pending += [(child, depth + 1) for child in value if isinstance(child, (list, Mapping))]


def _check_size(table: Mapping[str, Any], key: str, cap: int) -> None:
    if key not in table or (table[key] is None and key in _MAY_BE_NULL):
        return
    value = table[key]
    if type(value) is not int or value < 1:
        raise ModelError(f"config.json says {key} = {str(value)[:30]}: it must be a whole number from 1 to {cap:,}. "
                         "Download the model again.", code="E-MODEL-BAD")
    if value > cap:
        raise ModelError(f"config.json says {key} = {str(value)[:30]}; the limit is {cap:,}. Choose a smaller model.",
                         code="E-MODEL-SIZE")


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _check_heads(table: Mapping[str, Any]) -> None:
    """Check that heads divide the width (unless head_dim is stated), and key/value heads divide heads."""
    heads = next((table[key] for key in _HEADS if key in table), None)
    hidden = next((table[key] for key in _HIDDEN[:3] if key in table), None)
    groups = table.get("num_key_value_heads") or table.get("num_kv_heads")
    if heads and hidden and not table.get("head_dim") and hidden % heads:
        raise ModelError(f"config.json says {hidden} channels for {heads} heads: they must divide evenly. "
                         "Download the model again.", code="E-MODEL-BAD")
    if heads and groups and heads % groups:
        raise ModelError(f"config.json says {heads} heads for {groups} key/value heads: they must divide evenly. "
                         "Download the model again.", code="E-MODEL-BAD")

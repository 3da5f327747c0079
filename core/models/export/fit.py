"""Decide which format a model fits, or say why none: one place for command line, page and reports.

    compressed-tensors   weights of equal groups of neighbours or whole rows; inputs float, or 8 bits by tensor or token
    gguf                 such weights in float16 scales and groups of 32, or ternary ones; inputs float (llama.cpp rounds its own)
    bitnet               ternary weights; inputs of 8 bits by token
    transformers         every model, as float weights; inputs stay in float
"""

from __future__ import annotations

from collections.abc import Iterator

from core.checks import FLOAT_BITS, require_choice
from core.errors import InputError
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.export import FORMATS
from core.models.export.scheme import Scheme, Unfit, input_kind, integer_range, packs_zero_points, scheme_of
from core.models.export.unfold import column_order
from core.models.io.gguf_tokenizer import rule_of
from core.models.io.quantized import already_quantized
from core.models.loaded import LoadedModel
from core.quant.dynamic import rotates
from core.quant.linear.base import LinearLayer
from core.quant.linear.quant import QuantLinear
from core.quant.linear.ternary import TernaryLinear
from core.quant.rotated import TokenQuantizer
from core.quant.static import ActivationQuantizer

GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`general.architecture` by transformers' `model_type`: those that `core.models.io.gguf` reads back."""
GGUF_BLOCK = 32
HALF_ROUNDING = 2**-10
"""Largest relative change of a number that float16 holds with all its digits."""
_MARLIN_GROUPS = (0, 32, 64, 128)
_OWN = "the folder that quantize writes, after import core.hf"
_ROTATED_INPUTS = "its input is rotated by a Hadamard matrix, which other programs leave out"
_FLOAT_INPUTS = "inputs, keys and values stay in float there, which are rounded here"


def require_fit(loaded: LoadedModel, fmt: str) -> list[str]:
    """Refuse a format that cannot hold a model; return sentences on what differs there.

    Raises: InputError E-PARAM-FORMAT with the reason.
    """
    require_choice("format", fmt, FORMATS)
    try:
        return differences(loaded, fmt)
    except Unfit as reason:
        raise InputError(f"{fmt} cannot hold this model: {reason}.", code="E-PARAM-FORMAT") from reason


def differences(loaded: LoadedModel, fmt: str) -> list[str]:
    """List what differs in the exported model. Raises: Unfit where the format cannot hold it."""
    checks = {"compressed-tensors": _compressed, "gguf": _gguf, "bitnet": _bitnet, "transformers": _transformers}
    if loaded.adapter.experts is not None:
        raise Unfit("experts of a mixture are not written in it")
    if not loaded.adapter.keeps_tensors(loaded.model.config):
        raise Unfit(f"tensors of {loaded.adapter.name} are changed while they are read, and not changed back")
    found = checks[fmt](loaded.model)
    if fmt == "gguf" and rule_of(loaded.tokenizer) is None:
        raise Unfit("its tokenizer is no byte-level BPE that cuts text by a rule known here")
    return found


def loads_in(loaded: LoadedModel) -> dict[str, str]:
    """Say for vLLM, llama.cpp and transformers whether a model loads there, in which form: "yes, as …" or "no, because …"."""
    ternary = any(isinstance(linear, TernaryLinear) for _, _, linear in linears(loaded.model))
    served = {
        "vLLM": ("compressed-tensors",),
        "llama.cpp": ("gguf",),
        "transformers": ("bitnet",) if ternary else ("compressed-tensors", "transformers"),
    }
    found = {program: _answer(loaded, program, formats) for program, formats in served.items()}
    if already_quantized(loaded.model):
        answer = found["transformers"]
        found["transformers"] = f"yes, as {_OWN}" if answer.startswith("no, ") else f"{answer}; or exactly, as {_OWN}"
    return found


def linears(model: CausalModel) -> Iterator[tuple[DecoderBlock, str, LinearLayer]]:
    """Yield every linear layer of the decoder with its block and its name there."""
    for block in model.blocks:
        for name, linear in block.linears().items():
            yield block, name, linear


def schemes(model: CausalModel) -> dict[tuple[int, str], Scheme | None]:
    """Describe every linear layer by (layer index, name); None for one in float. Raises: Unfit naming the layer."""
    found = {}
    for block, name, linear in linears(model):
        order = column_order(block, name)
        try:
            scheme = scheme_of(linear, reordered=order is not None, sinks=block.attention.sink_tokens)
        except Unfit as reason:
            raise Unfit(f"layers.{block.layer_index}.{name}: {reason}") from reason
        found[block.layer_index, name] = scheme
    if not any(found.values()):
        raise Unfit("no weight is quantised")
    return found


def _answer(loaded: LoadedModel, program: str, formats: tuple[str, ...]) -> str:
    reasons = []
    for fmt in formats:
        try:
            said = differences(loaded, fmt)
            if fmt == "compressed-tensors":
                _READERS[program](loaded.model)
        except Unfit as reason:
            reasons.append(str(reason))
            continue
        return f"yes, as {fmt}" + "".join(f"; {difference}" for difference in said)
    return f"no, because {reasons[0]}"


def _compressed(model: CausalModel) -> list[str]:
    _require_quantized(model, ternary=False)
    _require_float_attention(model)
    by_token = any(scheme and scheme.inputs == "token" for scheme in schemes(model).values())
    sinks = any(block.attention.sink_tokens for block in model.blocks)
    return ["inputs of the first token are rounded there too, which stay in float here"] if by_token and sinks else []


def _vllm(model: CausalModel) -> None:
    """Refuse what vLLM has no kernel for among what compressed-tensors holds (vLLM, compressed_tensors schemes, Nov 2026)."""
    if model.config.model_type == "bitnet":
        raise Unfit("vLLM has no model of the architecture BitNet")
    for (index, name), scheme in schemes(model).items():
        if scheme is None:
            continue
        where = f"layers.{index}.{name}"
        if scheme.bits == 8 and not scheme.symmetric:
            raise Unfit(f"{where}: vLLM takes 8-bit weights without zero points only; 7 bits and fewer are stored so")
        if scheme.inputs != "float" and scheme.group:
            raise Unfit(f"{where}: vLLM takes one scale per row beside 8-bit inputs, not groups of {scheme.group}")
        if scheme.group not in _MARLIN_GROUPS:
            raise Unfit(f"{where}: vLLM takes groups of 32, 64 or 128 columns, not of {scheme.group}")


def _one_scheme(model: CausalModel) -> None:
    """Refuse what transformers 5.24 reads by the scheme of the first layers alone (`core.models.export.compressed`)."""
    found = set(filter(None, schemes(model).values()))
    if len(found) > 1 and any(map(packs_zero_points, found)):
        raise Unfit("its layers have several schemes with zero points, and transformers reads one")


_READERS = {"vLLM": _vllm, "transformers": _one_scheme}
"""Checks of what a program reads of compressed-tensors."""


def _gguf(model: CausalModel) -> list[str]:
    _require_quantized(model)
    _require_float_attention(model)
    kind, config = model.config.model_type, model.config
    if kind == "bitnet":  # as in its src/models/bitnet.cpp: the key that names the activation is not read everywhere
        raise Unfit("versions of llama.cpp run the architecture BitNet with SiLU in place of its squared ReLU, without a word")
    if kind not in GGUF_ARCHITECTURES:
        raise Unfit(f"the architecture {kind} is not written (llama, mistral, qwen2, qwen3 are)")
    if any(model.decoder.adapter.windows(config)):
        raise Unfit("its attention is limited to a window, which is not written")
    rope = model.decoder.rotaries[0].rope_type
    if rope not in ("default", "linear") and (rope, GGUF_ARCHITECTURES[kind]) != ("llama3", "llama"):
        raise Unfit(f"its rotary positions ({rope}) are not written")
    for block, name, linear in linears(model):
        reason = _gguf_obstacle(block, name, linear)
        if reason:
            raise Unfit(f"layers.{block.layer_index}.{name}: {reason}")
    ternary = any(isinstance(linear, TernaryLinear) for _, _, linear in linears(model))
    rounded = ["the scale of a ternary weight is rounded to float16"] if ternary else []
    return [*rounded, "llama.cpp rounds inputs to 8 bits in blocks of its own"]


def _gguf_obstacle(block: DecoderBlock, name: str, linear: LinearLayer) -> str | None:
    if linear.in_features % GGUF_BLOCK:
        return f"{linear.in_features} columns are no multiple of its blocks of {GGUF_BLOCK}"
    if isinstance(linear, TernaryLinear):
        if not bool((linear.weight_scale.half().float() / linear.weight_scale - 1).abs().max() < HALF_ROUNDING):
            return "the scale of its ternary weight is no float16 number"
        if rotates(linear.kind):
            return _ROTATED_INPUTS
        return None if linear.kind in ("int8", "fp") else "its inputs have 4 bits or are sparse, and llama.cpp's have 8"
    if input_kind(linear, block.attention.sink_tokens) != "float":
        return "its inputs are quantised by ranges that llama.cpp does not have"
    if not isinstance(linear, QuantLinear) or linear.bits >= FLOAT_BITS:
        return None
    scheme = scheme_of(linear, reordered=column_order(block, name) is not None, sinks=0)
    low, high = integer_range(linear)
    if scheme.group and scheme.group % GGUF_BLOCK:
        return f"groups of {scheme.group} columns are narrower than its blocks of {GGUF_BLOCK}"
    if low < -128 or high > 127:
        return f"{linear.bits}-bit codes with zero points do not fit the 8 bits of Q8_0: use 7 bits or fewer"
    if not bool((linear.weight_scale.half().float() == linear.weight_scale.float()).all()):
        return "its scales are float32, and those of GGUF float16"
    return None


def _bitnet(model: CausalModel) -> list[str]:
    _require_quantized(model)
    for block, name, linear in linears(model):
        if not isinstance(linear, TernaryLinear):
            raise Unfit(f"layers.{block.layer_index}.{name}: its weights are not ternary")
        if rotates(linear.kind):
            raise Unfit(f"layers.{block.layer_index}.{name}: {_ROTATED_INPUTS}")
        if linear.bias is not None:
            raise Unfit(f"layers.{block.layer_index}.{name} has a bias, which packed layers of transformers do not add here")
        if bool((linear.bounds.diff() % 4).any()):
            raise Unfit(f"layers.{block.layer_index}.{name}: its rows are no multiple of four")
    rules = model.blocks[0].rules
    if min(rules.attention.kv, rules.attention.q) < FLOAT_BITS:
        raise Unfit("its keys, values or queries are quantised, which the folder cannot say")
    return [] if rules.mode == "w1.58a8" else [f"transformers rounds all inputs to 8 bits, Quantscope by {rules.mode}"]


def _transformers(model: CausalModel) -> list[str]:
    _require_quantized(model)
    rounded = any(_rounds(block) for block in model.blocks)
    return [f"weights are float32; {_FLOAT_INPUTS}"] if rounded else ["weights are float32"]


def _rounds(block: DecoderBlock) -> bool:
    """Say whether a block quantises any activation."""
    if _attention_site(block):
        return True
    return any(x.kind != "fp" if isinstance(x, TernaryLinear) else _below(x.quantizer) for x in block.linears().values())


def _below(quantizer: ActivationQuantizer | TokenQuantizer | None) -> bool:
    return quantizer is not None and quantizer.bits < FLOAT_BITS


def _attention_site(block: DecoderBlock) -> str | None:
    """Name a site of the attention that is quantised, with its bits; None where there is none."""
    attention = block.attention
    for site in ("q", "k", "v"):
        quantizer = getattr(attention, f"{site}_quantizer")
        if _below(quantizer):
            return f"{site} with {quantizer.bits} bits"
    rules = attention.bits
    found = {"q": rules.q, "keys and values": rules.kv} if rules else {}
    found["softmax"] = attention.softmax_bits
    return next((f"{name} with {bits} bits" for name, bits in found.items() if bits < FLOAT_BITS), None)


def _require_float_attention(model: CausalModel) -> None:
    for block in model.blocks:
        site = _attention_site(block)
        if site:
            raise Unfit(f"layers.{block.layer_index} quantises {site} inside attention, which has no place there")


def _require_quantized(model: CausalModel, *, ternary: bool = True) -> None:
    if all(block.is_float for block in model.blocks):
        raise Unfit("no weight is quantised: name a folder that quantize made")
    if not ternary and any(isinstance(linear, TernaryLinear) for _, _, linear in linears(model)):
        raise Unfit("its weights are ternary: use gguf or bitnet")

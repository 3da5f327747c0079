"""Recognise checkpoints that other tools have quantised, and refuse formats that are not read.

They are recognised by configuration, side files, tensor names and tensor types. Their integers and 8-bit floats mean nothing
without that tool's scales and layout, so they are never read as weights, except BitNet's (`config.bitnet_format`) and those of
the tools in `READ`, whose settings are stated (`core.models.io.foreign_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ModelError

if TYPE_CHECKING:
    from core.models.io.preflight.folder import TensorInfo

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""safetensors types in which a weight may be stored."""

TITLES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "NVIDIA ModelOpt",
    "hqq": "HQQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "mlx": "MLX",
    "aqlm": "AQLM",
    "torchao": "torchao",
    "quanto": "Quanto",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "mxfp4": "MXFP4",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
}
"""Name for people by `quant_method`."""

METHOD = "quantscope"
"""`quant_method` of the folders that Quantscope saves."""
READ = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "mlx", "bitsandbytes")
"""`quant_method` of the formats that are dequantised."""
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which earlier versions of these tools state what `quantization_config` states now."""
_SUFFIXES = (
    (r"\.g_idx", "gptq"),
    (r"\.W_q", "hqq"),
    (r"\.weight_packed", "compressed-tensors"),
    (r"\.SCB|\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)", "bitsandbytes"),
    (r"\.weight_scale_inv", "fp8"),
    (r"\.qweight", "awq"),
)
"""Names are tried in this order: tensors of GPTQ and AWQ share the name qweight, and only GPTQ has g_idx."""

_BUFFER = re.compile(r"(?:rotary_emb\.inv_freq|\.attn\.(?:masked_)?bias|position_ids)$")


def stated_format(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Find the quantisation of another tool that a raw `config.json` names.

    Returns: (its `quant_method`, a member of `READ`; its settings), None where none is named.
    Raises: ModelError E-MODEL-BAD naming a tool whose checkpoints are not read.
    """
    for key in ("quantization_config", "compression_config", "quantization"):
        stated = config.get(key)
        if not stated:
            continue
        method = stated.get("quant_method") or stated.get("quant_algo") if isinstance(stated, Mapping) else None
        if method == METHOD:
            continue
        if method is None and isinstance(stated, Mapping) and {"group_size", "bits"} <= stated.keys():
            method = "mlx" if "quant_method" not in stated and key == "quantization" or "quantization" in config else None
        if method is None:
            method = "compressed-tensors" if key == "compression_config" else ""
        if method not in READ:
            raise _quantized(str(method))
        return method, stated
    return None


def refuse_quantized_files(folder: Path) -> None:
    """Refuse a folder with the side file of a tool that is not read. Raises: ModelError E-MODEL-BAD naming the tool."""
    if (folder / "hf_quant_config.json").exists():
        raise _quantized("modelopt")


def refuse_quantized_tensors(tensors: Mapping[str, TensorInfo], *, ternary: bool) -> None:
    """Refuse weights that are not floating-point numbers, by the tool that made them where the names tell it.

    Args: ternary: whether the configuration says that decoder linears are packed as BitNet's (uint8 matrices inside the
        layers).
    Raises: ModelError E-MODEL-BAD naming the tool, or the first tensor that is no float.
    """
    for pattern, method in _SUFFIXES:
        if any(re.search(f"(?:{pattern})$", name) for name in tensors):
            raise _quantized(method)
    for name, tensor in tensors.items():
        packed = ternary and tensor.dtype == "U8" and ".layers." in name and len(tensor.shape) == 2
        if tensor.dtype in FLOAT_TYPES or _BUFFER.search(name) or packed:
            continue
        base = name.removesuffix(".weight")
        if tensor.dtype == "U32" and f"{base}.scales" in tensors:
            raise _quantized("mlx")
        if f"{base}.weight_scale" in tensors:
            raise _quantized("fp8" if tensor.dtype.startswith("F8") else "")
        raise no_weight(name, tensor.dtype)


def no_weight(name: str, dtype: str) -> ModelError:
    """Make the error for a tensor of integers or 8-bit floats that nothing makes a weight."""
    return ModelError(
        f"{name[:80]} is stored as {dtype}, without a scale that makes it a weight: floating-point weights are read. Use the "
        "original float model.",
        code="E-MODEL-BAD",
    )


def checkpoint_of(method: str) -> str:
    """Return the opening of a sentence on a checkpoint of the tool with this `quant_method`: "This is a GPTQ checkpoint"."""
    title = TITLES.get(method.lower(), method[:30])
    article = "an" if title[:1] in "AEFHMaeiou" else "a"
    return f"This is {article} {title} checkpoint" if title else "These weights were quantised by a tool that is not named"


def _quantized(method: str) -> ModelError:
    why = "config.json does not state its settings" if method in READ else "this format is not read"
    return ModelError(
        f"{checkpoint_of(method)}: {why}. Use the original float model, so that Quantscope can quantise it.",
        code="E-MODEL-BAD",
    )

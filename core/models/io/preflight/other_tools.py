"""Recognise and refuse checkpoints that other tools have quantised, naming the tool.

They are recognised by configuration, side files, tensor names and tensor types. Their integers and 8-bit floats mean nothing
without that tool's scales and layout, so they are never read as weights, except BitNet's (`config.bitnet_format`).
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

_TITLES = {
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
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
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


def refuse_quantized_config(config: Mapping[str, Any]) -> None:
    """Refuse a raw `config.json` that names another tool's quantisation.

    Raises: ModelError E-MODEL-BAD naming the tool.
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
        raise _quantized(str(method))


def refuse_quantized_files(folder: Path) -> None:
    """Refuse a folder with the side file of another tool. Raises: ModelError E-MODEL-BAD naming the tool."""
    for name, method in _FILES.items():
        if (folder / name).exists():
            raise _quantized(method)


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
        raise ModelError(
            f"{name[:80]} is stored as {tensor.dtype}, without a scale that makes it a weight: "
            "floating-point weights are read. Use the original float model.",
            code="E-MODEL-BAD",
        )


def _quantized(method: str) -> ModelError:
    title = _TITLES.get(method.lower(), method[:30])
    article = "an" if title[:1] in "AEFHMaeiou" else "a"
    found = (
        f"This is {article} {title} checkpoint" if title else "These weights are quantised already, by a tool that is not named"
    )
    return ModelError(
        f"{found}: quantised checkpoints of other tools cannot be opened. Use the original float model, so that "
        "Quantscope can quantise it.",
        code="E-MODEL-BAD",
    )

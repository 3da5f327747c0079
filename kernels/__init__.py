"""Low-bit operations, each with its reference. Importing this package loads no Triton and no device.

An op that has Triton kernels is loaded when it is first accessed (`kernels.weight_only_linear`). It runs its kernel on CUDA
tensors and its reference on others. No module has the name of an op: importing it would replace the op here.

`__version__` stays "0.0.0": transformers looks for another package of this name by importing it, and takes that number as too
old to use.
"""

from __future__ import annotations

import importlib

from kernels.backend import Backend, Choice
from kernels.codes import (
    Codes,
    code_limits,
    code_offset,
    dequantize,
    dequantize_rows,
    fake_quantize,
    quantize,
    quantize_rows,
    straight_through,
)
from kernels.linear import select_linear_backend
from kernels.packing import pack, packed_width, unpack
from kernels.walsh import hadamard

__version__ = "0.0.0"

_LAZY = {
    "cluster_linear": "linear.cluster",
    "decode_attention": "kv.attention",
    "gated_up": "ternary.sparse",
    "kv_append": "kv.append",
    "norm_quantize": "norm_quant",
    "norm_quantize_dynamic": "norm_quant",
    "rope_store": "rope",
    "sparse_down": "ternary.sparse",
    "ternary_linear": "ternary.linear",
    "topk_quant": "topk",
    "weight_only_linear": "linear.weight_only",
}
"""Ops with Triton kernels, and the module of each."""

__all__ = [
    "Backend",
    "Choice",
    "Codes",
    "cluster_linear",
    "code_limits",
    "code_offset",
    "decode_attention",
    "dequantize",
    "dequantize_rows",
    "fake_quantize",
    "gated_up",
    "hadamard",
    "kv_append",
    "norm_quantize",
    "norm_quantize_dynamic",
    "pack",
    "packed_width",
    "quantize",
    "quantize_rows",
    "rope_store",
    "select_linear_backend",
    "sparse_down",
    "straight_through",
    "ternary_linear",
    "topk_quant",
    "unpack",
    "weight_only_linear",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"kernels.{_LAZY[name]}"), name)  # asked for once
    return found

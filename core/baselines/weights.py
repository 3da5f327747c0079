"""Quantise one weight [N, K] by another library: its codes and scales, and its own dequantisation.

    gguf          blocks of 32 columns: codes, float16 scale and, in Q4_1 and Q5_1, float16 minimum (gguf.quants)
    bnb-nf4       blocks of 64 weights: codes of 16 normal quantiles, float32 scale; doubled, the scale is a code of 8 bits too
    bnb-int8      one float32 scale per row; the library's own product also rounds inputs to int8, but for columns above 6
    torchao-int8  one float32 scale per row
    torchao-int4  groups of 32 columns: codes, bfloat16 scale, int8 zero point
    llmc-gptq     groups of 32 columns: codes, bfloat16 scale; rounded by GPTQ on what enters the layer

What does not depend on the weight, the 16 quantiles of NF4 and the 256 levels of its doubled scales, is not counted. Sources:
github.com/ggml-org/llama.cpp/tree/master/gguf-py, arXiv:2305.14314 (NF4), arXiv:2208.07339 (LLM.int8()), github.com/pytorch/ao,
github.com/vllm-project/llm-compressor (GPTQ, arXiv:2210.17323).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from core.quant.linear.foreign import ForeignWeight
from kernels import pack

GROUP = 32
"""Columns of a block of GGUF's types and of a group of torchao's int4."""
OUTLIER = 6.0
"""Magnitude from which LLM.int8() multiplies a column of its input in float (arXiv:2208.07339)."""


def gguf_weight(weight: Tensor, kind: str) -> ForeignWeight:
    """Quantise by a type of GGUF, such as "Q4_0"; K is a multiple of `GROUP`."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    code = GGMLQuantizationType[kind]
    blocks = quantize(weight.cpu().numpy(), code)
    tensors = {"packed": torch.from_numpy(blocks).to(weight.device)}
    return ForeignWeight(tensors, lambda: torch.from_numpy(dequantize(blocks, code)).to(weight.device))


def nf4_weight(weight: Tensor, double: bool) -> ForeignWeight:
    """Quantise to NF4 by bitsandbytes, with its scales in float32 or quantised again."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    tensors = {"packed": packed, "scale": state.absmax}
    if double:
        tensors |= {"scale_of_scales": state.state2.absmax, "scale_offset": state.offset}
    return ForeignWeight(tensors, lambda: functional.dequantize_4bit(packed, state))


def int8_weight(weight: Tensor) -> ForeignWeight:
    """Quantise to int8 by bitsandbytes; the product is its layer's, which rounds its input too."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    rows, columns = weight.shape
    layer = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=OUTLIER, device="meta")
    layer.weight = Int8Params(weight.to("cpu", copy=True), requires_grad=False, has_fp16_weights=False)
    layer.to(weight.device).eval()  # moving quantises
    codes, scales = layer.weight.CB, layer.weight.SCB
    return ForeignWeight(
        {"packed": codes, "scale": scales},
        lambda: functional.int8_vectorwise_dequant(codes, scales),
        lambda x: layer(x.half()).to(x.dtype),  # the type that the library quantises from
    )


def torchao_int8(weight: Tensor) -> ForeignWeight:
    """Quantise to int8 by torchao, weights only."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Sequential(_linear(weight))
    quantize_(layer, Int8WeightOnlyConfig(version=2))
    made = layer[0].weight
    return ForeignWeight({"packed": made.qdata, "scale": made.scale}, made.dequantize)


def torchao_int4(weight: Tensor) -> ForeignWeight:
    """Quantise to int4 in groups by torchao, weights only; K is a multiple of `GROUP`.

    The codes are counted two in a byte, as its formats for GPUs store them; on CPUs the library gives each a byte.
    """
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    layer = nn.Sequential(_linear(weight))
    quantize_(layer, IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP), scale_dtype=torch.bfloat16))
    made = layer[0].weight
    packed = pack((made.qdata + 8).to(torch.uint8), 4)
    return ForeignWeight({"packed": packed, "scale": made.scale, "zero_point": made.zero_point}, made.dequantize)


def gptq_weight(weight: Tensor, moments: Tensor) -> ForeignWeight:
    """Quantise to int4 in groups by GPTQ of llm-compressor; K is a multiple of `GROUP`.

    Args: moments: mean of x xᵀ over the layer's inputs x, [K, K].
    """
    from compressed_tensors.quantization import QuantizationArgs, dequantize, quantize
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import MemorylessMinMaxObserver

    args = QuantizationArgs(num_bits=4, group_size=GROUP, symmetric=True, strategy="group")
    found = MemorylessMinMaxObserver("weight", args)(weight).get_qparams()
    stored, zero = found["scale"].to(torch.bfloat16), found["zero_point"]
    scale = stored.float()
    rounded, _, _ = quantize_weight(weight[None].clone(), moments[None].clone(), scale[None], zero[None], None, args)
    codes = quantize(rounded[0], scale, zero, args, dtype=torch.int8)
    packed = pack((codes + 8).to(torch.uint8), 4)
    return ForeignWeight({"packed": packed, "scale": stored}, lambda: dequantize(codes, scale, zero, args))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


QUANTIZERS = {
    **{f"gguf-{kind.lower()}": partial(gguf_weight, kind=kind) for kind in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")},
    "bnb-int8": int8_weight,
    "bnb-nf4": partial(nf4_weight, double=False),
    "bnb-nf4-double": partial(nf4_weight, double=True),
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
}
"""Function of each baseline of weights, float32 [N, K] to ForeignWeight."""
CALIBRATED = {"llmc-gptq": gptq_weight}
"""The same for baselines that also need the moments of the layer's inputs."""
GROUPED = tuple(name for name in QUANTIZERS if name.startswith("gguf-")) + ("torchao-int4", "llmc-gptq")
"""Baselines whose K must be a multiple of `GROUP`."""

"""Write a quantised model in the format of compressed-tensors, which vLLM and transformers read.

    pack-quantized   inputs float            weight_packed [n, K b / 32] int32, weight_scale [n, G], weight_shape [2];
                                             weight_zero_point [n b / 32, G] int32 where weights have one
    int-quantized    inputs of 8 bits        weight [n, K] int8, weight_scale, weight_zero_point [n, G] int8;
                                             input_scale, input_zero_point [1] where ranges are static

A word of 32 bits holds neighbouring codes of b bits, the first one in the lowest bits, as unsigned numbers; zero points are
packed along the rows. Ŵ = scale * (code - zero point), as here; scales are stored in float32: products are then exact in it.
transformers 5.24 expects packed zero points unpacked unless `quantization_config` says "dequantize", and then reads all layers by
one scheme (5.14 reads them packed). Sources: compressed-tensors 0.20 (compressors/pack_quantized, compressors/naive_quantized),
transformers 5.24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.models.decoder import CausalModel
from core.models.export.fit import schemes
from core.models.export.scheme import INPUT_BITS, Scheme, packs_zero_points, static_input
from core.models.export.unfold import other_tensors, projections
from core.quant.linear.quant import QuantizedWeight
from kernels import code_offset
from kernels.codes import signed_codes


def compressed_tensors(model: CausalModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a model that fits, by name, and its `quantization_config`. Raises: Unfit."""
    found, tensors = schemes(model), other_tensors(model)
    named: dict[Scheme, list[str]] = {}
    floats = ["lm_head", *_outside(model)]
    for projection in projections(model):
        index, fused = projection.fused
        scheme = found[index, fused]
        if projection.bias is not None:
            tensors[f"{projection.name}.bias"] = projection.bias
        if scheme is None:
            tensors[f"{projection.name}.weight"] = projection.weight
            floats.append(projection.name)
            continue
        named.setdefault(scheme, []).append(projection.name)
        parts = _weight_tensors(projection.weight, scheme)
        if scheme.inputs == "static":
            grid = static_input(model.blocks[index].linears()[fused])
            parts |= {"input_scale": grid.scale.clone(), "input_zero_point": grid.zero_point.to(torch.int8)}
        tensors |= {f"{projection.name}.{part}": tensor for part, tensor in parts.items()}
    return tensors, _config(named, floats)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes [n, K] uint8 of 4 or 8 bits along the columns: [n, ceil(K bits / 32)] int32."""
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.flatten().view(torch.int32).view(len(codes), -1)


def _weight_tensors(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Return the tensors that store a weight [n, K]."""
    step = scheme.group or weight.codes.shape[1]
    repeats = weight.offsets.diff() // step
    scale = weight.scale.to(torch.float32).repeat_interleave(repeats, dim=1)
    zero = weight.zero_point.to(torch.int16).repeat_interleave(repeats, dim=1)
    codes = signed_codes(weight.codes, weight.bits).to(torch.int16)
    if scheme.symmetric:
        codes -= zero.repeat_interleave(step, dim=1)
    codes, zero = codes.to(torch.int8), zero.to(torch.int8)
    stored = {"weight_scale": scale}
    if scheme.inputs != "float":
        return stored | {"weight": codes} | ({} if scheme.symmetric else {"weight_zero_point": zero})
    stored |= {"weight_packed": _packed(codes, scheme.bits), "weight_shape": torch.tensor(codes.shape)}
    return stored if scheme.symmetric else stored | {"weight_zero_point": _packed(zero.t(), scheme.bits).t()}


def _packed(codes: Tensor, bits: int) -> Tensor:
    return pack_words((codes.to(torch.int16) + code_offset(bits)).to(torch.uint8), bits)


def _config(named: dict[Scheme, list[str]], floats: list[str]) -> dict[str, Any]:
    """Write `quantization_config`: one group of layers for each scheme; a single scheme names the class of all layers."""
    one = len(named) == 1
    packed = all(scheme.inputs == "float" for scheme in named)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if one else names,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group else "channel",
                "group_size": scheme.group or None,
                "dynamic": False,
            },
            "input_activations": _inputs(scheme),
            "output_activations": None,
            "format": _format(scheme),
        }
        for number, (scheme, names) in enumerate(named.items())
    }
    mixed = len({_format(scheme) for scheme in named}) > 1
    return {
        "quant_method": "compressed-tensors",
        "dequantize": one and any(packs_zero_points(scheme) for scheme in named),
        "format": "mixed-precision" if mixed else "pack-quantized" if packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": floats,
        "kv_cache_scheme": None,
    }


def _format(scheme: Scheme) -> str:
    return "pack-quantized" if scheme.inputs == "float" else "int-quantized"


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.inputs == "float":
        return None
    by_token = scheme.inputs == "token"
    own = {"strategy": "token" if by_token else "tensor", "dynamic": by_token}
    return {"num_bits": INPUT_BITS, "type": "int", "symmetric": False, **own}


def _outside(model: CausalModel) -> list[str]:
    """Name the linear layers outside the decoder's layers, beside the head: OPT's projections of a narrow embedding."""
    places = model.decoder.adapter.outside(model.config)
    return [name.removesuffix(".weight") for place, (name, _) in places.items() if place.startswith("project_")]

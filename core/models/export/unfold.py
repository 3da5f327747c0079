"""Return the weights of a model to the names and the channel order of its checkpoint.

R1 and R4 are gathers of a norm here: gain, bias and the columns that read them move back. R3 and R5, and R2 without rotary
positions, are orders of rows and of the columns that read them: such weights compute the same function as they are. R2 behind a
rotation by position, a rotation of queries and keys, and the mean subtracted from keys change no score: they are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.quant.linear.base import LinearLayer
from core.quant.linear.quant import QuantizedWeight, QuantLinear
from core.quant.linear.ternary import TernaryLinear
from core.quant.rotated import TokenQuantizer


@dataclass(frozen=True)
class TernaryWeight:
    """A ternary weight: codes [n, K] int8 in {-1, 0, 1}, scale 0-dim float32; Ŵ = scale * codes."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Compute Ŵ [n, K] float32."""
        return self.codes.to(torch.float32) * self.scale


@dataclass(frozen=True)
class Projection:
    """One linear layer of a checkpoint.

    Attributes:
        name: its path in the checkpoint.
        fused: (layer index, name) of the block's linear layer that holds it.
        weight: [n, K], codes or float32.
        bias: [n], or None.
    """

    name: str
    fused: tuple[int, str]
    weight: QuantizedWeight | TernaryWeight | Tensor
    bias: Tensor | None


def column_order(block: DecoderBlock, name: str) -> Tensor | None:
    """Return the order [K] in which a linear layer reads the checkpoint's channels; None where nothing is reordered."""
    norm = {"qkv": block.norm1, "up": block.norm2}.get(name)
    return None if norm is None else norm.order


def projections(model: CausalModel, *, floats: bool = False) -> Iterator[Projection]:
    """Yield every linear layer of the decoder by its name in the checkpoint, columns in its order.

    Args: floats: dequantise, which every weight allows; else codes, whose groups of columns must not be reordered.
    """
    adapter, config = model.decoder.adapter, model.config
    spec = adapter.spec(config)
    paths = {
        "qkv": [*zip(adapter.qkv, map(spec.width, ("q", "k", "v")), strict=True)],
        "o": [(adapter.o, spec.hidden)],
        "up": [(path, spec.ffn) for path in adapter.mlp_in],
        "down": [(adapter.down, spec.hidden)],
    }
    for block in model.blocks:
        for name, linear in block.linears().items():
            order = column_order(block, name)
            parts = _weights(linear, [rows for _, rows in paths[name]], None if order is None else order.argsort(), floats)
            start = 0
            for (path, rows), weight in zip(paths[name], parts, strict=True):
                bias = None if linear.bias is None else linear.bias[start : start + rows]
                yield Projection(f"{adapter.layers}.{block.layer_index}.{path}", (block.layer_index, name), weight, bias)
                start += rows


def other_tensors(model: CausalModel) -> dict[str, Tensor]:
    """Collect what is no linear layer of the decoder: embeddings, head, and norms in the checkpoint's order."""
    adapter, found = model.decoder.adapter, dict(model.decoder.outside())
    for block in model.blocks:
        norms = {
            adapter.norm1: block.norm1,
            adapter.norm2: block.norm2,
            adapter.attn_sub_norm: block.attention.attn_sub_norm,
            adapter.ffn_sub_norm: block.mlp.ffn_sub_norm,
        }
        for path, norm in norms.items():
            if norm is None:
                continue
            norm = norm if norm.order is None else norm.permuted(norm.order.argsort())
            for leaf in ("weight", "bias"):
                if getattr(norm, leaf) is not None:
                    found[f"{adapter.layers}.{block.layer_index}.{path}.{leaf}"] = getattr(norm, leaf)
        for path, gain in ((adapter.q_norm, block.attention.q_norm), (adapter.k_norm, block.attention.k_norm)):
            if gain is not None:
                found[f"{adapter.layers}.{block.layer_index}.{path}.weight"] = gain
    return found


def _weights(
    linear: LinearLayer, rows: list[int], inverse: Tensor | None, floats: bool
) -> list[QuantizedWeight | TernaryWeight | Tensor]:
    """Split a fused weight into its projections, columns back in the checkpoint's order."""
    if isinstance(linear, TernaryLinear) and not floats:
        return [TernaryWeight(*part) for part in linear.projections()]
    if floats or not isinstance(linear, QuantLinear) or linear.bits >= 16:
        weight = linear.dequantized_weight()
        quantizer = linear.quantizer
        if isinstance(quantizer, TokenQuantizer):
            weight = quantizer.rotate(weight)  # its own inverse
        weight = weight if inverse is None else weight[:, inverse]
        return list(weight.split(rows))
    weight = linear.quantized_weight()
    codes = weight.codes if inverse is None else weight.codes[:, inverse]
    parts = zip(*(tensor.split(rows) for tensor in (codes, weight.scale, weight.zero_point)), strict=True)
    return [replace(weight, codes=c, scale=s, zero_point=z) for c, s, z in parts]

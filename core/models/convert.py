"""Copy tensors of a transformers model into our blocks, folding what architectures differ in into weights.

    stored by the architecture                      read as
    gain minus one                                  gain
    [in, out] (GPT-2)                               [out, in]
    (queries, k, v) of kv head after kv head        [q; k; v]
    only the first R of E channels rotated          q and k in the order that pairs channels e and e + E / 2, as everywhere; the
                                                    others are rotated by the angle 0 (`whole_rotation`)
    scores times c in place of E**-0.5              rows of Wq, or the gain of q's norm, times c E**0.5
    attention and MLP times c                       rows of Wo and W_down times c
    logits divided by c                             last norm divided by c

Shapes: H query heads, Hkv key/value heads, E head dimension, R rotated channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from core.models.adapter import BlockSpec, ModelAdapter
from core.models.norm import ReorderNorm
from core.quant.linear.base import FloatLinear

EXPERTS = "mlp"
"""Path of a layer's mixture in transformers: `gate.weight` [N, D], `experts.gate_up_proj` [N, 2 F, D], `experts.down_proj`
[N, D, F]."""


def block_parts(
    layer: nn.Module, adapter: ModelAdapter, config: PretrainedConfig, spec: BlockSpec
) -> dict[str, ReorderNorm | FloatLinear | list[FloatLinear] | Tensor]:
    """Copy the tensors of a transformers layer into the parts of a `DecoderBlock`, by their names in its `__init__`."""
    factors = adapter.factors_of(config)
    scores = 1.0 if factors.scores is None else factors.scores * spec.head_dim**0.5

    def gain(path: str) -> Tensor | None:
        weight = getattr(layer.get_submodule(path), "weight", None)
        return None if weight is None else weight.detach() + 1 if adapter.unit_offset else weight.detach().clone()

    def norm(path: str | None) -> ReorderNorm:
        if path is None:
            return ReorderNorm("none", None, None, spec.eps)
        bias = getattr(layer.get_submodule(path), "bias", None)
        return ReorderNorm(spec.norm, gain(path), None if bias is None else bias.detach().clone(), spec.eps)

    def linear(paths: tuple[str, ...], rows: Tensor | None = None, factor: float = 1.0) -> FloatLinear:
        modules = [layer.get_submodule(path) for path in paths]
        weight = torch.cat([m.weight.t() if isinstance(m, Conv1D) else m.weight for m in modules]).detach()
        bias = None if modules[0].bias is None else torch.cat([m.bias for m in modules]).detach()
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        if factor != 1.0:
            weight, bias = weight * factor, None if bias is None else bias * factor
        return FloatLinear(weight, bias)

    parts = {name: norm(getattr(adapter, name)) for name in ("norm1", "norm2")}
    others = ("post_norm1", "post_norm2", "attn_sub_norm", "ffn_sub_norm")
    parts |= {name: norm(path) for name in others if (path := getattr(adapter, name)) is not None}
    parts |= {
        "qkv": linear(adapter.qkv, _head_rows(adapter, config, spec)),
        "o": linear((adapter.o,), factor=factors.residual),
    }
    if spec.experts:
        mlp = layer.get_submodule(EXPERTS)
        parts["router"] = mlp.gate.weight.detach().clone()
        for name, fused in (("up", mlp.experts.gate_up_proj), ("down", mlp.experts.down_proj)):
            parts[name] = [FloatLinear(weight.clone(), None) for weight in fused.detach()]
    else:
        parts |= {"up": linear(adapter.mlp_in), "down": linear((adapter.down,), factor=factors.residual)}
    if spec.qk_norm:
        parts |= {"q_norm": gain(adapter.q_norm) * scores, "k_norm": gain(adapter.k_norm)}
    elif scores != 1.0:
        for tensor in (parts["qkv"].weight, parts["qkv"].bias):
            if tensor is not None:
                tensor.data[: spec.width("q")] *= scores
    return parts


def outside_tensors(tensors: Mapping[str, Tensor], adapter: ModelAdapter, config: PretrainedConfig) -> dict[str, Tensor]:
    """Return the tensors outside the decoder layers by their names in a checkpoint, as `Decoder` computes with them.

    Args: tensors: of a transformers model, by name; those of its layers may be among them.
    """
    logits = adapter.factors_of(config).logits
    found = {name: t for name, t in tensors.items() if not name.startswith(f"{adapter.layers}.")}
    for place, (name, _) in adapter.outside(config).items():
        if place == "norm.weight" and adapter.unit_offset:
            found[name] = found[name] + 1
        if place in ("norm.weight", "norm.bias") and logits != 1.0:
            found[name] = found[name] / logits
    return found


def whole_rotation(cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Make cosines and sines of E channels of R channels', [1, T, R]: channels that are not rotated have the angle 0."""
    if cos.shape[-1] == head_dim:
        return cos, sin
    wider = (0, (head_dim - cos.shape[-1]) // 2)
    cos, sin = (pad(t.unflatten(-1, (2, -1)), wider, value=rest).flatten(-2) for t, rest in ((cos, 1.0), (sin, 0.0)))
    return cos, sin


def _head_rows(adapter: ModelAdapter, config: PretrainedConfig, spec: BlockSpec) -> Tensor | None:
    """Compute which stored row is which row of [q; k; v]; None where they lie in this order."""
    heads, dim, rotated = spec.heads + 2 * spec.kv_heads, spec.head_dim, adapter.rotated(config)
    rows = torch.arange(heads * dim).view(heads, dim)
    if adapter.interleaved:
        rows = rows.view(spec.kv_heads, spec.groups + 2, dim)
        rows = torch.cat([rows[:, :-2].flatten(0, 1), rows[:, -2], rows[:, -1]])
    if rotated < dim:
        turned, still = torch.arange(rotated).view(2, -1), torch.arange(rotated, dim).view(2, -1)
        paired = torch.cat([turned, still], dim=1).flatten()
        rows = torch.cat([rows[: -spec.kv_heads, paired], rows[-spec.kv_heads :]])
    return rows.flatten() if adapter.interleaved or rotated < dim else None

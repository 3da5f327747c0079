"""Fold scales and rotations into a float block: its sites change their basis, what it computes does not.

    site       divided by         folded into                                         multiplied back in
    attn_in    s [D]              gain and bias of norm1                              columns of Wq, Wk, Wv
    mlp_in     s [D]              gain and bias of norm2                              columns of W_gate, W_up (or W_fc1)
    down_in    s [F]              rows of W_up; of W_fc1 behind a ReLU                columns of W_down
    k          s [Hkv, E]         rows of Wk (gains of q_norm and k_norm)             rows of Wq, all heads of the group
    v, o_in    s [Hkv, E]         rows of Wv                                          columns of Wo, all heads of the group
    v, o_in    rotated per head   rows of Wv                                          columns of Wo

A norm between producer and consumer (BitNet's, before o and before down) takes the scale of o_in or down_in in its gain instead.
Not legal, because the function would change: other scales for the two channels that a rotation by position mixes; scales of k
that differ between heads, before a norm per head; v scaled or rotated in front of a norm; down_in scaled behind an activation f
with f(x / s) ≠ f(x) / s.
Source: SmoothQuant (arXiv:2211.10438) for scales in norms, QuaRot (arXiv:2404.00456) for rotated values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.models.norm import ReorderNorm
from core.quant.linear.base import FloatLinear
from kernels import hadamard


@dataclass(frozen=True)
class Basis:
    """A change of basis of one site [..., C]: y = ((x / scale) R)[order] - mean.

    Attributes:
        scale, mean: [C] float32, or None.
        block: channels of one run of R (`kernels.hadamard`), 0 for all; None for no rotation.
        order: [C] int64, new = old[order], or None.
    """

    scale: Tensor | None = None
    block: int | None = None
    mean: Tensor | None = None
    order: Tensor | None = None

    def to(self, x: Tensor) -> Tensor:
        """Compute y of x [..., C]."""
        y = x if self.scale is None else x / self.scale.to(x.device)
        y = y if self.block is None else hadamard(y, self.block)
        y = y if self.order is None else y[..., self.order.to(x.device)]
        return y if self.mean is None else y - self.mean.to(x.device)

    def back(self, y: Tensor) -> Tensor:
        """Compute x of y [..., C]."""
        x = y if self.mean is None else y + self.mean.to(y.device)
        x = x if self.order is None else x[..., self.order.argsort().to(y.device)]
        x = x if self.block is None else hadamard(x, self.block)
        return x if self.scale is None else x * self.scale.to(x.device)

    def weight(self, weight: Tensor) -> Tensor:
        """Compute the weight [N, C] that multiplies y + mean as `weight` multiplies x."""
        weight = weight if self.scale is None else weight * self.scale.to(weight.device)
        weight = weight if self.block is None else hadamard(weight, self.block)
        return weight if self.order is None else weight[:, self.order.to(weight.device)]

    def weight_back(self, weight: Tensor) -> Tensor:
        """Compute the weight [N, C] that `weight` makes this one of."""
        weight = weight if self.order is None else weight[:, self.order.argsort().to(weight.device)]
        weight = weight if self.block is None else hadamard(weight, self.block)
        return weight if self.scale is None else weight / self.scale.to(weight.device)


def scales_down_in(spec: BlockSpec) -> bool:
    """Say whether down_in may be scaled: in a norm's gain, in the factor beside the gate, or in front of a ReLU."""
    return spec.sub_norms or spec.gated or spec.activation == "relu"


def fold_scales(block: DecoderBlock, scales: Mapping[str, Tensor], *, rotate_values: bool = False) -> DecoderBlock:
    """Make a float block whose sites are divided by scales, and its values rotated inside heads.

    Args:
        block: float; not changed.
        scales: factors above 0 by site, shaped as in the table above, o_in [H E] with a norm before o; left out: 1.
        rotate_values: rotate v and o_in by a Hadamard matrix per head.
    Raises: ValueError for what is not legal, saying why.
    """
    spec = block.spec
    _require_legal(spec, scales, rotate_values)
    attention, mlp = block.attention, block.mlp
    ones = torch.ones(spec.kv_heads, spec.head_dim)
    key, value = scales.get("k", ones), scales.get("v", ones)
    rows = ones if spec.qk_norm else key
    qkv_rows = torch.cat([_query(rows, spec), 1 / rows.flatten(), 1 / value.flatten()])
    qkv = _scaled(attention.qkv, qkv_rows, scales.get("attn_in"))
    o = _scaled(attention.o, None, scales["o_in"] if "o_in" in scales else _query(value, spec))
    if rotate_values:
        first, dim = spec.width("q") + spec.width("k"), spec.head_dim
        weight, bias = qkv.weight.clone(), None if qkv.bias is None else qkv.bias.clone()
        weight[first:] = hadamard(weight[first:].t(), dim).t()
        if bias is not None:
            bias[first:] = hadamard(bias[first:], dim)
        qkv, o = FloatLinear(weight, bias), FloatLinear(hadamard(o.weight, dim), o.bias)
    down_scale, up_rows = scales.get("down_in"), None
    if down_scale is not None and not spec.sub_norms:
        up_rows = torch.cat([torch.ones(spec.ffn), 1 / down_scale]) if spec.gated else 1 / down_scale
    parts = {
        "norm1": _divided(block.norm1, scales.get("attn_in")),
        "norm2": _divided(block.norm2, scales.get("mlp_in")),
        "qkv": qkv,
        "o": o,
        "up": _scaled(mlp.up, up_rows, scales.get("mlp_in")),
        "down": _scaled(mlp.down, None, down_scale),
    }
    if spec.qk_norm and "k" in scales:
        query, own = (_query(key, spec), key.flatten()) if spec.wide_qk_norm else (key[0], key[0])
        parts |= {"q_norm": attention.q_norm * query.to(attention.q_norm), "k_norm": attention.k_norm / own.to(attention.k_norm)}
    if spec.sub_norms:
        parts["attn_sub_norm"] = _divided(attention.attn_sub_norm, scales.get("o_in"))
        parts["ffn_sub_norm"] = _divided(mlp.ffn_sub_norm, down_scale)
    return block.with_parts(**parts)


def _require_legal(spec: BlockSpec, scales: Mapping[str, Tensor], rotate_values: bool) -> None:
    """Refuse changes that would change the function. Raises: ValueError."""
    heads = (spec.kv_heads, spec.head_dim)
    shapes = {"k": heads, "v": heads} | {site: (spec.width(site),) for site in ("attn_in", "mlp_in", "down_in", "o_in")}
    for site, scale in scales.items():
        if site not in shapes or tuple(scale.shape) != shapes[site] or not bool((scale > 0).all() and scale.isfinite().all()):
            raise ValueError(f"the scale of {site} is not {shapes.get(site)} finite numbers above 0")
    key, half = scales.get("k"), spec.head_dim // 2
    if key is not None and spec.rope and not torch.equal(key[:, :half], key[:, half:]):
        raise ValueError("the rotation by position mixes channels e and e + E / 2: their scales must be equal")
    if key is not None and spec.qk_norm and not spec.wide_qk_norm and not torch.equal(key, key[:1].expand_as(key)):
        raise ValueError("all heads share the gain of the norm of keys: their scales must be equal")
    if spec.sub_norms and ("v" in scales or rotate_values):
        raise ValueError("a norm stands between v and o: values can be neither scaled nor rotated")
    if "o_in" in scales and not spec.sub_norms:
        raise ValueError("o_in is scaled with v: no norm stands before o")
    if "down_in" in scales and not scales_down_in(spec):
        raise ValueError(f"down_in stands behind {spec.activation}, which does not commute with a scale")


def _query(scale: Tensor, spec: BlockSpec) -> Tensor:
    """Repeat a scale [Hkv, E] for the query heads of each group: [H E]."""
    return scale.repeat_interleave(spec.groups, dim=0).flatten()


def _scaled(linear: FloatLinear, rows: Tensor | None, columns: Tensor | None) -> FloatLinear:
    """Multiply the rows (bias included) and the columns of a layer."""
    weight, bias = linear.weight.detach().to(torch.float32), linear.bias
    if rows is not None:
        rows = rows.to(weight)
        weight, bias = weight * rows[:, None], None if bias is None else bias.detach() * rows
    return FloatLinear(weight if columns is None else weight * columns.to(weight), bias)


def _divided(norm: ReorderNorm, scale: Tensor | None) -> ReorderNorm:
    """Divide what a norm puts out."""
    if scale is None:
        return norm
    factor = 1 / (scale if norm.weight is None else scale.to(norm.weight))
    bias = None if norm.bias is None else norm.bias * factor
    return ReorderNorm(norm.kind, factor if norm.weight is None else norm.weight * factor, bias, norm.eps)

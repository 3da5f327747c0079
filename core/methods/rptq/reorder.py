"""Apply the five reorderings to a block's norms and weights; the float function stays the same.

    R1  attn_in   norm1 stores order R1                    columns of Wq, Wk, Wv
    R2  q, k      the rotation stores order R2 per head    (no rotation: rows and biases of Wq, Wk)
    R3  v, o_in   rows and biases of Wv per kv head        columns of Wo, every query head in its kv head's order
    R4  mlp_in    norm2 stores order R4                    columns of W_gate, W_up (or W_fc1)
    R5  down_in   rows and biases of W_gate and W_up       columns of W_down

A norm between producer and consumer (BitNet's, before o and before down) only needs its gain in the same order: the mean square
it divides by does not depend on the order.

Rows of Wo and W_down are not permuted here: the residual stream keeps its order. One order of that stream for all layers, in
place of R1 and R4, is folded by `DecoderBlock.in_order` (`core.methods.rptq.shared`). With grouped-query attention a key/value
head and all its query heads share one order. Why other choices would change the function: docs/rptq.md, "Legality".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock


@dataclass(frozen=True)
class Orders:
    """new = old[order] for each reordering.

    Attributes:
        R1, R4: [D]; R5: [F], or [N, F] for N experts; R2, R3: [Hkv, E], orders inside a head. None leaves that order alone.
    """

    R1: Tensor | None = None
    R2: Tensor | None = None
    R3: Tensor | None = None
    R4: Tensor | None = None
    R5: Tensor | None = None


def reorder_block(block: DecoderBlock, orders: Orders) -> DecoderBlock:
    """Make a block with the orders applied; `block` (float) is not changed, tensors that keep their order are shared."""
    spec = block.spec
    mixed = None if orders.R3 is None else query_channels(orders.R3, spec.groups)
    attention, mlp = block.attention, block.mlp
    parts: dict[str, nn.Module | Tensor] = {
        "qkv": attention.qkv.permuted(rows=qkv_rows(spec, None if spec.rope else orders.R2, orders.R3), columns=orders.R1),
        "o": attention.o.permuted(columns=mixed),
    }
    for name, linear in block.linears().items():
        kind, _, expert = name.partition(".")
        hidden = orders.R5[int(expert)] if expert and orders.R5 is not None else orders.R5
        if kind == "up":
            rows = torch.cat([hidden, hidden + spec.ffn]) if spec.gated and hidden is not None else hidden
            parts[name] = linear.permuted(rows=rows, columns=orders.R4)
        elif kind == "down":
            parts[name] = linear.permuted(columns=hidden)
    if block.router is not None and orders.R4 is not None:
        parts["router"] = block.router[:, orders.R4]
    if orders.R1 is not None:
        parts["norm1"] = block.norm1.reordered(orders.R1)
    if orders.R4 is not None:
        parts["norm2"] = block.norm2.reordered(orders.R4)
    if orders.R2 is not None and spec.rope:
        parts["rope_order"] = orders.R2.to(torch.int32)
    if spec.sub_norms and orders.R3 is not None:
        parts["attn_sub_norm"] = attention.attn_sub_norm.permuted(mixed)
    if spec.sub_norms and orders.R5 is not None:
        parts["ffn_sub_norm"] = mlp.ffn_sub_norm.permuted(orders.R5)
    return block.with_parts(**parts)


def qkv_rows(spec: BlockSpec, r2: Tensor | None, r3: Tensor | None) -> Tensor | None:
    """Compute the row order of the fused [q; k; v] weight, or None."""
    if r2 is None and r3 is None:
        return None
    plain = torch.arange(spec.head_dim).expand(spec.kv_heads, -1)
    query = query_channels(plain if r2 is None else r2, spec.groups)
    key = head_channels(plain if r2 is None else r2)
    value = head_channels(plain if r3 is None else r3)
    return torch.cat([query, len(query) + key, len(query) + len(key) + value])


def head_channels(order: Tensor) -> Tensor:
    """Turn orders per head [Hkv, E] into one order over Hkv * E channels."""
    heads, dim = order.shape
    return (order + torch.arange(heads)[:, None] * dim).flatten()


def query_channels(order: Tensor, groups: int) -> Tensor:
    """Turn orders per head [Hkv, E] into one over H * E query channels: query head h uses that of kv head h // groups."""
    return head_channels(order.repeat_interleave(groups, dim=0))

"""What the tests of reordering share: random orders of a block's channels, and the bounds of unchanged and of visibly wrong."""

from __future__ import annotations

import torch

from core.methods.rptq.reorder import Orders
from core.models.adapter import BlockSpec
from tests.core.tools import ARCHITECTURES, tokens

LEGAL = 1e-5
"""Float32; measured: at most 2.1e-6."""
ILLEGAL = 0.05
IDS = tokens(2, 14, seed=11)
NAMES = ("R1", "R2", "R3", "R4", "R5")
ROTARY = tuple(a for a in ARCHITECTURES if a != "opt")


def random_orders(spec: BlockSpec, seed: int, names: tuple[str, ...] = NAMES) -> Orders:
    """Random orders of the named reorderings, the others left out."""
    g = torch.Generator().manual_seed(seed)
    heads = {n: torch.stack([torch.randperm(spec.head_dim, generator=g) for _ in range(spec.kv_heads)]) for n in ("R2", "R3")}
    wide = {n: torch.randperm(spec.hidden, generator=g) for n in ("R1", "R4")}
    experts = [torch.randperm(spec.ffn, generator=g) for _ in range(spec.experts or 1)]
    wide["R5"] = torch.stack(experts) if spec.experts else experts[0]
    return Orders(**{n: x for n, x in {**heads, **wide}.items() if n in names})

"""A mixture of experts in place of a layer's MLP: a router sends each token to k of N MLPs.

    p = softmax(router x)        y = Σ p_i / s · expert_i(x) over the k largest p_i        s: their sum, or 1, as the model says

The router reads the float output of the norm and stays in float. Experts read the same tensor, mlp_in; each has a hidden site of
its own, down_in.0, down_in.1, …, which sees only the tokens that were sent to it. Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core.bits import expert_site
from core.models.adapter import BlockSpec
from core.models.mlp import MLP
from core.models.slots import ROUTES, Slots
from core.quant.linear.base import LinearLayer
from core.quant.static import InputUse


class MoE(nn.Module):
    """Compute the mixture for tokens [B, T, D].

    Args:
        router: weight [N, D]; channels lie in the order of mlp_in. up, down: linear layers of each expert, as in `MLP`.
    Attributes:
        slots: what stands at the sites. ROUTES sees the experts of each token, [B, T, k] int64, and may choose others; the sites
            of an expert see its tokens [1, n, C], in the order of the text.
    """

    up = None
    """Several layers read mlp_in, and the router reads it in float: no kernel makes codes of it in the norm."""

    def __init__(self, spec: BlockSpec, router: Tensor, up: Sequence[LinearLayer], down: Sequence[LinearLayer]) -> None:
        super().__init__()
        self.spec, self.slots = spec, Slots(spec.sites)
        self.register_buffer("router", router)
        pairs = enumerate(zip(up, down, strict=True))
        self.experts = nn.ModuleList(MLP(spec, *pair, None, expert_site("down_in", i)) for i, pair in pairs)

    def forward(self, x: Tensor, use: InputUse) -> Tensor:
        """Compute [B, T, D] of normalised tokens x [B, T, D]."""
        x = x if use.owned else self.slots("mlp_in", x)
        rows, length = x.flatten(0, -2), x.shape[-2]
        shares = torch.softmax(nn.functional.linear(rows, self.router).float(), dim=-1)
        routes = shares.topk(self.spec.top_k, dim=-1).indices
        if not use.owned:
            routes = self.slots(ROUTES, routes.view(*x.shape[:-1], -1)).flatten(0, -2)
        shares = shares.gather(-1, routes)
        if self.spec.norm_top_k:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        shares, out = shares.to(x.dtype), torch.zeros_like(rows)
        for index in routes.unique().tolist():
            token, place = (routes == index).nonzero(as_tuple=True)
            first = token % length < use.float_tokens
            if use.float_tokens:  # those that stay in float come first, as quantisers expect
                order = (~first).long().argsort(stable=True)
                token, place = token[order], place[order]
            own = InputUse(int(first.sum()) if use.float_tokens else 0, use.owned)
            made = self.experts[index].inner(rows[token][None], own)[0]
            out = out.index_add(0, token, made * shares[token, place, None])
        return out.view(x.shape)

"""The feed-forward half of a decoder block: down(activation(gate) * up), or down(activation(up)).

With ternary weights and an activation that is exactly zero for negative gates, only the rows of up and the columns of down whose
gate is not zero are read: the result is the same. Shapes: B batch, T tokens, D hidden, F feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from core.models.adapter import BlockSpec
from core.models.norm import ReorderNorm
from core.models.slots import Slots
from core.quant.linear.base import LinearLayer
from core.quant.linear.ternary import TernaryLinear
from core.quant.static import InputUse
from kernels import Backend, Codes
from kernels.ternary import ROW_DENSITY

ZERO_GATES = ("relu", "relu2")
"""Activations that are exactly zero for negative gates: there the up projection need not be computed."""
GATE_FIRST_WEIGHTS = 2**22
"""Smallest up projection for which "auto" looks at the gate first: below, the look costs more than it can save."""


class MLP(nn.Module):
    """Compute the feed-forward layer of tokens [B, T, D].

    Args:
        up: mlp_in to [gate; up] (N = 2 F), or to up alone without a gate. down: down_in to D.
        ffn_sub_norm: BitNet's norm before down, None elsewhere. site: name of what down reads; an expert has its own.
    Attributes:
        slots: what stands at the sites mlp_in and down_in.
        gate_first: "auto", "always" or "never": whether up is computed only where the gate is not zero; the result is the same.
    """

    def __init__(
        self, spec: BlockSpec, up: LinearLayer, down: LinearLayer, ffn_sub_norm: ReorderNorm | None, site: str = "down_in"
    ) -> None:
        super().__init__()
        self.spec, self.slots, self.activation, self.site = spec, Slots(), ACT2FN[spec.activation], site
        self.ffn_sub_norm, self.up, self.down = ffn_sub_norm, up, down
        self.gate_first = "auto"

    def forward(self, x: Tensor | Codes, use: InputUse) -> Tensor:
        """Compute [B, T, D] of normalised tokens x [B, T, D]."""
        return self.inner(x if use.owned else self.slots("mlp_in", x), use)

    def inner(self, x: Tensor | Codes, use: InputUse) -> Tensor:
        """Compute `forward` of what leaves the site mlp_in."""
        gate_first = self._looks_at_gate(x, use)
        hidden = self._gated_rows(x) if gate_first else self._hidden(x, use)
        if self.ffn_sub_norm is not None:
            _, hidden = self.ffn_sub_norm.before(self.down, hidden, use)
        if not use.owned:
            hidden = self.slots(self.site, hidden)
        elif gate_first and self.down.skips_zeros:
            return self.down.sparse_product(hidden)
        return self.down(hidden, use)

    def _hidden(self, x: Tensor | Codes, use: InputUse) -> Tensor:
        """Compute down_in [B, T, F] before its norm."""
        if not self.spec.gated:
            return self.activation(self.up(x, use))
        parts = self.up.parts(x, (self.spec.ffn, self.spec.ffn), use)
        gate = self.activation(next(parts))  # before up is computed
        return gate * next(parts) if gate.requires_grad else gate.mul_(next(parts))

    def _looks_at_gate(self, x: Tensor | Codes, use: InputUse) -> bool:
        possible = self.spec.gated and self.spec.activation in ZERO_GATES and not use.float_tokens
        if self.gate_first == "never" or not possible or not isinstance(self.up, TernaryLinear) or self.up.kind == "fp":
            return False
        one_large = x.shape[:-1].numel() == 1 and self.spec.ffn * self.spec.hidden >= GATE_FIRST_WEIGHTS
        return self.gate_first == "always" or one_large

    def _gated_rows(self, x: Tensor | Codes) -> Tensor:
        """Compute what `_hidden` computes from the rows of up whose gate is not zero."""
        codes, ffn = x if isinstance(x, Codes) else self.up.quantize(x), self.spec.ffn
        gate = self.activation(self.up.product(codes, slice(0, ffn)))
        if self.up.bias is None and self.up.choice.backend is Backend.TRITON:  # the host does not look
            return self.up.gated_product(codes, gate, slice(ffn, 2 * ffn)).view(*x.shape[:-1], ffn)
        live = gate.any(dim=0).nonzero().flatten()
        if self.gate_first == "auto" and len(live) > ROW_DENSITY * ffn:
            out = gate.mul_(self.up.product(codes, slice(ffn, 2 * ffn)))
        else:
            out = torch.zeros_like(gate)
            out[:, live] = gate[:, live] * self.up.product(codes, ffn + live)
        return out.view(*x.shape[:-1], ffn)

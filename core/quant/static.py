"""Quantise the activations of one site with static scales: one scale and zero point per cluster."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.quant.affine import QParams
from core.quant.segments import expand
from kernels import code_limits, fake_quantize, quantize


class InputUse(NamedTuple):
    """How a layer or a quantiser may use its input x [..., T, C].

    Attributes:
        float_tokens: the first tokens of every sequence, which are not quantised.
        owned: nobody else reads x: it may be overwritten, or come as codes that a kernel makes in its place.
    """

    float_tokens: int = 0
    owned: bool = False


PLAIN = InputUse()
"""Every token is quantised, and x is left as it is."""


class ActivationQuantizer(nn.Module):
    """A quantiser of [..., C] activations whose channels are in cluster order.

    Saved buffers: scale [G] float32, zero_point [G] int32, offsets [G + 1] int32. Derived and not saved, one value per channel:
    channel_scale, channel_zero, and lower and upper, the code limits minus the zero point, all [C] float32.

    Args:
        bits: 2 to 8.
        params: scale and zero point per cluster, [G].
        offsets: [G + 1] int64, 0 … C.
    Raises: ValueError if they do not fit each other.
    """

    def __init__(self, bits: int, params: QParams, offsets: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.qmin, self.qmax = code_limits(bits)
        # copies: every expert of a mixture has a quantiser of one plan, and tensors that share memory cannot be saved
        self.register_buffer("scale", params.scale.to(torch.float32, copy=True).contiguous())
        self.register_buffer("zero_point", params.zero_point.to(torch.int32, copy=True).contiguous())
        self.register_buffer("offsets", offsets.to(torch.int32, copy=True).contiguous())
        if self.offsets[0] != 0 or bool((self.offsets.diff() < 1).any()) or len(self.scale) != len(self.offsets) - 1:
            raise ValueError("cluster offsets do not fit the scales")
        if not 2 <= bits <= 8 or not bool((self.scale > 0).all()):
            raise ValueError(f"a quantiser of {bits} bits needs 2 to 8 bits and positive scales")
        offsets, zero = self.offsets.to(torch.int64), params.zero_point.to(torch.float32)
        self.register_buffer("channel_scale", expand(self.scale, offsets), persistent=False)
        self.register_buffer("lower", expand(self.qmin - zero, offsets), persistent=False)
        self.register_buffer("upper", expand(self.qmax - zero, offsets), persistent=False)
        self.register_buffer("channel_zero", expand(zero, offsets), persistent=False)

    @property
    def width(self) -> int:
        """Number of channels, C."""
        return self.channel_scale.numel()

    def fake(self, x: Tensor, use: InputUse = PLAIN) -> Tensor:
        """Compute x̂ for x [..., T, C]; with `use.owned` x is overwritten by x̂."""
        return self._fake(x, (-1,), use)

    def fake_heads(self, x: Tensor, use: InputUse = PLAIN) -> Tensor:
        """Compute x̂ for heads x [B, H, T, E], C = H * E."""
        return self._fake(x, (x.shape[1], 1, x.shape[3]), use)

    def _fake(self, x: Tensor, shape: tuple[int, ...], use: InputUse) -> Tensor:
        kept = x[..., : use.float_tokens, :].clone() if use.float_tokens else None
        grid = (t.view(shape) for t in (self.channel_scale, self.lower, self.upper))
        out = fake_quantize(x, *grid, inplace=use.owned)
        if kept is not None:
            out[..., : use.float_tokens, :] = kept
        return out

    def head_grid(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point [H, E] float32 of channels that are H heads, for unsigned codes 0 … 2**bits - 1."""
        return self.channel_scale.view(heads, -1), self.lower.neg().view(heads, -1)

    def codes(self, x: Tensor) -> Tensor:
        """Compute the codes of x [..., C]: int8."""
        return quantize(x, self.channel_scale, self.channel_zero, self.qmin, self.qmax)

    def common_step(self) -> tuple[Tensor, Tensor] | None:
        """Find one step for all clusters: there is one where every scale is the largest divided by 2**e, 0 <= e <= 8 - bits.

        Returns: (step, 0-dim float32; factor [C] int8): codes * factor are int8 codes in units of `step`. None if there is none.
        """
        spare = 8 - self.bits
        mantissa, exponent = torch.frexp(self.scale.max() / self.scale)
        exponent = exponent - 1  # frexp writes 2**e as 0.5 * 2**(e + 1)
        if bool((mantissa != 0.5).any() or (exponent > spare).any()):
            return None
        factor = (2.0 ** (spare - exponent)).to(torch.int8)  # at most 2**6: bits >= 2
        return self.scale.max() * 2.0**-spare, expand(factor, self.offsets.to(torch.int64))

"""What distillation trains of a quantised block, and the blocks made of it: for gradients, and packed.

    packed weight      Ŵ = s̃ (clamp(round(w / s̃), qmin - z̃, qmax - z̃))      s̃ = float16(s eᵃ)      z̃ = round(z + b)
    static ranges      of a site: scale s eᵃ, zero point round(z + b)
    ranges by token    of a site: clip ratio min(1, c eᵃ)
    norms              gain γ eᵃ, and the bias itself
    float weights and biases of linear layers: themselves

Trained are w [N, K], which begins as Ŵ, a and b, which begin at 0, and what is said to be itself: before the first step both
blocks compute what the quantised one does. Rounding is straight-through, so a and b get the gradients of learned step sizes
(LSQ+, arXiv:2004.09576). Whatever a step makes of them, the packed block has the numbers that the other one computed with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.checks import FLOAT_BITS
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.models.norm import ReorderNorm
from core.quant.affine import QParams, stored_scale
from core.quant.linear.quant import QuantizedWeight, QuantLinear
from core.quant.rotated import TokenQuantizer
from core.quant.segments import expand
from core.quant.static import ActivationQuantizer
from kernels import code_limits, code_offset, fake_quantize, quantize, straight_through

Quantizer = ActivationQuantizer | TokenQuantizer | None
SITES = ("q", "k", "v")
"""Sites whose quantisers belong to the attention."""
NORMS = ("norm1", "norm2", "attn_sub_norm", "ffn_sub_norm")
GAINS = ("q_norm", "k_norm")


class TrainedBlock:
    """A quantised block with its trained tensors.

    Args: block: with `QuantLinear` layers; not changed.
    Attributes:
        own: the trained tensors by name, such as "qkv.weight", "qkv.scale" or "norm1.gain".
        relative: names of those that are factors eᵃ or shifts b, around 0: one step size fits all of them.
    """

    def __init__(self, block: DecoderBlock) -> None:
        self.block, self.own, self.relative = block, {}, set()
        for name, layer in block.linears().items():
            self._train(f"{name}.weight", layer.dequantized_weight())
            self._train(f"{name}.bias", layer.bias)
            if layer.bits < FLOAT_BITS:
                self._vary(f"{name}.scale", layer.weight_scale)
                self._vary(f"{name}.zero", layer.weight_zero)
            shared = isinstance(layer.quantizer, ActivationQuantizer) and not torch.equal(layer.quantizer.offsets, layer.offsets)
            if not shared or len(layer.offsets) > 2:  # with a common step, the scales are tied to each other
                self._vary_quantizer(f"{name}.input", layer.quantizer)
        for site in SITES:
            quantizer = getattr(block.attention, f"{site}_quantizer")
            if site == "q" or isinstance(quantizer, ActivationQuantizer):  # keys and values by token have no clip ratio
                self._vary_quantizer(site, quantizer)
        parts = block.parts()
        for name in NORMS:
            if parts[name] is not None:
                self._vary(f"{name}.gain", parts[name].weight)
                self._train(f"{name}.bias", parts[name].bias)
        for name in GAINS:
            self._vary(name, parts[name])

    def _train(self, name: str, start: Tensor | None) -> None:
        if start is not None:
            self.own[name] = nn.Parameter(start.detach().to(torch.float32).clone())

    def _vary(self, name: str, like: Tensor | None) -> None:
        if like is not None:
            self.own[name] = nn.Parameter(torch.zeros(like.shape, device=like.device))
            self.relative.add(name)

    def _vary_quantizer(self, name: str, quantizer: Quantizer) -> None:
        if isinstance(quantizer, ActivationQuantizer):
            self._vary(f"{name}.scale", quantizer.scale)
            self._vary(f"{name}.zero", quantizer.scale)
        elif quantizer is not None and quantizer.bits < FLOAT_BITS and quantizer.limits is None:
            self._vary(f"{name}.clip", torch.zeros(()))

    def __call__(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Compute the block of x [B, T, D], which needs a gradient itself; gradients reach `own`."""
        return self._made(packed=False)(x, rotary)

    @torch.no_grad()
    def packed(self) -> DecoderBlock:
        """Make the block with packed weights that computes the same; it shares what is not trained."""
        return self._made(packed=True)

    def _made(self, *, packed: bool) -> DecoderBlock:
        block, before = self.block, self.block.attention
        parts = block.parts()
        norms = {name: self._norm(name, parts[name], packed) for name in NORMS if parts[name] is not None}
        gains = {name: self._varied(name, parts[name]) for name in GAINS if parts[name] is not None}
        linears = {name: self._linear(name, layer, packed) for name, layer in block.linears().items()}
        order = None if before.rope_order is None else before.rope_order.clone()  # made in inference mode, perhaps
        made = block.with_parts(**norms, **gains, **linears, rope_order=order)
        attention = made.attention
        attention.softmax_bits, attention.sink_tokens = before.softmax_bits, before.sink_tokens
        attention.rotates_heads, attention.key_mean = before.rotates_heads, before.key_mean
        for site in SITES:
            setattr(attention, f"{site}_quantizer", self._quantizer(site, getattr(before, f"{site}_quantizer"), packed))
        return made

    def _varied(self, name: str, start: Tensor | None) -> Tensor | None:
        """Compute start eᵃ, or start where it is not trained."""
        return start.to(torch.float32).clone() * self.own[name].exp() if name in self.own else start

    def _shifted(self, name: str, zero: Tensor) -> Tensor:
        """Compute round(z + b) within the type that zero points are stored in: float32."""
        if name not in self.own:
            return zero.to(torch.float32)
        info = torch.iinfo(zero.dtype)
        moved = zero.to(torch.float32) + self.own[name]
        return straight_through(moved, moved.detach().round().clamp(info.min, info.max))

    def _own(self, name: str, packed: bool) -> Tensor | None:
        """Return a trained tensor, or a copy that later steps do not change; None where the block has none of this name."""
        found = self.own.get(name)
        return found.detach().clone() if packed and found is not None else found

    def _norm(self, name: str, norm: ReorderNorm, packed: bool) -> ReorderNorm:
        gain, bias = self._varied(f"{name}.gain", norm.weight), self._own(f"{name}.bias", packed)
        made = ReorderNorm(norm.kind, gain, bias, norm.eps)
        made.order = None if norm.order is None else norm.order.clone()
        return made

    def _linear(self, name: str, layer: QuantLinear, packed: bool) -> QuantLinear:
        low_bit = layer.bits < FLOAT_BITS
        weight = self._weight(name, layer, packed) if low_bit else self._own(f"{name}.weight", packed)
        quantizer = self._quantizer(f"{name}.input", layer.quantizer, packed)
        return QuantLinear.from_weight(weight, self._own(f"{name}.bias", packed), quantizer, offsets=layer.offsets)

    def _weight(self, name: str, layer: QuantLinear, packed: bool) -> QuantizedWeight | Tensor:
        scale = self._varied(f"{name}.scale", layer.weight_scale)
        scale = straight_through(scale, stored_scale(scale.detach(), layer.weight_scale.dtype))
        zero, offsets = self._shifted(f"{name}.zero", layer.weight_zero), layer.offsets.to(torch.int64)
        (qmin, qmax), latent = code_limits(layer.bits), self.own[f"{name}.weight"]
        if not packed:
            return fake_quantize(latent, *(expand(t, offsets) for t in (scale, qmin - zero, qmax - zero)))
        codes = quantize(latent, expand(scale, offsets), expand(zero, offsets), qmin, qmax)
        codes = (codes.to(torch.int16) + code_offset(layer.bits)).to(torch.uint8)
        stored = scale.to(layer.weight_scale.dtype), zero.to(layer.weight_zero.dtype)
        return QuantizedWeight(codes, *stored, offsets, layer.bits)

    def _quantizer(self, name: str, quantizer: Quantizer, packed: bool) -> Quantizer:
        if isinstance(quantizer, ActivationQuantizer):
            scale = self._varied(f"{name}.scale", quantizer.scale)
            params = QParams(scale, self._shifted(f"{name}.zero", quantizer.zero_point))
            return ActivationQuantizer(quantizer.bits, params, quantizer.offsets.to(torch.int64))
        if quantizer is None or f"{name}.clip" not in self.own:
            return quantizer
        clip = (quantizer.clip * self.own[f"{name}.clip"].exp()).clamp(max=1.0)
        return TokenQuantizer(quantizer.bits, quantizer.block, float(clip) if packed else clip)

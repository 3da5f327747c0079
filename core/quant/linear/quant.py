"""Linear layer of a quantised model: packed weights, and a static or dynamic quantiser of its input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.pace import int8_columns
from core.quant.linear.base import LinearLayer
from core.quant.rotated import TokenQuantizer
from core.quant.segments import expand
from core.quant.static import PLAIN, ActivationQuantizer, InputUse
from kernels import (
    Backend,
    Choice,
    Codes,
    code_limits,
    code_offset,
    dequantize,
    pack,
    packed_width,
    select_linear_backend,
    unpack,
)
from kernels.codes import signed_codes
from kernels.linear import LinearOperands, ReferenceOperands, int4
from kernels.linear.choose import kernels_take_codes
from kernels.linear.int8 import Int8Operands, float_rows
from kernels.linear.operands import output_parts

if TYPE_CHECKING:
    from kernels.norm_quant import Norm


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight matrix, columns grouped by contiguous input clusters.

    Attributes:
        codes: [N, K] uint8, 0 … 2**bits - 1.
        scale: [N, G] float16 or float32.
        zero_point: [N, G] int8, int16 or int32, of signed codes; Ŵ = scale * (codes - code_offset(bits) - zero_point).
        offsets: [G + 1] int64.
        bits: 2 to 8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    offsets: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """Compute Ŵ [N, K] float32."""
        scale = expand(self.scale.to(torch.float32), self.offsets)
        zero = expand(self.zero_point.to(torch.float32), self.offsets) + code_offset(self.bits)
        return dequantize(self.codes, scale, zero)

    def shifted_codes(self) -> Tensor | None:
        """Compute Ŵ / scale [N, K] int8, or None where it takes more than 7 bits (8 are not exact on every processor)."""
        zero = self.zero_point.to(torch.int32) + code_offset(self.bits)
        low, high = code_limits(7)
        if bool((-zero < low).any() or (2**self.bits - 1 - zero > high).any()):
            return None
        return (self.codes.to(torch.int16) - expand(zero.to(torch.int16), self.offsets)).to(torch.int8)


class QuantLinear(LinearLayer):
    """A linear layer y = x̂ Ŵᵀ + b with Ŵ packed at 2 to 8 bits (or float) and x̂ quantised per input cluster (or float).

    Weight and input share their clusters; or the weight has one scale per row, and the input's scales are the largest one
    divided by powers of two (`ActivationQuantizer.common_step`), so that integers need one accumulator. Where a weight has other
    groups than that, the rounded input is multiplied in floating point. With a `TokenQuantizer`
    the input has no clusters: it is rotated, and y[m] = s[m] (Σ q[m] Ŵᵀ - z[m] Σ Ŵᵀ) + b with the token's scale and zero point.

    Saved buffers: `packed` [N, packed_width(K, bits)] uint8, `weight_scale`, `weight_zero` [N, G], `offsets` [G + 1]
    int32, `bias` [N]; with 16-bit weights `weight` [N, K] replaces the first three. Working copies, by name in `copies`:

        product      the operands of the chosen backend (INT4: REFERENCE's, for more rows than INT4 takes)
        few rows     INT4's operands
        float rows   INT8's operands without the input's scales, for tokens that keep a float input
        step         INT8 and TRITON with codes: the input's scales, and factors of its codes where clusters share a step
        row sums     INT8 with a `TokenQuantizer`: Σ Ŵ over the columns, [N]

    Args:
        tensors: the saved buffers by name, without `bias`.
        bits: 2 to 8, or 16 with a float weight.
        in_features: K.
    Raises: ValueError if shapes do not fit each other.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        *,
        bits: int,
        in_features: int,
        bias: Tensor | None,
        quantizer: ActivationQuantizer | TokenQuantizer | None,
    ) -> None:
        rows = tensors["weight" if bits >= 16 else "packed"].shape[0]
        super().__init__(in_features, rows, bits=bits, quantizer=quantizer)
        self._check(tensors, quantizer)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("bias", bias)
        self._segments = tuple(self.offsets.tolist())
        self.set_backend(Backend.AUTO)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight | Tensor,
        bias: Tensor | None,
        quantizer: ActivationQuantizer | TokenQuantizer | None,
        *,
        offsets: Tensor | None = None,
    ) -> QuantLinear:
        """Pack a quantised weight, or keep a float one [N, K] with the clusters `offsets` [G + 1] of its input."""
        if isinstance(weight, QuantizedWeight):
            tensors = {
                "packed": pack(weight.codes, weight.bits),
                "weight_scale": weight.scale,
                "weight_zero": weight.zero_point,
                "offsets": weight.offsets.to(torch.int32),
            }
            return cls(tensors, bits=weight.bits, in_features=weight.codes.shape[1], bias=bias, quantizer=quantizer)
        offsets = torch.tensor([0, weight.shape[1]]) if offsets is None else offsets
        tensors = {"weight": weight, "offsets": offsets.to(torch.int32)}
        return cls(tensors, bits=16, in_features=weight.shape[1], bias=bias, quantizer=quantizer)

    def _check(self, tensors: dict[str, Tensor], quantizer: ActivationQuantizer | TokenQuantizer | None) -> None:
        offsets, rows = tensors["offsets"].tolist(), self.out_features
        if offsets[0] != 0 or offsets[-1] != self.in_features or any(a >= b for a, b in zip(offsets, offsets[1:], strict=False)):
            raise ValueError(f"cluster offsets do not cover 0 … {self.in_features}")
        if self.bits >= 16:
            fits = tensors["weight"].shape == (rows, self.in_features)
        else:
            fits = tensors["packed"].shape == (rows, packed_width(self.in_features, self.bits)) and tensors[
                "weight_scale"
            ].shape == tensors["weight_zero"].shape == (rows, len(offsets) - 1)
        if not fits:
            raise ValueError(f"the tensors of a {self.bits}-bit layer of {self.in_features} inputs do not fit each other")
        if isinstance(quantizer, ActivationQuantizer) and quantizer.width != self.in_features:
            raise ValueError(f"the input's quantiser has {quantizer.width} channels, and the layer {self.in_features} inputs")
        self._apart = isinstance(quantizer, ActivationQuantizer) and quantizer.offsets.tolist() != offsets
        self._apart = self._apart and (len(offsets) > 2 or quantizer.common_step() is None)

    def choose(self, backend: Backend) -> Choice:
        """Choose the backend as `LinearLayer.choose` and `kernels.select_linear_backend` say."""
        if self._apart and backend is Backend.AUTO and self.offsets.device.type == "cpu":
            return Choice(Backend.REFERENCE, "its groups are not the clusters of the input, which is rounded in float")
        return select_linear_backend(
            backend,
            weight_bits=self.bits,
            activation_bits=self._activation_bits,
            offsets=self._segments,
            rows=self.out_features,
            device=self.offsets.device,
            least_columns=int8_columns,
        )

    @property
    def _activation_bits(self) -> int:
        # no kernel takes such codes
        floats = self.quantizer is None or self._apart or (self._by_token and self.offsets.device.type != "cpu")
        return 16 if floats else self.quantizer.bits

    @property
    def _by_token(self) -> bool:
        return isinstance(self.quantizer, TokenQuantizer)

    @property
    def takes_codes(self) -> bool:
        """Whether the chosen backend multiplies integer codes of the input."""
        if self.choice.backend is Backend.TRITON:
            return not self._by_token and kernels_take_codes(self.bits, self._activation_bits, self._segments)
        return self.choice.backend is Backend.INT8

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the saved tensors of the weight, as `LinearLayer.stored_tensors` says."""
        return (self.weight,) if self.bits >= 16 else (self.packed, self.weight_scale, self.weight_zero)

    @property
    def decode_bytes(self) -> int:
        """Bytes of the weight that the product of one token reads: those of the working copy where it uses one."""
        few = self.choice.backend is Backend.INT4  # one token does not use the float copy for more rows
        copy = self.copies.nbytes(self, "few rows" if few else "product")
        if not copy:
            return self.stored_bytes
        return copy + self.packed.nbytes if self.choice.backend is Backend.TRITON else copy  # TRITON reads the stored weight

    def dequantized_weight(self) -> Tensor:
        """Return Ŵ [N, K] float32, columns in cluster order."""
        return self.weight.to(torch.float32) if self.bits >= 16 else self.quantized_weight().dequantize()

    def norm_codes(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Codes] | None:
        """Add, normalise and quantise in one kernel: see `LinearLayer.norm_codes`."""
        if not self.takes_codes:
            return None
        from kernels import norm_quantize

        q = self.quantizer
        return norm_quantize(x, norm, q.channel_scale, q.channel_zero, bits=q.bits, residual=residual)

    def parts(self, x: Tensor | Codes, sizes: tuple[int, ...] | None, use: InputUse = PLAIN) -> Iterator[Tensor]:
        """Compute `LinearLayer.parts`; INT8 and REFERENCE compute a part when the iterator reaches it."""
        if self._by_token:
            x = self.quantizer.rotate(x) if self.takes_codes else self.quantizer.fake(x, use)
        elif self._apart:
            x = self.quantizer.fake(x, use)
        if self.choice.backend is Backend.INT4 and x.numel() <= int4.MAX_ROWS * self.in_features:
            return self.copies.get("few rows", self._int4_operands).parts(x, sizes)
        operands = self.copies.get("product", self._operands)
        if not operands.takes_codes:
            x = x if self.quantizer is None or self._by_token or self._apart else self.quantizer.fake(x, use)
            return operands.parts(x, sizes)
        if self._by_token:
            found = self._token_parts(x, operands, sizes)
            return self._with_float_tokens(found, x, sizes, use.float_tokens) if use.float_tokens else found
        codes = self._input_codes(x).reshape(-1, self.in_features)
        found = (y.view(*x.shape[:-1], y.shape[-1]) for y in operands.parts(codes, sizes))
        return self._with_float_tokens(found, x, sizes, use.float_tokens) if use.float_tokens else found

    def _token_parts(self, x: Tensor, operands: Int8Operands, sizes: tuple[int, ...] | None) -> Iterator[Tensor]:
        """Compute the parts for a rotated x [..., K] whose tokens have scales and zero points of their own."""
        codes, grid = self.quantizer.codes(x.reshape(-1, self.in_features))
        sums = self.copies.get("row sums", lambda: self.dequantized_weight().sum(1))
        for y, outputs in zip(operands.parts(codes, sizes), output_parts(sizes), strict=True):
            y.sub_(grid.zero_point * sums[outputs]).mul_(grid.scale)
            y = y if self.bias is None else y.add_(self.bias[outputs])
            yield y.view(*x.shape[:-1], y.shape[-1])

    def _with_float_tokens(
        self, found: Iterator[Tensor], x: Tensor, sizes: tuple[int, ...] | None, count: int
    ) -> Iterator[Tensor]:
        exact = self._float_product(x[..., :count, :])
        for y, outputs in zip(found, output_parts(sizes), strict=True):
            y[..., :count, :] = exact[..., outputs]
            yield y

    def _input_codes(self, x: Tensor | Codes) -> Tensor:
        _, factor = self.copies.get("step", self._input_step)
        if isinstance(x, Codes):
            return x.codes if factor is None else x.codes * factor
        codes = self.quantizer.codes(x)
        return codes if factor is None else codes.mul_(factor)

    def _input_step(self) -> tuple[Tensor, Tensor | None]:
        """Return the input's scales per cluster of the weight, [G] or 0-dim, and the factors [K] int8 of its codes or None."""
        if len(self.quantizer.scale) == len(self._segments) - 1:
            return self.quantizer.scale, None
        return self.quantizer.common_step()

    def _float_product(self, x: Tensor) -> Tensor:
        """Apply the layer to a few float rows x [..., K], where its operands are for integers."""
        if self.choice.backend is not Backend.INT8:
            return nn.functional.linear(x, self.dequantized_weight(), self.bias)
        operands = self.copies.get("float rows", self._float_row_operands)
        y = float_rows(x.reshape(-1, self.in_features), operands).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)

    def quantized_weight(self) -> QuantizedWeight:
        """Unpack the codes of a weight below 16 bits, columns in cluster order."""
        codes = unpack(self.packed, self.bits, self.in_features)
        return QuantizedWeight(codes, self.weight_scale, self.weight_zero, self.offsets.to(torch.int64), self.bits)

    def _operands(self) -> LinearOperands:
        if self.choice.backend in (Backend.REFERENCE, Backend.INT4):
            return ReferenceOperands(self.dequantized_weight(), self.bias)
        return self._triton_operands() if self.choice.backend is Backend.TRITON else self._int8_operands()

    def _int4_operands(self) -> int4.Int4Operands:
        codes = unpack(self.packed, self.bits, self.in_features)
        return int4.Int4Operands.prepare(
            codes, self.weight_scale, self.weight_zero, self.bias, bits=self.bits, offsets=self._segments
        )

    def _int8_operands(self) -> Int8Operands:
        weight = self.quantized_weight()
        output_scale, zero_rows, bias = self._weight_scales() if self._by_token else self._folded(weight)
        codes = weight.shifted_codes()
        if codes is None:  # zero points do not fit the codes: they stay separate
            return Int8Operands(signed_codes(weight.codes, self.bits), output_scale, zero_rows, bias, self._segments)
        return Int8Operands(codes, output_scale, None, bias, self._segments)

    def _float_row_operands(self) -> Int8Operands:
        product: Int8Operands = self.copies.get("product", self._operands)
        scale, zero, _ = self._weight_scales()
        return replace(product, output_scale=scale, zero_rows=None if product.zero_rows is None else zero, bias=None)

    def _weight_scales(self) -> tuple[Tensor, Tensor, None]:
        """Return what `_folded` does for an input whose scales are applied to the product: sw [G, N], sw zw [G, N], no bias."""
        scale = self.weight_scale.to(torch.float32).t().contiguous()
        return scale, scale * self.weight_zero.to(torch.float32).t(), None

    def _triton_operands(self) -> LinearOperands:
        from kernels.linear.cluster import ClusterOperands
        from kernels.linear.weight_only import WeightOnlyOperands

        backend = Backend.TRITON if self.requested is Backend.TRITON else Backend.AUTO
        if self.takes_codes:
            return ClusterOperands(self.packed, *self._folded(self.quantized_weight()), self._segments, backend)
        scales = self.weight_scale, self.weight_zero
        return WeightOnlyOperands(self.packed, *scales, self.bias, self.bits, self._segments, backend)

    def _folded(self, weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
        """Combine the input's scales and zero points with the weight's: sx sw [G, N], sx sw zw [G, N] and b' [N], all float32."""
        step, _ = self.copies.get("step", self._input_step)
        output_scale = (step * weight.scale.to(torch.float32)).t().contiguous()
        zero_rows = output_scale * weight.zero_point.to(torch.float32).t()
        shift = weight.dequantize() * (self.quantizer.channel_scale * self.quantizer.channel_zero)  # [N, K]: Ŵ sx zx
        bias = -shift.sum(dim=1, dtype=torch.float64).to(torch.float32)
        return output_scale, zero_rows, bias if self.bias is None else bias + self.bias

    def extra_repr(self) -> str:
        """Describe shape, bits and backend for the model's repr."""
        clusters = len(self._segments) - 1
        return f"{self.in_features} → {self.out_features}, {self.bits} bits, {clusters} clusters, {self.choice.backend}"

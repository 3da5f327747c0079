"""Linear layer with packed weights and a static quantiser on its input: the layer a quantised model is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from core.errors import BackendError
from core.quant.segments import expand
from core.quant.static import ActivationQuantizer, Codes, KeepFloat, keep_float_rows
from kernels import Backend, Choice, dequantize, int4_rows, pack, packed_width, select_linear_backend, unpack
from kernels.int_linear import LinearOperands, float_rows, int_linear_parts, kernels_take_codes, output_parts


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight matrix, columns grouped by contiguous input clusters.

    Attributes:
        codes: [N, K] uint8, 0 … 2**bits - 1.
        scale: [N, G] float16 or float32.
        zero_point: [N, G] int8, int16 or int32; Ŵ = scale * (codes - 2**(bits-1) - zero_point).
        offsets: [G + 1] int64.
        bits: 2 to 8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    offsets: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """Ŵ [N, K] float32."""
        scale = expand(self.scale.to(torch.float32), self.offsets)
        zero = expand(self.zero_point.to(torch.float32), self.offsets) + 2 ** (self.bits - 1)
        return dequantize(self.codes, scale, zero)

    def shifted_codes(self) -> Tensor | None:
        """Ŵ / scale [N, K] int8, or None where it takes more than 7 bits (8 are not exact on every processor)."""
        zero = self.zero_point.to(torch.int32) + 2 ** (self.bits - 1)
        if bool((zero > 64).any() or (zero < 2**self.bits - 64).any()):
            return None
        return (self.codes.to(torch.int16) - expand(zero.to(torch.int16), self.offsets)).to(torch.int8)


class QuantLinear(nn.Module):
    """y = x̂ Ŵᵀ + b with Ŵ packed at 2 to 8 bits (or float) and x̂ quantised per input cluster (or float).

    Weight and input share their clusters; or the weight has one scale per row, and the scales of the input's clusters are its
    largest one divided by powers of two (`ActivationQuantizer.common_step`), so that integers need one accumulator.

    Saved buffers: `packed` [N, packed_width(K, bits)] uint8, `weight_scale`, `weight_zero` [N, G], `offsets` [G + 1]
    int32, `bias` [N]; with 16-bit weights `weight` [N, K] replaces the first three. The working copy that a backend
    multiplies with (`LinearOperands`) is built on first use, is not part of the model, and `release` drops it.

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
        quantizer: ActivationQuantizer | None,
    ) -> None:
        super().__init__()
        self.bits, self.in_features = bits, in_features
        self.out_features = tensors["weight" if bits >= 16 else "packed"].shape[0]
        self._check(tensors, quantizer)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("bias", bias)
        self.quantizer = quantizer
        self._operands: LinearOperands | None = None
        self._few_rows: LinearOperands | None = None  # INT4's, for its few rows
        self._keep_float_rows: LinearOperands | None = None  # INT8's, for float rows
        self._code_factor: Tensor | None = None  # INT8's with a common step for all clusters
        self.set_backend(Backend.AUTO)

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight | Tensor,
        bias: Tensor | None,
        quantizer: ActivationQuantizer | None,
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
        return cls(
            {"weight": weight, "offsets": offsets.to(torch.int32)},
            bits=16,
            in_features=weight.shape[1],
            bias=bias,
            quantizer=quantizer,
        )

    def _check(self, tensors: dict[str, Tensor], quantizer: ActivationQuantizer | None) -> None:
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
        if quantizer is not None and quantizer.offsets.tolist() != offsets:
            fits = quantizer.width == self.in_features and len(offsets) == 2 and quantizer.common_step() is not None
            if not fits:
                raise ValueError("the clusters of the input's quantiser do not fit those of the weight")

    def set_backend(self, backend: Backend) -> None:
        """Choose the implementation; drops the working copy.

        Raises: BackendError if `backend` is asked for by name and cannot run this layer.
        """
        self.requested = backend
        self._segments = tuple(self.offsets.tolist())
        try:
            self.choice: Choice = select_linear_backend(
                backend,
                weight_bits=self.bits,
                activation_bits=self._activation_bits,
                offsets=self._segments,
                rows=self.out_features,
                device=self.offsets.device,
            )
        except ValueError as error:
            raise BackendError(str(error)) from error
        self.release()

    def release(self) -> None:
        """Drop the working copies."""
        self._operands = self._few_rows = self._keep_float_rows = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Another device is another choice of backend."""
        super()._apply(fn, recurse)
        if not self.offsets.is_meta:
            self.set_backend(self.requested)
        return self

    @property
    def _activation_bits(self) -> int:
        return 16 if self.quantizer is None else self.quantizer.bits

    @property
    def takes_codes(self) -> bool:
        """Whether the product is one of integers; makes the working copy to know."""
        if self._operands is None:
            self._operands = self._build_operands()
        return self._operands.takes_codes

    @property
    def working_bytes(self) -> int:
        """Bytes of the working copy at this moment."""
        return sum(o.nbytes for o in (self._operands, self._few_rows) if o is not None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight as it is stored, scales and zero points included."""
        return sum(t.nbytes for t in ((self.weight,) if self.bits >= 16 else (self.packed, self.weight_scale, self.weight_zero)))

    @property
    def decode_bytes(self) -> int:
        """Bytes of the weight that one token reads: of the copy that its product takes where there is one."""
        if self.choice.backend is Backend.INT4:  # few rows do not take the float copy
            return self.stored_bytes if self._few_rows is None else self._few_rows.nbytes
        if self._operands is None:
            return self.stored_bytes
        if self.choice.backend is Backend.TRITON:
            return self.packed.nbytes + self._operands.nbytes if self.takes_codes else self.stored_bytes
        return self._operands.nbytes

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        return self.stored_bytes * 8 / (self.out_features * self.in_features)

    def dequantized_weight(self) -> Tensor:
        """Ŵ [N, K] float32, columns in cluster order."""
        if self.bits >= 16:
            return self.weight.to(torch.float32)
        return self._quantized_weight().dequantize()

    def forward(self, x: Tensor | Codes, keep_float: KeepFloat | None = None, *, inplace: bool = False) -> Tensor:
        """x [..., K] float32, or its codes where `takes_codes` -> [..., N] float32. KeepFloat tokens keep a float input. With
        `inplace` x need not survive."""
        return next(self.parts(x, None, keep_float, inplace=inplace))

    def parts(
        self, x: Tensor | Codes, sizes: tuple[int, ...] | None, keep_float: KeepFloat | None = None, *, inplace: bool = False
    ) -> Iterator[Tensor]:
        """`forward` with its output channels in tensors [..., n] of these sizes, each computed when it is asked for where that is
        as cheap."""
        if self.choice.backend is Backend.INT4 and x.numel() <= int4_rows.MAX_ROWS * self.in_features:
            if self._few_rows is None:
                self._few_rows = self._int4_operands()
            return int_linear_parts(x, self._few_rows, sizes)
        if not self.takes_codes:
            x = x if self.quantizer is None else self.quantizer.fake(x, keep_float, inplace=inplace)
            return int_linear_parts(x, self._operands, sizes)
        codes = self._input_codes(x).reshape(-1, self.in_features)
        found = (y.view(*x.shape[:-1], y.shape[-1]) for y in int_linear_parts(codes, self._operands, sizes))
        return found if keep_float is None else self._with_keep_float(found, x, sizes, keep_float_rows(keep_float, x))

    def _with_keep_float(
        self, found: Iterator[Tensor], x: Tensor, sizes: tuple[int, ...] | None, rows: tuple | Tensor
    ) -> Iterator[Tensor]:
        exact = self._float_product(x[rows])
        for y, outputs in zip(found, output_parts(sizes), strict=True):
            y[rows] = exact[..., outputs]
            yield y

    def _input_codes(self, x: Tensor) -> Tensor:
        codes = x.codes if isinstance(x, Codes) else self.quantizer.codes(x)
        return codes if self._code_factor is None else codes.mul_(self._code_factor)

    def _float_product(self, x: Tensor) -> Tensor:
        """The layer on a few float rows x [..., K], beside integer operands."""
        if self._operands.backend is not Backend.INT8:
            return nn.functional.linear(x, self.dequantized_weight(), self.bias)
        if self._keep_float_rows is None:
            scale, zero = self.weight_scale.to(torch.float32).t().contiguous(), self._operands.zero_rows
            zero = None if zero is None else scale * self.weight_zero.to(torch.float32).t()
            self._keep_float_rows = replace(self._operands, output_scale=scale, zero_rows=zero, bias=None)
        y = float_rows(x.reshape(-1, self.in_features), self._keep_float_rows).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)

    def _quantized_weight(self) -> QuantizedWeight:
        codes = unpack(self.packed, self.bits, self.in_features)
        return QuantizedWeight(codes, self.weight_scale, self.weight_zero, self.offsets.to(torch.int64), self.bits)

    def _build_operands(self) -> LinearOperands:
        if self.choice.backend in (Backend.REFERENCE, Backend.INT4):
            return LinearOperands(Backend.REFERENCE, self._segments, self.bias, weight=self.dequantized_weight())
        triton = self.choice.backend is Backend.TRITON
        held = {"packed": self.packed, "bits": self.bits, "by_name": self.requested is Backend.TRITON} if triton else {}
        if triton and not kernels_take_codes(self.bits, self._activation_bits, self._segments):
            held |= {"scale": self.weight_scale, "zero_point": self.weight_zero}
            return LinearOperands(Backend.TRITON, self._segments, self.bias, **held)
        weight, quantizer = self._quantized_weight(), self.quantizer
        step, self._code_factor = quantizer.scale, None
        if len(step) != len(self._segments) - 1:
            step, self._code_factor = quantizer.common_step()
        output_scale = (step * weight.scale.to(torch.float32)).t().contiguous()  # [G, N]
        offset = weight.dequantize() * (quantizer.channel_scale * quantizer.channel_zero)  # [N, K]
        bias = -offset.sum(dim=1, dtype=torch.float64).to(torch.float32)
        bias = bias if self.bias is None else bias + self.bias
        codes = None if triton else weight.shifted_codes()
        if codes is None:  # the zero points stay outside
            codes = None if triton else (weight.codes.to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
            held["zero_rows"] = output_scale * weight.zero_point.to(torch.float32).t()
        held |= {"codes": codes, "output_scale": output_scale}
        return LinearOperands(self.choice.backend, self._segments, bias, **held)

    def _int4_operands(self) -> LinearOperands:
        codes = unpack(self.packed, self.bits, self.in_features)
        weight = int4_rows.prepare(codes, self.weight_scale, self.weight_zero, bits=self.bits, offsets=self._segments)
        return LinearOperands(Backend.INT4, self._segments, self.bias, int4=weight)

    def extra_repr(self) -> str:
        """Shape, bits and backend, as the model's repr shows them."""
        clusters = len(self._segments) - 1
        return f"{self.in_features} → {self.out_features}, {self.bits} bits, {clusters} clusters, {self.choice.backend}"

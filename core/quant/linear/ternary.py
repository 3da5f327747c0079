"""Linear layer with ternary weights and a dynamic quantiser on its input: the layer a BitNet model is made of.

Weights are two bits each with one scale per projection: a fused q|k|v or gate|up keeps the scales of its parts (`bounds`). The
input is quantised once per call, per token, and all parts share the codes. Integer and float arithmetic give the same bits
(`kernels/ternary.py`). Source: BitNet a4.8 (arXiv:2411.04965), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from core.errors import BackendError
from core.quant.dynamic import INPUT_KINDS, quantize_input, ternary_absmean
from core.quant.static import Codes, KeepFloat, keep_float_rows
from kernels import Backend, Choice, packed_width
from kernels.backend import triton_unsupported_reason
from kernels.ternary import apply_scales, pack_ternary, ternary_product, unpack_ternary


class TernaryLinear(nn.Module):
    """y = x̂ Ŵᵀ + b with Ŵ = α t, t in {-1, 0, 1}, and x̂ quantised per token.

    Saved buffers: `packed` [N, ceil(K / 4)] uint8, `weight_scale` [P] float32, `bounds` [P + 1] int32 (rows of the P projections,
    0 … N), `bias` [N] or none. The working copy that a backend multiplies with is built on first use, is not part of the model,
    and `release` drops it.

    Args:
        tensors: the saved buffers by name, without `bias`.
        in_features: K.
        kind: one of INPUT_KINDS, or "fp" for an input that stays in float.
        keep: share of the input that kind "topk8" keeps.
    Attributes:
        sparse: "auto" skips zero codes of the input where that is cheaper, "always" and "never" force it; the result is the same.
    Raises: ValueError if the tensors do not fit each other.
    """

    bits = 2

    def __init__(
        self, tensors: dict[str, Tensor], *, in_features: int, bias: Tensor | None = None, kind: str = "int8", keep: float = 0.5
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, tensors["packed"].shape[0]
        self.kind, self.keep, self.sparse = kind, keep, "auto"
        self._check(tensors)
        for name in ("packed", "weight_scale", "bounds"):
            self.register_buffer(name, tensors[name].contiguous())
        self.register_buffer("bias", bias)
        self.quantizer = None  # QuantLinear's static quantiser: none here
        self._working: Tensor | None = None
        self._transposed: Tensor | None = None  # TRITON's, packed, for inputs that are mostly zeros
        self._row_scale: Tensor | None = None
        self.set_backend(Backend.AUTO)

    @classmethod
    def from_codes(
        cls, parts: list[tuple[Tensor, Tensor]], bias: Tensor | None = None, *, kind: str = "int8", keep: float = 0.5
    ) -> TernaryLinear:
        """Fuse projections given as (codes [n, K] int8 in {-1, 0, 1}, scale 0-dim) that read one input."""
        codes = torch.cat([c for c, _ in parts])
        bounds = torch.tensor([0, *(len(c) for c, _ in parts)]).cumsum(0).to(torch.int32)
        scales = torch.stack([s.to(torch.float32).reshape(()) for _, s in parts])
        tensors = {"packed": pack_ternary(codes), "weight_scale": scales, "bounds": bounds}
        return cls(tensors, in_features=codes.shape[1], bias=bias, kind=kind, keep=keep)

    @classmethod
    def from_weights(
        cls, parts: list[Tensor], bias: Tensor | None = None, *, kind: str = "int8", keep: float = 0.5
    ) -> TernaryLinear:
        """Round float projections [n, K] that read one input to ternary, each by its own mean."""
        return cls.from_codes([ternary_absmean(p) for p in parts], bias, kind=kind, keep=keep)

    def _check(self, tensors: dict[str, Tensor]) -> None:
        bounds, rows = tensors["bounds"].tolist(), self.out_features
        if bounds[0] != 0 or bounds[-1] != rows or any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"the projections do not cover rows 0 … {rows}")
        if tensors["packed"].shape != (rows, packed_width(self.in_features, 2)):
            raise ValueError(f"packed weights of {self.in_features} inputs have another width")
        if tensors["weight_scale"].shape != (len(bounds) - 1,) or not bool((tensors["weight_scale"] > 0).all()):
            raise ValueError("every projection needs one positive scale")
        if self.kind not in (*INPUT_KINDS, "fp") or not 0 < self.keep <= 1:
            raise ValueError(f"input quantiser {self.kind[:20]!r} with keep {self.keep}")

    def with_input(self, kind: str, keep: float) -> TernaryLinear:
        """The same weights, shared, behind another input quantiser."""
        tensors = {name: getattr(self, name) for name in ("packed", "weight_scale", "bounds")}
        return TernaryLinear(tensors, in_features=self.in_features, bias=self.bias, kind=kind, keep=keep)

    def set_backend(self, backend: Backend) -> None:
        """Choose the implementation; drops the working copy.

        Raises: BackendError if `backend` is asked for by name and cannot run this layer.
        """
        if backend is Backend.AUTO:
            choice = self._automatic()
        elif backend in (Backend.REFERENCE, self._automatic().backend):
            choice = Choice(backend, "asked for")
        else:
            raise BackendError(f"{backend} cannot run this layer, {self._automatic().reason}: use reference")
        self.requested, self.choice = backend, choice
        self.release()

    def _automatic(self) -> Choice:
        if self.kind == "fp":
            return Choice(Backend.REFERENCE, "its input stays in float, so the product does too")
        unsupported_reason = triton_unsupported_reason(self.packed.device)
        if unsupported_reason is None:
            return Choice(Backend.TRITON, "its kernel multiplies the packed weight on the GPU")
        if self.packed.device.type != "cpu":
            return Choice(Backend.REFERENCE, f"no kernel runs this layer: {unsupported_reason}")
        return Choice(Backend.INT8, "ternary weights and integer codes multiply exactly in int8")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TernaryLinear:
        """Another device is another choice of backend."""
        super()._apply(fn, recurse)
        if not self.packed.is_meta:
            self.set_backend(self.requested)
        return self

    def release(self) -> None:
        """Drop the working copy."""
        self._working = self._transposed = self._row_scale = None

    @property
    def working_bytes(self) -> int:
        """Bytes of the working copy at this moment."""
        return sum(t.numel() * t.element_size() for t in (self._working, self._transposed) if t is not None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight as it is stored, scales and row bounds included."""
        return sum(t.nbytes for t in (self.packed, self.weight_scale, self.bounds))

    @property
    def decode_bytes(self) -> int:
        """Bytes of the weight that one token reads at most: of the working copy where there is one, skipping left out."""
        return self.stored_bytes if self._working is None else self._working.nbytes

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight, scales and row bounds included."""
        return self.stored_bytes * 8 / (self.out_features * self.in_features)

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """(codes [n, K] int8, scale 0-dim) of every fused projection."""
        codes = unpack_ternary(self.packed, self.in_features)
        return list(zip(codes.split(self.bounds.diff().tolist()), self.weight_scale, strict=True))

    def dequantized_weight(self) -> Tensor:
        """Ŵ [N, K] float32."""
        return torch.cat([codes.to(torch.float32) * scale for codes, scale in self.projections()])

    def quantize(self, x: Tensor) -> Codes:
        """Codes of x [..., K] as rows; not for kind "fp"."""
        x = x.reshape(-1, self.in_features)
        if self.kind == "topk8" and self.choice.backend is Backend.TRITON:
            from kernels import topk_quant

            return Codes(*topk_quant(x, keep=self.keep))
        codes, scale = quantize_input(x, self.kind, keep=self.keep)
        return Codes(codes.to(torch.int8), scale)

    def product(self, x: Codes, rows: slice | Tensor = slice(None)) -> Tensor:
        """x̂ Ŵᵀ + b for some output rows, a slice or ascending indices: [M, n] float32."""
        bias = None if self.bias is None else self.bias[rows]
        if self.choice.backend is Backend.TRITON:  # takes the packed weight as it is
            from kernels import ternary_linear

            y = ternary_linear(x.codes, self.packed[rows], x.scale, self._scale_of_rows()[rows], code_sum=x.code_sum)
            return y if bias is None else y.add_(bias)
        weight, scale = self._operands()
        sparse = self.sparse == "always"  # gathering columns is never cheaper on a CPU: kernels/ternary.py
        y = ternary_product(x.codes, weight[rows], self.choice.backend, sparse_columns=sparse)
        y = apply_scales(y, x.scale, scale[rows])
        return y if bias is None else y.add_(bias)

    def gated_product(self, x: Codes, gate: Tensor, rows: slice) -> Tensor:
        """gate · (x̂ Ŵᵀ) of output rows without bias, [M, n] float32; backend TRITON leaves unread what a gate of 0 hides."""
        from kernels import gated_up

        return gated_up(x.codes, self.packed[rows], gate, x.scale, self._scale_of_rows()[rows], code_sum=x.code_sum)

    def sparse_product(self, x: Tensor | Codes) -> Tensor:
        """The layer without bias on x [..., K] with many zero codes, whose columns backend TRITON leaves unread: [..., N]."""
        from kernels import sparse_down

        codes = x if isinstance(x, Codes) else self.quantize(x)
        if self._transposed is None:
            self._transposed = pack_ternary(unpack_ternary(self.packed, self.in_features).t().contiguous())
        y = sparse_down(codes.codes, self.packed, self._transposed, codes.scale, self._scale_of_rows(), code_sum=codes.code_sum)
        return y.view(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor | Codes, keep_float: KeepFloat | None = None, *, inplace: bool = False) -> Tensor:
        """x [..., K] float32, or its codes -> [..., N] float32. KeepFloat tokens keep a float input; x is never overwritten."""
        if self.kind == "fp":
            weight, scale = self._operands()
            y = nn.functional.linear(x, weight).mul_(scale)
            return y if self.bias is None else y.add_(self.bias)
        y = self.product(x if isinstance(x, Codes) else self.quantize(x)).view(*x.shape[:-1], self.out_features)
        if keep_float is not None:
            rows = keep_float_rows(keep_float, x)
            y[rows] = nn.functional.linear(x[rows], self.dequantized_weight(), self.bias)
        return y

    def parts(
        self, x: Tensor | Codes, sizes: tuple[int, ...], keep_float: KeepFloat | None = None, *, inplace: bool = False
    ) -> Iterator[Tensor]:
        """`forward` with its output channels in tensors [..., n] of these sizes."""
        return iter(self.forward(x, keep_float).split(sizes, dim=-1))

    def _operands(self) -> tuple[Tensor, Tensor]:
        """(t [N, K] in the backend's type, α [N] float32)."""
        if self._working is None:
            ternary = unpack_ternary(self.packed, self.in_features)
            self._working = ternary if self.choice.backend is Backend.INT8 else ternary.to(torch.float32)
        return self._working, self._scale_of_rows()

    def _scale_of_rows(self) -> Tensor:
        """α of every row, [N] float32."""
        if self._row_scale is None:
            self._row_scale = self.weight_scale.repeat_interleave(self.bounds.diff())
        return self._row_scale

    def extra_repr(self) -> str:
        """Shape, input and backend, as the model's repr shows them."""
        return f"{self.in_features} → {self.out_features}, ternary, input {self.kind}, {self.choice.backend}"

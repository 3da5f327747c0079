"""Linear layer of a BitNet model: ternary weights and a dynamic quantiser of its input.

Weights are two bits each with one scale per projection: a fused q|k|v or gate|up keeps the scales of its parts (`bounds`). The
input is quantised once per call, per token, and all parts use the same codes. Integer and float arithmetic give the same bits
(`kernels/ternary/`). Behind a quantiser that rotates its input, the codes are those of x R and the weights those of Ŵ R.
Sources: BitNet a4.8 (arXiv:2411.04965), section 2, BitNet v2 (arXiv:2504.18415), section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.quant.dynamic import INPUT_KINDS, quantize_input, quantize_weight, rotates
from core.quant.linear.base import LinearLayer
from core.quant.static import PLAIN, InputUse
from kernels import Backend, Choice, Codes, hadamard, packed_width
from kernels.backend import triton_unsupported_reason
from kernels.ternary import apply_scales, pack_ternary, ternary_product, unpack_ternary

if TYPE_CHECKING:
    from kernels.norm_quant import Norm


class TernaryLinear(LinearLayer):
    """A linear layer y = x̂ Ŵᵀ + b with Ŵ = α t, t in {-1, 0, 1}, and x̂ quantised per token.

    Saved buffers: `packed` [N, ceil(K / 4)] uint8, `weight_scale` [P] float32, `bounds` [P + 1] int32 (rows of the P projections,
    0 … N), `bias` [N] or none. Working copies, by name in `copies`:

        weight       t [N, K], int8 for INT8 and float32 for REFERENCE; TRITON takes `packed`
        row scale    α of every row, [N] float32
        transposed   TRITON's, t transposed and packed, for inputs that are mostly zeros

    Args:
        tensors: the saved buffers by name, without `bias`.
        in_features: K.
        kind: one of INPUT_KINDS, or "fp" for an input that stays in float.
        keep: share of the input that kind "topk8" keeps.
    Raises: ValueError if the tensors do not fit each other.
    """

    def __init__(
        self, tensors: dict[str, Tensor], *, in_features: int, bias: Tensor | None = None, kind: str = "int8", keep: float = 0.5
    ) -> None:
        super().__init__(in_features, tensors["packed"].shape[0], bits=2)
        self.kind, self.keep = kind, keep
        self._check(tensors)
        for name in ("packed", "weight_scale", "bounds"):
            self.register_buffer(name, tensors[name].contiguous())
        self.register_buffer("bias", bias)
        self.set_backend(Backend.AUTO)

    @classmethod
    def from_codes(
        cls, parts: list[tuple[Tensor, Tensor]], bias: Tensor | None = None, *, kind: str = "int8", keep: float = 0.5
    ) -> TernaryLinear:
        """Make a layer of fused projections (codes [n, K] int8 in {-1, 0, 1}, scale 0-dim) that read the same input."""
        codes = torch.cat([c for c, _ in parts])
        bounds = torch.tensor([0, *(len(c) for c, _ in parts)]).cumsum(0).to(torch.int32)
        scales = torch.stack([s.to(torch.float32).reshape(()) for _, s in parts])
        tensors = {"packed": pack_ternary(codes), "weight_scale": scales, "bounds": bounds}
        return cls(tensors, in_features=codes.shape[1], bias=bias, kind=kind, keep=keep)

    @classmethod
    def from_weights(
        cls, parts: list[Tensor], bias: Tensor | None = None, *, kind: str = "int8", keep: float = 0.5
    ) -> TernaryLinear:
        """Make a layer of float projections [n, K] that read the same input, each rounded by `quantize_weight`."""
        return cls.from_codes([quantize_weight(p, kind) for p in parts], bias, kind=kind, keep=keep)

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
        """Return a layer with the same weights, shared, and another input quantiser.

        Raises: ValueError where one of the quantisers rotates the input and the other does not.
        """
        if rotates(kind) != rotates(self.kind):
            raise ValueError(f"weights behind the input quantiser {self.kind} do not serve {kind[:20]}: round them again")
        tensors = {name: getattr(self, name) for name in ("packed", "weight_scale", "bounds")}
        return TernaryLinear(tensors, in_features=self.in_features, bias=self.bias, kind=kind, keep=keep)

    def choose(self, backend: Backend) -> Choice:
        """Choose the backend as `LinearLayer.choose` says."""
        automatic = self._automatic()
        if backend is Backend.AUTO:
            return automatic
        if backend not in (Backend.REFERENCE, automatic.backend):
            raise ValueError(f"{backend} cannot run this layer, {automatic.reason}: use reference")
        return Choice(backend, "asked for")

    def _automatic(self) -> Choice:
        if self.kind == "fp":
            return Choice(Backend.REFERENCE, "its input stays in float, so the product does too")
        unsupported_reason = triton_unsupported_reason(self.packed.device)
        if unsupported_reason is None:
            return Choice(Backend.TRITON, "its kernel multiplies the packed weight on the GPU")
        if self.packed.device.type != "cpu":
            return Choice(Backend.REFERENCE, f"no kernel runs this layer: {unsupported_reason}")
        return Choice(Backend.INT8, "ternary weights and integer codes multiply exactly in int8")

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the saved tensors of the weight, as `LinearLayer.stored_tensors` says, and the row bounds."""
        return self.packed, self.weight_scale, self.bounds

    @property
    def decode_bytes(self) -> int:
        """Bytes of the weight that one token reads at most: those of the working copy if there is one; skipped rows count."""
        copy = self.copies.nbytes(self, "weight")
        return copy + self.copies.nbytes(self, "row scale") if copy else self.stored_bytes

    def projections(self) -> list[tuple[Tensor, Tensor]]:
        """Return (codes [n, K] int8, scale 0-dim) of every fused projection."""
        return list(zip(self._ternary().split(self.bounds.diff().tolist()), self.weight_scale, strict=True))

    def dequantized_weight(self) -> Tensor:
        """Return Ŵ [N, K] float32, for an input that is not rotated."""
        weight = torch.cat([codes.to(torch.float32) * scale for codes, scale in self.projections()])
        return hadamard(weight) if rotates(self.kind) else weight

    def quantize(self, x: Tensor) -> Codes:
        """Compute the codes of x [..., K] as rows; not for kind "fp"."""
        x = x.reshape(-1, self.in_features)
        if self.kind == "topk8" and self.choice.backend is Backend.TRITON:
            from kernels import topk_quant

            return topk_quant(x, keep=self.keep)
        codes, scale = quantize_input(x, self.kind, keep=self.keep)
        return Codes(codes.to(torch.int8), scale)

    def product(self, x: Codes, rows: slice | Tensor = slice(None)) -> Tensor:
        """Compute x̂ Ŵᵀ + b for some output channels, a slice or ascending indices: [M, n] float32."""
        bias = None if self.bias is None else self.bias[rows]
        if self.choice.backend is Backend.TRITON:  # takes the packed weight as it is
            from kernels import ternary_linear

            y = ternary_linear(x, self.packed[rows], self._scale_of_rows()[rows])
            return y if bias is None else y.add_(bias)
        y = ternary_product(x.codes, self._weight()[rows], self.choice.backend)
        y = apply_scales(y, x.scale, self._scale_of_rows()[rows])
        return y if bias is None else y.add_(bias)

    def gated_product(self, x: Codes, gate: Tensor, rows: slice) -> Tensor:
        """Compute gate · (x̂ Ŵᵀ) of the output channels `rows` without bias, [M, n] float32, by TRITON.

        Rows of the weight whose gates are all 0 are not read.
        """
        from kernels import gated_up

        return gated_up(x, self.packed[rows], gate, self._scale_of_rows()[rows])

    @property
    def skips_zeros(self) -> bool:
        """Whether `sparse_product` may take this layer's place."""
        return self.choice.backend is Backend.TRITON and self.bias is None and not rotates(self.kind)

    def sparse_product(self, x: Tensor | Codes) -> Tensor:
        """Apply the layer without bias to x [..., K] by TRITON, which does not read the columns of zero codes: [..., N]."""
        from kernels import sparse_down

        codes = x if isinstance(x, Codes) else self.quantize(x)
        transposed = self.copies.get("transposed", lambda: pack_ternary(self._ternary().t().contiguous()))
        y = sparse_down(codes, self.packed, transposed, self._scale_of_rows())
        return y.view(*x.shape[:-1], self.out_features)

    def parts(self, x: Tensor | Codes, sizes: tuple[int, ...] | None, use: InputUse = PLAIN) -> Iterator[Tensor]:
        """Compute `LinearLayer.parts`, all parts at once; x is not overwritten."""
        y = self._floats(x) if self.kind == "fp" else self._codes_product(x, use.float_tokens)
        return iter((y,) if sizes is None else y.split(sizes, dim=-1))

    def _floats(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self._weight()).mul_(self._scale_of_rows())
        return y if self.bias is None else y.add_(self.bias)

    def _codes_product(self, x: Tensor | Codes, float_tokens: int) -> Tensor:
        y = self.product(x if isinstance(x, Codes) else self.quantize(x)).view(*x.shape[:-1], self.out_features)
        if float_tokens:
            first = x[..., :float_tokens, :]
            y[..., :float_tokens, :] = nn.functional.linear(first, self.dequantized_weight(), self.bias)
        return y

    def norm_codes(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Codes] | None:
        """Add, normalise and quantise in one kernel: see `LinearLayer.norm_codes`."""
        from kernels.norm_quant import KINDS, norm_quantize_dynamic

        if self.choice.backend is not Backend.TRITON or self.kind not in KINDS:
            return None
        return norm_quantize_dynamic(x, norm, self.kind, residual=residual)

    def _ternary(self) -> Tensor:
        return unpack_ternary(self.packed, self.in_features)

    def _weight(self) -> Tensor:
        """Return t [N, K] in the backend's type."""
        dtype = torch.int8 if self.choice.backend is Backend.INT8 else torch.float32
        return self.copies.get("weight", lambda: self._ternary().to(dtype))

    def _scale_of_rows(self) -> Tensor:
        """Return α of every row, [N] float32."""
        return self.copies.get("row scale", lambda: self.weight_scale.repeat_interleave(self.bounds.diff()))

    def extra_repr(self) -> str:
        """Describe shape, input and backend, as the model's repr shows them."""
        return f"{self.in_features} → {self.out_features}, ternary, input {self.kind}, {self.choice.backend}"

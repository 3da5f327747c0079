"""Linear layer whose weight another library has quantised: its codes and scales, its own dequantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from core.quant.linear.base import LinearLayer
from core.quant.static import PLAIN, InputUse
from kernels import Backend, Choice


@dataclass(frozen=True, eq=False)
class ForeignWeight:
    """A weight [N, K] as another library stores it.

    Attributes:
        tensors: everything that is stored, by name: `packed` for the codes, `scale…` and `zero_point` for the others.
        dequantize: returns Ŵ [N, K] float32, computed by the library.
        product: computes x Ŵᵀ [..., N] of x [..., K] by the library, where it quantises x too; None where x stays in float.
    """

    tensors: dict[str, Tensor]
    dequantize: Callable[[], Tensor]
    product: Callable[[Tensor], Tensor] | None = None


class ForeignLinear(LinearLayer):
    """A linear layer y = x Ŵᵀ + b with Ŵ of another library.

    The tensors of `weight` are the saved buffers; Ŵ is a working copy, made when the layer first multiplies.

    Args:
        weight: of shape [N, K]. shape: N and K. bits: of a code.
        bias: [N] floating, or None. reason: how the layer computes, for reports.
    """

    def __init__(
        self, weight: ForeignWeight, shape: tuple[int, int], bias: Tensor | None = None, *, bits: int, reason: str
    ) -> None:
        super().__init__(shape[1], shape[0], bits=bits)
        self.weight, self.reason = weight, reason
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self.set_backend(Backend.AUTO)

    def choose(self, backend: Backend) -> Choice:
        """Choose the reference. Raises: ValueError for another backend by name."""
        if backend not in (Backend.AUTO, Backend.REFERENCE):
            raise ValueError(f"{backend} cannot run this layer, whose codes are another library's: use reference")
        return Choice(Backend.REFERENCE, self.reason)

    def parts(self, x: Tensor, sizes: tuple[int, ...] | None, use: InputUse = PLAIN) -> Iterator[Tensor]:
        """Split the product: see `LinearLayer.parts`."""
        if self.weight.product is None:
            y = nn.functional.linear(x, self.copies.get("weight", self.weight.dequantize), self.bias)
        else:
            y = self.weight.product(x)
            y = y if self.bias is None else y + self.bias
        return iter((y,) if sizes is None else y.split(sizes, dim=-1))

    def dequantized_weight(self) -> Tensor:
        """Return Ŵ [N, K] float32."""
        return self.weight.dequantize()

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the library's tensors."""
        return tuple(self.weight.tensors.values())

    @property
    def decode_bytes(self) -> int:
        """Bytes of the weight that one token reads: those of the working copy where there is one."""
        return self.working_bytes or self.stored_bytes

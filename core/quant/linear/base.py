"""The base class of a decoder block's linear layers (float, packed, ternary), and the float one.

A layer keeps its weight as it is saved. If its backend multiplies with another form of it, that is a working copy: derived from
the saved tensors on first use and never saved. All working copies of a layer live in `LinearLayer.copies` and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from core.errors import BackendError
from core.quant.rotated import TokenQuantizer
from core.quant.static import PLAIN, ActivationQuantizer, InputUse
from kernels import Backend, Choice, Codes

if TYPE_CHECKING:
    from kernels.norm_quant import Norm


class WorkingCopies:
    """Tensors that a layer derives from its saved ones, by name: made when first asked for, dropped together.

    An entry is a tensor, a tuple, or the operands of a backend (`kernels.linear.LinearOperands`).
    """

    def __init__(self) -> None:
        self._held: dict[str, object] = {}

    def get(self, name: str, make: Callable[[], object]) -> object:
        """Return the entry `name`; call `make` for it if there is none yet."""
        if name not in self._held:
            self._held[name] = make()
        return self._held[name]

    def clear(self) -> None:
        """Drop every entry."""
        self._held.clear()

    def nbytes(self, layer: nn.Module, name: str | None = None) -> int:
        """Count the bytes of the entry `name` (0 if there is none), or of all entries.

        A tensor in several entries counts once; tensors that `layer` saves do not count.
        """
        entries = self._held.values() if name is None else [self._held.get(name)]
        own = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        found = {id(t): t for entry in entries for t in _tensors(entry) if id(t) not in own}
        return sum(t.nbytes for t in found.values())


def _tensors(entry: object) -> Iterator[Tensor]:
    if isinstance(entry, Tensor):
        yield entry
    elif isinstance(entry, tuple):
        yield from (t for part in entry for t in _tensors(part))
    elif entry is not None:
        yield from (t for t in vars(entry).values() if isinstance(t, Tensor))


class LinearLayer(nn.Module, ABC):
    """A linear layer y = x̂ Ŵᵀ + b; x̂ and Ŵ are x and W, or their quantised values.

    Attributes:
        bits: bits of a stored weight; 16 for floats.
        in_features, out_features: K and N.
        bias: [N] float, or None.
        quantizer: the quantiser of the input, None where there is none.
        requested: the backend that was asked for.
        choice: the backend that runs, and why.
        copies: the working copies that exist at this moment.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        quantizer: ActivationQuantizer | TokenQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.quantizer = quantizer
        self.requested, self.choice = Backend.AUTO, Choice(Backend.REFERENCE, "not chosen yet")
        self.copies = WorkingCopies()

    # what each kind of layer defines

    @abstractmethod
    def choose(self, backend: Backend) -> Choice:
        """Decide which backend runs this layer on its device. Raises: ValueError if `backend`, asked for by name, cannot."""

    @abstractmethod
    def parts(self, x: Tensor | Codes, sizes: tuple[int, ...] | None, use: InputUse = PLAIN) -> Iterator[Tensor]:
        """Compute `forward` in parts [..., n] with the n of `sizes` (Σ sizes = N), one after the other; None is one part of N.

        A layer may compute a part only when the iterator reaches it, so x must not be changed until the last part was taken.
        Other arguments: see `forward`.
        """

    @abstractmethod
    def dequantized_weight(self) -> Tensor:
        """Return Ŵ [N, K] float32."""

    @abstractmethod
    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the saved tensors that make up the weight: codes, scales and zero points, not the bias."""

    @property
    def decode_bytes(self) -> int:
        """Bytes of the weight that the product of one token reads: those of the working copy where it uses one."""
        return self.stored_bytes

    # what all layers share

    def forward(self, x: Tensor | Codes, use: InputUse = PLAIN) -> Tensor:
        """Compute the layer's output.

        Args:
            x: [..., K] floating, or its codes where a kernel made them (`norm_codes`).
            use: with `owned` the layer overwrites x where that saves it a copy and leaves it alone otherwise; the result is the
                same bits in both cases and shares no memory with x.
        Returns: [..., N].
        """
        return next(self.parts(x, None, use))

    def norm_codes(self, x: Tensor, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, Codes] | None:
        """Add a residual, normalise and quantise this layer's input in one kernel, on CUDA.

        Args:
            x: [..., K] floating; residual: the same, or None.
            norm: the norm before the layer.
        Returns: (x + residual, codes of its norm), or None where the layer does not multiply codes that this kernel makes: then
        only reordering and norm remain, for which plain torch is used.
        """
        return None

    def set_backend(self, backend: Backend) -> None:
        """Choose the implementation and drop the working copies.

        Raises: BackendError if `backend` is asked for by name and cannot run this layer; the layer stays as it was.
        """
        try:
            choice = self.choose(backend)
        except ValueError as error:
            raise BackendError(str(error)) from error
        self.requested, self.choice = backend, choice
        self.release()

    def release(self) -> None:
        """Drop the working copies."""
        self.copies.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearLayer:
        """Move or convert the tensors, and choose the backend again for their device."""
        super()._apply(fn, recurse)
        if not self.stored_tensors()[0].is_meta:
            self.set_backend(self.requested)
        return self

    @property
    def working_bytes(self) -> int:
        """Bytes of all working copies at this moment."""
        return self.copies.nbytes(self)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight as saved, scales and zero points included."""
        return sum(t.nbytes for t in self.stored_tensors())

    @property
    def effective_bits(self) -> float:
        """Saved bits per weight, scales and zero points included."""
        return self.stored_bytes * 8 / (self.out_features * self.in_features)


class FloatLinear(LinearLayer):
    """A linear layer y = x Wᵀ + b in floating point, with the interface of the low-bit layers.

    Args:
        weight: [N, K] floating, kept as it is.
        bias: [N] floating, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bits=16)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.set_backend(Backend.AUTO)

    def choose(self, backend: Backend) -> Choice:
        """Choose the reference: torch's product. Raises: ValueError for another backend by name."""
        if backend not in (Backend.AUTO, Backend.REFERENCE):
            raise ValueError(f"{backend} cannot run this layer, whose weights stay in float: use reference")
        return Choice(Backend.REFERENCE, "weights stay in float, so the product does too")

    def forward(self, x: Tensor, use: InputUse = PLAIN) -> Tensor:
        """Compute the product; nothing is quantised or overwritten, whatever `use` says."""
        return nn.functional.linear(x, self.weight, self.bias)

    def parts(self, x: Tensor, sizes: tuple[int, ...] | None, use: InputUse = PLAIN) -> Iterator[Tensor]:
        """Split the product: see `LinearLayer.parts`. The layer is called as a module, so hooks on it see its output whole."""
        y = self(x)
        return iter((y,) if sizes is None else y.split(sizes, dim=-1))

    def permuted(self, *, rows: Tensor | None = None, columns: Tensor | None = None) -> FloatLinear:
        """Make the layer whose outputs lie in the order `rows` [N], and whose inputs in `columns` [K]; None keeps an order."""
        weight, bias = self.weight.detach(), self.bias
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return FloatLinear((weight if columns is None else weight[:, columns]).contiguous(), bias)

    def dequantized_weight(self) -> Tensor:
        """Return the weight itself, [N, K] in its own type."""
        return self.weight.detach()

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the weight."""
        return (self.weight,)

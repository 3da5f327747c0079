"""Operands: the tensors that a backend multiplies with, made from a layer's weight; those of REFERENCE."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

WHOLE = slice(None)
"""Slice of all output channels."""


class LinearOperands(ABC):
    """Tensors that one backend multiplies with, computed once from a layer's stored ones.

    A subclass is a frozen dataclass of its tensors and defines `product`.
    """

    takes_codes: ClassVar[bool] = False
    """Whether `product` takes int8 codes qx, [M, K] (True), or floats [..., K] that are already x̂."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Compute x̂ Ŵᵀ + b: x [M, K] or [..., K] as `takes_codes` says -> [..., N] float32."""

    def parts(self, x: Tensor, sizes: tuple[int, ...] | None) -> Iterator[Tensor]:
        """Compute `product` in parts [..., n] with the n of `sizes`, in order; None is one part of all channels.

        REFERENCE and INT8 compute each part when the iterator reaches it, so that the caller's next step finds it in cache (SiLU
        of 1536 of 3072 channels, 512 rows, two threads: 0.28 ms; after both parts 0.68 ms). The others compute all parts at once.
        """
        y = self.product(x)
        return iter((y,) if sizes is None else y.split(sizes, dim=-1))


class PartwiseOperands(LinearOperands):
    """Operands of a backend that can compute some output channels alone, in proportionally less time."""

    @abstractmethod
    def product(self, x: Tensor, outputs: slice = WHOLE) -> Tensor:
        """Compute the output channels `outputs` of `LinearOperands.product`: [..., n]."""

    def parts(self, x: Tensor, sizes: tuple[int, ...] | None) -> Iterator[Tensor]:
        """Compute `product` in parts, each when the iterator reaches it."""
        return (self.product(x, outputs) for outputs in output_parts(sizes))


def output_parts(sizes: tuple[int, ...] | None) -> list[slice]:
    """Return the slices of output channels with these sizes; None is one slice of all."""
    if sizes is None:
        return [WHOLE]
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@dataclass(frozen=True)
class ReferenceOperands(PartwiseOperands):
    """Operands of REFERENCE: the dequantised weight Ŵ [N, K] float32 and the bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def product(self, x: Tensor, outputs: slice = WHOLE) -> Tensor:
        """Compute the output channels `outputs` of x Ŵᵀ + b in float32: [..., n]."""
        if outputs is WHOLE:  # a slice of everything would cost as much as a small product
            return torch.nn.functional.linear(x, self.weight, self.bias)
        return torch.nn.functional.linear(x, self.weight[outputs], None if self.bias is None else self.bias[outputs])

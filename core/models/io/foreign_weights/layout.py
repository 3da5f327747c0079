"""Describe how a format stores a weight, and compute weights from codes, scales and zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.models.io.preflight.folder import TensorInfo

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One way to store a weight.

    Attributes:
        title: such as "4-bit GPTQ".
        parts: part → accepted types and shape; None in a shape is any size. Sizes of one are not compared.
        unpack: makes the weight [N, K], float32, from the stored parts.
        optional: parts that may be absent.
    """

    title: str
    parts: Mapping[str, tuple[tuple[str, ...], tuple[int | None, ...]]]
    unpack: Callable[[Parts], Tensor]
    optional: frozenset[str] = field(default=frozenset())

    def faults(self, found: Mapping[str, TensorInfo]) -> list[str]:
        """List how stored parts differ from this layout, one clause each."""
        said = [f"{part} is missing" for part in self.parts if part not in found and part not in self.optional]
        said += [f"{part} is not part of it" for part in found if part not in self.parts]
        for part, (types, shape) in self.parts.items():
            stored = found.get(part)
            if stored and not (stored.dtype in types and _same(stored.shape, shape)):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                said.append(f"{part} is {stored.dtype} {list(stored.shape)}, not {'/'.join(types)} [{wanted}]")
        return said


def _same(stored: Shape, wanted: tuple[int | None, ...]) -> bool:
    """Compare shapes without their sizes of one: a scale per row is stored as [N] or [N, 1]."""
    sizes = [size for size in wanted if size != 1]
    return [size for size in stored if size != 1] == sizes or (sizes == [None] and len(stored) == 1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack `count` codes per row from a stream of 32-bit words.

    Args: words: [R, ceil(count bits / 32)] int32 or uint32. bits: 2 to 8.
    Returns: [R, count] uint8.
    """
    stream = words.contiguous().view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits))
    whole = torch.zeros(stream.shape[:2], dtype=torch.int64)
    for place in range(bits):  # `bits` bytes hold eight codes
        whole |= stream[..., place].long() << 8 * place
    codes = torch.stack([(whole >> bits * place & 2**bits - 1).to(torch.uint8) for place in range(8)], dim=-1)
    return codes.flatten(1)[:, :count]


def affine(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    block: tuple[int, int],
    order: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute (codes - zero) * scale + bias in float32.

    Args:
        codes: [N, K]. scale, zero, bias: [ceil(N / rows), ceil(K / columns)], one for each block of (rows, columns) codes.
        order: [K], group of each column, where neighbours may be in different groups.
    Raises: ValueError for a group that has no scale.
    """
    rows, columns = torch.arange(len(codes)) // block[0], torch.arange(codes.shape[1]) // block[1] if order is None else order
    if int(columns.min()) < 0 or int(columns.max()) >= scale.shape[1]:
        raise ValueError(f"a column names group {int(columns.max())} of {scale.shape[1]}")

    def spread(values: Tensor) -> Tensor:
        return values.to(torch.float32)[rows][:, columns]

    weight = codes.to(torch.float32)
    weight = weight if zero is None else weight.sub_(spread(zero))
    weight = weight.mul_(spread(scale))
    return weight if bias is None else weight.add_(spread(bias))


def scaled(scale: str, zero: str | None, block: tuple[int, int], found: Parts) -> Tensor:
    """Compute the weight of codes that are stored one by one, scale and zero point by these names."""
    return affine(found["weight"], found[scale], found[zero] if zero else None, block)

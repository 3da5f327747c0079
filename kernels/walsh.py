"""Rotate rows by a block-diagonal Hadamard matrix: the op `hadamard`.

    y = x R        R = diag(R_1, …, R_n), one for each run of `block` channels; the last run holds what remains
    R_i = C_m ⊗ H_n                                               of a run of m n channels, m odd and n a power of two
    H_1 = 1    H_2n = [[H_n, H_n], [H_n, -H_n]] / √2              Sylvester's Hadamard matrix, all entries ± 1 / √n
    C_m[j, k] = (cos(2π j k / m) + sin(2π j k / m)) / √m          Hartley's matrix, entries at most √(2 / m)

R is orthogonal and symmetric, so it is its own inverse. H_n is the Kronecker product of H_64 as often as it fits and of what
remains, and each factor is one product with a small dense matrix, which torch multiplies faster than log2 n passes of additions.
Cost: K Σ f multiplications for each row of K channels, f the sizes of the factors (576 = 9 · 64: 73 K; dense: 576 K).
Source: the Walsh–Hadamard transform as in QuaRot (arXiv:2404.00456); Hartley's matrix for odd factors is our choice.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

LARGEST_FACTOR = 64
"""Size of the Hadamard factors: two products with 64 cost less than one with 4,096, and fill matrix instructions."""


@lru_cache(maxsize=64)
def factors(width: int) -> tuple[int, ...]:
    """Split a width into the sizes of its Kronecker factors: the odd one first, where it is not 1, then powers of two."""
    power = width & -width
    sizes = [width // power] if width > power else []
    while power > 1:
        sizes.append(min(power, LARGEST_FACTOR))
        power //= sizes[-1]
    return tuple(sizes)


@lru_cache(maxsize=64)
def factor_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the factor of one size, [size, size]: Hadamard's for a power of two, else Hartley's."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        if size & (size - 1):
            angles = torch.arange(size, dtype=torch.float64)
            angles = torch.outer(angles, angles).remainder(size) * (2 * math.pi / size)
            return ((angles.cos() + angles.sin()) / math.sqrt(size)).to(device, dtype)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / math.sqrt(size)).to(device, dtype)


def hadamard(x: Tensor, block: int = 0) -> Tensor:
    """Rotate the rows of x [..., K] floating; a second call undoes the first.

    Args:
        block: channels of a run, 1 or more; 0, or more than K, for one run of all.
    Returns: [..., K] in x's type, new memory.
    Raises: ValueError for a negative block.
    """
    if block < 0:
        raise ValueError(f"blocks of {block} channels: use 1 or more, or 0 for the whole width")
    width = x.shape[-1]
    block = min(block or width, width)
    whole = width - width % block
    y = _rotated(x[..., :whole].unflatten(-1, (-1, block))).flatten(-2)
    return y if whole == width else torch.cat([y, _rotated(x[..., whole:])], dim=-1)


def _rotated(x: Tensor) -> Tensor:
    """Rotate x [..., n] as one run."""
    y = x.reshape(-1, x.shape[-1])
    for size in factors(x.shape[-1]):  # each step multiplies the first axis and puts it last: at the end all are in place
        y = y.view(len(y), size, -1).transpose(1, 2) @ factor_matrix(size, x.dtype, x.device)
        y = y.reshape(len(y), -1)
    return y.view(x.shape) if y.data_ptr() != x.data_ptr() else x.clone()

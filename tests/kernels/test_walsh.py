"""The Hadamard op against matrices written down independently, in float64, and against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import hadamard
from kernels.walsh import factors


def by_definition(width: int) -> torch.Tensor:
    """R of one run, entry by entry: (-1)^popcount(i & j) for the power of two, cos + sin for the odd factor."""
    power = width & -width
    odd = width // power
    rows = []
    for i in range(width):
        row = []
        for j in range(width):
            angle = 2 * math.pi * (i // power) * (j // power) / odd
            sign = (-1) ** ((i % power) & (j % power)).bit_count()
            row.append(sign * (math.cos(angle) + math.sin(angle)) / math.sqrt(width))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 12, 64, 96, 128, 144, 192])
def test_one_run_is_the_matrix_of_its_definition(width):
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    assert torch.allclose(hadamard(x), x @ by_definition(width), atol=1e-12)
    assert math.prod(factors(width)) == width


@pytest.mark.parametrize(("width", "block"), [(576, 64), (100, 32), (96, 64), (64, 100), (40, 1), (576, 0), (1536, 0), (4096, 0)])
def test_blocks_and_what_remains_are_runs_of_their_own(width, block):
    x = torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = hadamard(x, block)
    size = block or width
    parts = [hadamard(x[..., start : start + size]) for start in range(0, width, size)]
    assert torch.equal(y, torch.cat(parts, dim=-1))
    assert torch.allclose(hadamard(y, block), x, atol=1e-12), "its own inverse"
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-9), "orthogonal"
    assert y.data_ptr() != x.data_ptr()


def test_powers_of_two_spread_one_channel_evenly():
    y = hadamard(torch.eye(256)[3])
    assert torch.equal(y.abs(), torch.full((256,), 1 / 16))


def test_float32_keeps_its_precision_on_strided_input():
    x = torch.randn(7, 1536, 2, generator=torch.Generator().manual_seed(2))[..., 0]
    expected = hadamard(x.double())
    assert float((hadamard(x).double() - expected).norm() / expected.norm()) < 3e-7


def test_a_negative_block_is_refused():
    with pytest.raises(ValueError, match="whole width"):
        hadamard(torch.ones(4), -1)

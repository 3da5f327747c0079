"""The ternary kernel gives the bits of integer arithmetic: odd sizes, extreme codes, fused scales, strides, every split."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, Codes, ternary_linear
from kernels.split_k import finish
from kernels.ternary import pack_ternary

pytestmark = pytest.mark.gpu


def layer(rows, outputs, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, width), generator=g).to(torch.int8)
    ternary = torch.randint(-1, 2, (outputs, width), generator=g).to(torch.int8)
    return codes, ternary, torch.rand(rows, 1, generator=g), torch.rand(outputs, generator=g)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 65, 96), (5, 70, 1030), (16, 3, 7), (17, 130, 130), (2, 64, 4096)], ids=str)
def test_the_kernel_gives_the_bits_of_integer_arithmetic(shape, device):
    codes, ternary, s, alpha = layer(*shape)
    x = Codes(codes.to(device), s.to(device))
    y = ternary_linear(x, pack_ternary(ternary).to(device), alpha.to(device), backend=Backend.TRITON)
    exact = (codes.long() @ ternary.long().T).float()
    assert torch.equal(y.cpu(), exact * s * alpha)


def test_one_scale_given_sums_and_strides(device):
    codes, ternary, s, _ = layer(6, 20, 100)
    packed, alpha = pack_ternary(ternary), torch.tensor(0.37)
    strided = codes.T.contiguous().to(device).T
    x = Codes(strided, s.to(device), codes.sum(1, dtype=torch.int32).to(device))
    y = ternary_linear(x, packed.to(device), alpha.to(device), backend=Backend.TRITON)
    assert torch.equal(y.cpu(), (codes.long() @ ternary.long().T).float() * s * alpha)
    assert torch.equal(y.cpu(), ternary_linear(Codes(codes, s), packed, alpha, backend=Backend.REFERENCE))


def test_extreme_codes_do_not_overflow(device):
    codes, ternary = torch.full((2, 2048), -127, dtype=torch.int8), torch.ones(3, 2048, dtype=torch.int8)
    packed, one = (t.to(device) for t in (pack_ternary(ternary), torch.ones(3)))
    y = ternary_linear(Codes(codes.to(device), torch.ones(2, 1).to(device)), packed, one, backend=Backend.TRITON)
    assert torch.equal(y.cpu(), torch.full((2, 3), -127.0 * 2048))


def test_the_epilogue_adds_shares_in_order(device):
    g = torch.Generator().manual_seed(0)
    partial = torch.randint(-(2**20), 2**20, (3, 2, 5), generator=g, dtype=torch.int32)
    shift, row, column, bias = torch.tensor([7, -9], dtype=torch.int32), torch.rand(2), torch.rand(5), torch.rand(5)
    y = finish(partial.to(device), shift=shift.to(device), row=row.to(device), column=column.to(device), bias=bias.to(device))
    assert torch.equal(y.cpu(), (partial.sum(0) - shift[:, None]).float() * row[:, None] * column + bias)
    floats = torch.rand(4, 2, 5, generator=g)
    assert torch.equal(finish(floats.to(device)).cpu(), floats[0] + floats[1] + floats[2] + floats[3])


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        ternary_linear(
            Codes(torch.zeros(1, 9, dtype=torch.int8), torch.ones(1, 1)), torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2)
        )

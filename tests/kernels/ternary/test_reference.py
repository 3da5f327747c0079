"""Ternary products: every path gives the same bits as int64 arithmetic, every skipped part is exact."""

from __future__ import annotations

import pytest
import torch

from kernels.backend import Backend
from kernels.codes import Codes
from kernels.ternary import apply_scales, pack_ternary, ternary_product, unpack_ternary
from kernels.ternary.reference import reference
from tests.kernels.fake_cuda import on_second_gpu

SHAPES = [(1, 96, 256), (5, 70, 512), (16, 64, 320), (1, 1, 7), (3, 1, 9), (2, 5, 1), (1, 3, 1), (4, 33, 130), (1, 17, 66)]


def operands(rows: int, out: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, width), generator=g).to(torch.int8)
    return codes, torch.randint(-1, 2, (out, width), generator=g).to(torch.int8)


def exact(codes: torch.Tensor, ternary: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int64) @ ternary.to(torch.int64).t()).to(torch.float32)


def test_on_a_gpu_the_whole_layer_needs_no_int_mm(monkeypatch):
    """There `torch._int_mm` refuses up to 16 rows and widths that are not multiples of 8."""
    codes, ternary = operands(3, 5, 9)
    packed, s, alpha = pack_ternary(ternary), torch.rand(3, 1), torch.rand(5)
    monkeypatch.setattr(torch, "_int_mm", None)
    y = reference(Codes(on_second_gpu(codes), s), packed, alpha)
    assert torch.equal(y, exact(codes, ternary) * s * alpha)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 64, 130])
def test_packing_round_trips(width):
    _, ternary = operands(1, 6, width)
    packed = pack_ternary(ternary)
    assert packed.shape == (6, -(-width // 4)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_ternary(packed, width), ternary)


def test_packed_layout_by_hand():
    """Columns 0, n, 2n, 3n from the low bits up: 0, -1, 1, 1 is 0b10_10_00_01."""
    assert pack_ternary(torch.tensor([[0, -1, 1, 1]], dtype=torch.int8)).tolist() == [[0b10100001]]
    assert pack_ternary(torch.tensor([[0, 1, -1, 1, 1, 1, 1, -1]], dtype=torch.int8)).tolist() == [[0b10100001, 0b00101010]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_is_exact(shape):
    codes, ternary = operands(*shape)
    expected = exact(codes, ternary)
    assert torch.equal(ternary_product(codes, ternary, Backend.INT8), expected)
    assert torch.equal(ternary_product(codes, ternary.float(), Backend.REFERENCE), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_offset_codes_give_the_same_sum(shape):
    """Σ c (t + 1) - Σ c = Σ c t: what a kernel that keeps the stored codes computes."""
    codes, ternary = operands(*shape)
    wide = codes.to(torch.int64)
    assert torch.equal((wide @ (ternary + 1).to(torch.int64).t() - wide.sum(1, keepdim=True)).float(), exact(codes, ternary))


def test_the_largest_sums_are_exact():
    """All codes at 127 against all ones: pairs of products in int16 would saturate, float32 would round above 2**24."""
    codes, ternary = torch.full((2, 6912), 127, dtype=torch.int8), torch.ones(3, 6912, dtype=torch.int8)
    for backend, weight in ((Backend.INT8, ternary), (Backend.REFERENCE, ternary.float())):
        assert bool((ternary_product(codes, weight, backend) == 127 * 6912).all())
        assert bool((ternary_product(-codes, weight, backend) == -127 * 6912).all())


def test_a_row_with_any_stride_is_read_right():
    codes, ternary = operands(4, 24, 128)
    assert torch.equal(ternary_product(codes.t().contiguous().t()[1:2], ternary, Backend.INT8), exact(codes[1:2], ternary))
    wide = torch.zeros(1, 256, dtype=torch.int8)
    wide[:, ::2] = codes[:1]
    assert torch.equal(ternary_product(wide[:, ::2], ternary, Backend.INT8), exact(codes[:1], ternary))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_op_applies_the_scales_in_one_order(shape):
    codes, ternary = operands(*shape)
    g = torch.Generator().manual_seed(2)
    s, alpha = torch.rand(shape[0], 1, generator=g), torch.rand(shape[1], generator=g)
    packed = pack_ternary(ternary)
    assert torch.equal(reference(Codes(codes, s), packed, alpha), exact(codes, ternary) * s * alpha)
    assert torch.equal(reference(Codes(codes, s), packed, alpha[0]), exact(codes, ternary) * s * alpha[0])
    product = exact(codes, ternary)
    assert apply_scales(product, s, alpha) is product

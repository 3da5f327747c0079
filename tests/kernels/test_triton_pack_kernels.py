"""The packing kernels write the bytes of the torch path: every width, odd rows, strides, ties, garbage in the output."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, packing
from kernels.pack_kernels import WIDTHS, launch_pack, pack, quantize_pack, row_codes, unpack

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1), (3, 7), (2, 3, 64), (5, 129), (2, 1200)]


def codes_of(shape, bits, seed=0):
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bytes_and_back(shape, bits, device):
    codes = codes_of(shape, bits)
    packed = pack(codes.to(device), bits, backend=Backend.TRITON)
    assert torch.equal(packed.cpu(), packing.pack_reference(codes, bits))
    assert torch.equal(unpack(packed, bits, shape[-1], backend=Backend.TRITON).cpu(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_quantising_gives_the_reference_s_codes(bits, device):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 70, generator=g) * 4
    scale = torch.rand(70, generator=g) + 0.05
    zero = torch.randint(-3, 2**bits + 3, (70,), generator=g)
    scale[::3] = 0.5
    x[0] = torch.arange(70) * 0.25 - 9  # ties wherever the scale is one half
    x[1] = 0.0
    x[2] *= 1e9
    packed = quantize_pack(x.to(device), scale.to(device), zero.to(device), bits=bits, backend=Backend.TRITON)
    assert torch.equal(packed.cpu(), quantize_pack(x, scale, zero, bits=bits, backend=Backend.REFERENCE))
    one = quantize_pack(
        x.to(device), torch.tensor(0.5, device=device), torch.tensor(1, device=device), bits=bits, backend=Backend.TRITON
    )
    assert torch.equal(one.cpu(), quantize_pack(x, torch.tensor(0.5), torch.tensor(1), bits=bits))


def test_strided_rows_and_a_bfloat16_input(device):
    x = torch.randn(33, 12, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    scale, zero = torch.tensor(0.25), torch.tensor(8)
    for view in (x.T, x[:, :10], x[::2]):
        packed = quantize_pack(view.to(device), scale.to(device), zero.to(device), bits=4, backend=Backend.TRITON)
        assert torch.equal(packed.cpu(), quantize_pack(view, scale, zero, bits=4, backend=Backend.REFERENCE))


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_go_into_their_slots_and_nowhere_else(bits, device):
    g = torch.Generator().manual_seed(3)
    states = torch.randn(2, 3, 5, 20, generator=g).transpose(1, 2)  # [A, B, T, K] = [2, 5, 3, 20], not contiguous
    states[0, 0, 0] = 0.0
    slots = torch.full((2, 5, 8, packing.packed_width(20, bits)), 0xAB, dtype=torch.uint8, device=device)
    scale = torch.full((2, 5, 8, 1), float("nan"), dtype=torch.float16, device=device)
    before = slots.clone().cpu()
    launch_pack(states.to(device), slots, bits=bits, row_scale=scale, slot=torch.tensor([4], dtype=torch.int32, device=device))
    codes, expected = row_codes(states, bits)
    assert torch.equal(slots[:, :, 4:7].cpu(), packing.pack_reference(codes, bits))
    assert torch.equal(scale[:, :, 4:7].cpu(), expected)
    before[:, :, 4:7] = slots[:, :, 4:7].cpu()
    assert torch.equal(slots.cpu(), before) and bool(scale[:, :, :4].isnan().all()) and bool(scale[:, :, 7:].isnan().all())


def test_empty_rows_and_other_widths(device):
    assert pack(torch.zeros(0, 5, dtype=torch.uint8, device=device), 4, backend=Backend.TRITON).shape == (0, 3)
    assert unpack(torch.zeros(0, 3, dtype=torch.uint8, device=device), 4, 5, backend=Backend.TRITON).shape == (0, 5)
    with pytest.raises(ValueError, match="5 bits have no kernel"):
        pack(codes_of((2, 4), 5), 5, backend=Backend.TRITON)
    assert torch.equal(pack(codes_of((2, 4), 5), 5), packing.pack(codes_of((2, 4), 5), 5))

"""The packing kernels write the bytes of the torch path: every width, odd rows, strides, ties, garbage in the output."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, pack, packed_width, quantize, quantize_rows, unpack
from kernels.packing import layout
from kernels.packing.kernel import launch_pack

pytestmark = pytest.mark.gpu
WIDTHS = range(1, 9)
SHAPES = [(1, 1), (3, 7), (2, 3, 64), (5, 129), (2, 1200)]


def codes_of(shape, bits, seed=0):
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bytes_and_back(shape, bits, device):
    codes = codes_of(shape, bits)
    packed = pack(codes.to(device), bits, backend=Backend.TRITON)
    assert torch.equal(packed.cpu(), layout.pack(codes, bits))
    assert torch.equal(unpack(packed, bits, shape[-1], backend=Backend.TRITON).cpu(), codes)


def packed_by_kernel(x, scale, zero, bits, device):
    """x [R, K] quantised and packed by the kernel with scale and zero point [K]."""
    out = torch.full((len(x), packed_width(x.shape[1], bits)), 0xAB, dtype=torch.uint8, device=device)
    wide = [t.to(torch.float32).expand(x.shape[1]).contiguous().to(device)[None] for t in (scale, zero)]
    launch_pack(x[None, None], out[None, None], bits=bits, scale=wide[0], zero_point=wide[1])
    return out.cpu()


def packed_by_steps(x, scale, zero, bits):
    codes = quantize(x.to(torch.float32), scale, zero.to(torch.float32), 0, 2**bits - 1)
    return layout.pack(codes.to(torch.uint8), bits)


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
    assert torch.equal(packed_by_kernel(x.to(device), scale, zero, bits, device), packed_by_steps(x, scale, zero, bits))


def test_strided_rows_and_a_bfloat16_input(device):
    x = torch.randn(33, 12, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    scale, zero = torch.tensor(0.25), torch.tensor(8)
    for view in (x[:, :10], x[::2], x[5:]):
        assert torch.equal(packed_by_kernel(view.to(device), scale, zero, 4, device), packed_by_steps(view, scale, zero, 4))


def test_rows_further_apart_than_32_bits_count(device):
    """A row's place is a product of two 32-bit numbers. The memory between the rows is never touched."""
    step = 2**30 + 64
    x = torch.empty(2 * step + 64, dtype=torch.uint8, device=device).as_strided((1, 1, 3, 64), (0, 0, step, 1))
    x.copy_(codes_of((1, 1, 3, 64), 4))
    out = torch.empty(1, 1, 3, 32, dtype=torch.uint8, device=device)
    launch_pack(x, out, bits=4)
    assert torch.equal(out.cpu(), layout.pack(codes_of((1, 1, 3, 64), 4), 4))


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_rows_go_into_their_slots_and_nowhere_else(bits, device):
    g = torch.Generator().manual_seed(3)
    states = torch.randn(2, 3, 5, 20, generator=g).transpose(1, 2)  # [A, B, T, K] = [2, 5, 3, 20], not contiguous
    states[0, 0, 0] = 0.0
    slots = torch.full((2, 5, 8, packed_width(20, bits)), 0xAB, dtype=torch.uint8, device=device)
    scale = torch.full((2, 5, 8, 1), float("nan"), dtype=torch.float16, device=device)
    before = slots.clone().cpu()
    launch_pack(states.to(device), slots, bits=bits, row_scale=scale, slot=torch.tensor([4], dtype=torch.int32, device=device))
    codes, expected = quantize_rows(states, bits)
    assert torch.equal(slots[:, :, 4:7].cpu(), layout.pack(codes, bits))
    assert torch.equal(scale[:, :, 4:7].cpu(), expected)
    before[:, :, 4:7] = slots[:, :, 4:7].cpu()
    assert torch.equal(slots.cpu(), before) and bool(scale[:, :, :4].isnan().all()) and bool(scale[:, :, 7:].isnan().all())


def test_empty_rows_and_unknown_widths(device):
    assert pack(torch.zeros(0, 5, dtype=torch.uint8, device=device), 4, backend=Backend.TRITON).shape == (0, 3)
    assert unpack(torch.zeros(0, 3, dtype=torch.uint8, device=device), 4, 5, backend=Backend.TRITON).shape == (0, 5)
    with pytest.raises(ValueError, match="9-bit codes cannot be packed"):
        pack(codes_of((2, 4), 5), 9, backend=Backend.TRITON)

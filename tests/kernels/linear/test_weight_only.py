"""The weight-only kernel against float64 on the stored codes: odd sizes, clusters of one column, strides, every width of code."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, pack
from kernels.linear.weight_only import _pieces, unsupported_reason, weight_only_linear

pytestmark = pytest.mark.gpu

CASES = {
    "one cluster": (3, 70, 258, 4, (0, 258)),
    "odd width": (1, 5, 33, 4, (0, 33)),
    "clusters anywhere": (5, 65, 340, 4, (0, 1, 130, 131, 300, 340)),
    "one column clusters": (2, 9, 8, 4, tuple(range(9))),
    "three bits": (4, 66, 296, 3, (0, 296)),
    "three bits, clusters": (2, 3, 88, 3, (0, 1, 40, 87, 88)),
    "two bits": (2, 17, 61, 2, (0, 30, 61)),
    "eight bits": (2, 17, 130, 8, (0, 7, 130)),
    "prefill": (35, 130, 140, 4, (0, 64, 140)),
}


def layer(rows, outputs, width, bits, offsets, seed=0):
    g = torch.Generator().manual_seed(seed)
    clusters = len(offsets) - 1
    codes = torch.randint(0, 2**bits, (outputs, width), generator=g).to(torch.uint8)
    scale = torch.rand(outputs, clusters, generator=g) / 2**bits + 0.01
    zero = torch.randint(-(2**bits), 2**bits, (outputs, clusters), generator=g).to(torch.int16)
    run = torch.repeat_interleave(torch.arange(clusters), torch.tensor(offsets).diff())
    exact = scale.double()[:, run] * (codes.double() - 2 ** (bits - 1) - zero.double()[:, run])
    x = torch.randn(rows, width, generator=g)
    return x, pack(codes, bits), scale, zero, torch.randn(outputs, generator=g), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_float64(case, dtype, device):
    rows, outputs, width, bits, offsets = CASES[case]
    x, packed, scale, zero, bias, weight = layer(rows, outputs, width, bits, offsets)
    x = x.to(dtype)
    y = weight_only_linear(
        x.to(device), packed.to(device), scale.to(device), zero.to(device), bits=bits, offsets=offsets, bias=bias.to(device),
        backend=Backend.TRITON,
    )  # fmt: skip
    expected = x.double() @ weight.T + bias.double()
    assert y.dtype is dtype and y.shape == expected.shape
    bound = 2e-5 if dtype is torch.float32 else 8e-3  # measured 3e-6; one unit of bfloat16, which the interpreter truncates
    assert (y.cpu().double() - expected).abs().max() <= bound * expected.abs().max()


def test_strides_and_zeros(device):
    x, packed, scale, zero, _, weight = layer(4, 20, 64, 4, (0, 10, 64))
    wide = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    tensors = [t.to(device) for t in (packed, scale, zero)]
    y = weight_only_linear(wide.to(device)[:, ::2].T, *tensors, bits=4, offsets=(0, 10, 64), backend=Backend.TRITON)
    expected = wide[:, ::2].T.double() @ weight.T
    assert (y.cpu() - expected).abs().max() < 1e-4
    y = weight_only_linear(torch.zeros(2, 64, device=device), *tensors, bits=4, offsets=(0, 10, 64), backend=Backend.TRITON)
    assert torch.equal(y.cpu(), torch.zeros(2, 20))


def test_the_reference_equals_float64():
    rows, outputs, width, bits, offsets = CASES["clusters anywhere"]
    x, packed, scale, zero, bias, weight = layer(rows, outputs, width, bits, offsets)
    y = weight_only_linear(x, packed, scale, zero, bits=bits, offsets=offsets, bias=bias, backend=Backend.REFERENCE)
    expected = x.double() @ weight.T + bias.double()
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_reference_asks_the_device_for_nothing(monkeypatch):
    """On a GPU a length that is not known, or a table that is made anew, would wait for it in every layer."""
    case = "clusters anywhere"
    rows, outputs, width, bits, offsets = CASES[case]
    x, packed, scale, zero, _, weight = layer(rows, outputs, width, bits, offsets)
    weight_only_linear(x, packed, scale, zero, bits=bits, offsets=offsets, backend=Backend.REFERENCE)
    original = torch.Tensor.repeat_interleave

    def known(tensor, lengths, dim=None, *, output_size=None):
        assert output_size == width
        return original(tensor, lengths, dim=dim, output_size=output_size)

    monkeypatch.setattr(torch.Tensor, "repeat_interleave", known)
    monkeypatch.setattr(torch, "tensor", None)
    y = weight_only_linear(x, packed, scale, zero, bits=bits, offsets=offsets, backend=Backend.REFERENCE)
    assert torch.allclose(y.double(), x.double() @ weight.T, atol=1e-4)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", None)
    one = weight_only_linear(x, packed, scale[:, :1], zero[:, :1], bits=bits, offsets=(0, width), backend=Backend.REFERENCE)
    assert one.shape == y.shape


@pytest.mark.parametrize(
    ("offsets", "parts", "block"), [((0, 5, 70, 71, 200), 2, 32), (tuple(range(17)), 8, 32), ((0, 8, 64), 4, 8)]
)
def test_pieces_cover_every_column_once_with_its_cluster(offsets, parts, block):
    width = offsets[-1]
    size = -(-width // parts)
    seen = [None] * width
    for number, lo, hi, *clusters in _pieces(offsets, parts, block, torch.device("cpu")).tolist():
        assert number * block <= lo < hi <= (number + 1) * block
        for part, cluster in enumerate(clusters):
            for k in range(part * size + lo, min(part * size + hi, width)):
                assert seen[k] is None and offsets[cluster] <= k < offsets[cluster + 1]
                seen[k] = cluster
    assert None not in seen


def test_what_the_kernel_does_not_take_is_said():
    x = torch.zeros(1, 12)
    assert "multiple of 8" in unsupported_reason(3, 12) and "5-bit" in unsupported_reason(5, 12)
    assert unsupported_reason(4, 13) is None
    packed, scale = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="5-bit weights have no kernel"):
        weight_only_linear(x, packed, scale, scale.int(), bits=5, offsets=(0, 12), backend=Backend.TRITON)
    with pytest.raises(ValueError, match="float64 are not taken"):
        weight_only_linear(x.double(), packed, scale, scale.int(), bits=5, offsets=(0, 12), backend=Backend.TRITON)
    with pytest.raises(ValueError, match="do not fit"):
        weight_only_linear(torch.zeros(1, 13), packed, scale, scale.int(), bits=5, offsets=(0, 12))
    with pytest.raises(ValueError, match="no int8 path"):
        weight_only_linear(x, packed, scale, scale.int(), bits=5, offsets=(0, 12), backend=Backend.INT8)

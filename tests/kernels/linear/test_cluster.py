"""The cluster kernel against float64: block sizes, one cluster, zero points, odd row counts, strides, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, pack
from kernels.linear.cluster import block_size, cluster_linear, unsupported_reason

pytestmark = pytest.mark.gpu

CASES = {
    "one cluster": (5, 70, (0, 256)),
    "one cluster of 32": (1, 3, (0, 64)),
    "clusters of 128": (17, 130, (0, 128, 512)),
    "clusters of 32": (3, 65, (0, 32, 96, 128)),
    "every block its own": (2, 64, (0, 64, 128, 192, 256)),
    "shared by programs, odd shares": (3, 70, (0, 32, 96, 448)),
}


def layer(rows, outputs, offsets, bits=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    width, clusters, top = offsets[-1], len(offsets) - 1, 2 ** (bits - 1)
    codes = torch.randint(-top, top, (rows, width), generator=g).to(torch.int8)
    weight = torch.randint(-8, 8, (outputs, width), generator=g)
    scale = torch.rand(clusters, outputs, generator=g) + 0.1
    zero = scale * torch.randint(-5, 6, (clusters, outputs), generator=g)
    return codes, weight, scale, zero, torch.randn(outputs, generator=g)


def exact(codes, weight, scale, zero, bias, offsets):
    run = torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor(offsets).diff())
    y = codes.double() @ (weight.double() * scale.double()[run].T).T
    if zero is not None:
        y -= codes.double() @ zero.double()[run]
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("zeros", [True, False], ids=["zero points", "symmetric"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_float64(case, bits, zeros, device):
    rows, outputs, offsets = CASES[case]
    codes, weight, scale, zero, bias = layer(rows, outputs, offsets, bits)
    zero, bias = (zero, bias) if zeros else (None, None)
    tensors = [None if t is None else t.to(device) for t in (codes, pack((weight + 8).to(torch.uint8), 4), scale, zero, bias)]
    expected = exact(codes, weight, scale, zero, bias, offsets)
    for backend in (Backend.TRITON, Backend.REFERENCE):
        y = cluster_linear(*tensors, offsets=offsets, backend=backend)
        assert torch.equal(y, cluster_linear(*tensors, offsets=offsets, backend=backend)), "the same bits every time"
        assert (y.cpu() - expected).abs().max() <= 1e-6 * expected.abs().max()  # measured 1e-7


def test_one_cluster_is_exact_up_to_its_scale_at_extreme_codes(device):
    codes, weight = torch.full((2, 1024), -128, dtype=torch.int8), torch.full((3, 1024), -8)
    tensors = [t.to(device) for t in (codes, pack((weight + 8).to(torch.uint8), 4), torch.ones(1, 3))]
    y = cluster_linear(*tensors, None, None, offsets=(0, 1024), backend=Backend.TRITON)
    assert torch.equal(y.cpu(), torch.full((2, 3), 128.0 * 8 * 1024))


def test_strided_codes(device):
    codes, weight, scale, zero, bias = layer(4, 9, (0, 32, 64))
    tensors = [t.to(device) for t in (pack((weight + 8).to(torch.uint8), 4), scale, zero, bias)]
    strided = codes.T.contiguous().to(device).T
    y = cluster_linear(strided, *tensors, offsets=(0, 32, 64), backend=Backend.TRITON)
    assert torch.equal(y, cluster_linear(codes.to(device), *tensors, offsets=(0, 32, 64), backend=Backend.TRITON))


@pytest.mark.parametrize(("offsets", "size"), [
    ((0, 4096), 128), ((0, 128, 512), 128), ((0, 64, 256), 64), ((0, 576), 32), ((0, 32, 576), 32), ((0, 31, 64), None),
    ((0, 96), None),
])  # fmt: skip
def test_clusters_are_taken_in_whole_blocks(offsets, size):
    assert block_size(offsets) == size and (unsupported_reason(offsets) is None) == (size is not None)


def test_other_clusters_run_the_reference_and_are_refused_by_name():
    codes, weight, scale, zero, bias = layer(2, 5, (0, 31, 64))
    packed = pack((weight + 8).to(torch.uint8), 4)
    y = cluster_linear(codes, packed, scale, zero, bias, offsets=(0, 31, 64))
    expected = exact(codes, weight, scale, zero, bias, (0, 31, 64))
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    with pytest.raises(ValueError, match="multiples of 32"):
        cluster_linear(codes, packed, scale, zero, bias, offsets=(0, 31, 64), backend=Backend.TRITON)
    with pytest.raises(ValueError, match="do not fit"):
        cluster_linear(codes, packed, scale, zero, bias, offsets=(0, 31, 66))

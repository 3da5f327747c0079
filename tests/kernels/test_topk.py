"""Top-K and INT8: exactly k kept, ties by index, the same bits as a stable sort."""

from __future__ import annotations

import pytest
import torch

from core.quant.dynamic import topk_int8
from kernels import Backend
from kernels.topk import topk_quant

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("keep", [0.5, 0.01, 1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_as_a_sort(dtype, keep, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 333, generator=g)
    x[0] = torch.randint(-3, 4, (333,), generator=g)  # many ties
    x[1] = 0.0
    x[2] = -2.0
    x[3, 5:] = 0.0
    x[4] *= 1e-30
    x = x.to(dtype)
    found, same = topk_quant(x.to(device), keep=keep, backend=Backend.TRITON), topk_quant(x, keep=keep, backend=Backend.REFERENCE)
    codes, scale = found.codes.cpu(), found.scale.cpu()
    assert torch.equal(codes, same.codes) and torch.equal(scale, same.scale)
    assert torch.equal(found.code_sum.cpu(), same.code_sum) and torch.equal(same.code_sum, same.codes.sum(1, dtype=torch.int32))
    expected = topk_int8(x.float(), keep=keep)
    assert torch.equal(codes.float(), expected[0] + 0.0) and torch.equal(scale, expected[1])
    assert torch.equal(codes[2], torch.where(torch.arange(333) < max(1, int(333 * keep)), -127, 0).to(torch.int8))


def test_one_column_strides_and_shares(device):
    assert topk_quant(torch.tensor([[-3.0]], device=device), backend=Backend.TRITON).codes.tolist() == [[-127]]
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(1))
    got = topk_quant(x.to(device).T, backend=Backend.TRITON).codes
    assert torch.equal(got.cpu(), topk_quant(x.T).codes) and int((got != 0).sum(1).max()) <= 20
    with pytest.raises(ValueError, match="cannot be kept"):
        topk_quant(x, keep=0.0)

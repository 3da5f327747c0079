"""Skipping channels changes no bit: all live, none live, one live, two tokens, odd widths."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, Codes
from kernels.ternary import pack_ternary
from kernels.ternary.sparse import MAX_TOKENS, compact, gated_up, sparse_down

pytestmark = pytest.mark.gpu


def layer(tokens, rows, width, live, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (tokens, width), generator=g).to(torch.int8)
    ternary = torch.randint(-1, 2, (rows, width), generator=g).to(torch.int8)
    gate = torch.rand(tokens, rows, generator=g) + 0.1
    gate *= torch.rand(tokens, rows, generator=g) < live
    return codes, ternary, gate, torch.rand(tokens, 1, generator=g), torch.rand(rows, generator=g)


@pytest.mark.parametrize("live", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 90, 64), (2, 33, 1031), (1, 1, 1), (MAX_TOKENS + 1, 20, 40)], ids=str)
def test_gate_first_gives_the_bits_of_the_dense_layer(shape, live, device):
    codes, ternary, gate, s, alpha = layer(*shape, live)
    c, scale, sums = (t.to(device) for t in (codes, s, codes.sum(1, dtype=torch.int32)))
    weights = [t.to(device) for t in (pack_ternary(ternary), gate, alpha)]
    y = gated_up(Codes(c, scale), *weights, backend=Backend.TRITON)
    exact = (codes.long() @ ternary.long().T).float()
    assert torch.equal(y.cpu(), exact * s * alpha * gate)
    y = gated_up(Codes(c, scale, sums), *weights, backend=Backend.TRITON)
    assert torch.equal(y.cpu(), exact * s * alpha * gate), "sums that the caller has"


@pytest.mark.parametrize("live", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 90, 64), (2, 33, 150), (1, 1, 1), (2, 1030, 40), (MAX_TOKENS + 1, 20, 40)], ids=str)
def test_sparse_down_gives_the_bits_of_the_dense_layer(shape, live, device):
    codes, ternary, _, s, alpha = layer(*shape, 1.0)
    codes *= torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < live
    weights = [t.to(device) for t in (pack_ternary(ternary), pack_ternary(ternary.T.contiguous()), alpha)]
    c, scale, sums = (t.to(device) for t in (codes, s, codes.sum(1, dtype=torch.int32)))
    y = sparse_down(Codes(c, scale), *weights, backend=Backend.TRITON)
    assert torch.equal(y.cpu(), (codes.long() @ ternary.long().T).float() * s * alpha)
    given = sparse_down(Codes(c, scale, sums), *weights, backend=Backend.TRITON)
    assert torch.equal(given, y), "sums that the caller has"
    assert torch.equal(sparse_down(Codes(codes, s), *(t.cpu() for t in weights)), y.cpu())


@pytest.mark.parametrize("width", [1, 100, 4096, 5001])
def test_compaction_is_the_ascending_union(width, device):
    x = (torch.rand(2, width, generator=torch.Generator().manual_seed(2)) < 0.2).float()
    x[:, -1] = -1.0
    for backend in (Backend.TRITON, Backend.REFERENCE):
        index, count = compact(x.to(device), backend=backend)
        assert torch.equal(index[: int(count)].cpu().long(), x.any(0).nonzero().flatten())
    none = compact(torch.zeros(1, width, dtype=torch.int8, device=device), backend=Backend.TRITON)[1]
    assert int(none) == 0

"""Rotation, reorder and the two stores give the reference's bits."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend
from kernels.rope import HeadGrid, rope_store, rotated

pytestmark = pytest.mark.gpu


def heads(batch=2, count=4, tokens=3, dim=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, count, dim, generator=g).transpose(1, 2)  # as the projection leaves it
    angle = torch.rand(batch, tokens, dim // 2, generator=g).repeat(1, 1, 2) * 6
    order = torch.stack([torch.randperm(dim, generator=g) for _ in range(count // 2)]).to(torch.int32)
    scale = torch.rand(count, dim, generator=g) * 0.3 + 0.05
    return x, angle.cos(), angle.sin(), order, scale, torch.randint(-2, 18, (count, dim), generator=g).float()


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "plain"])
@pytest.mark.parametrize("shape", [(2, 4, 3, 20), (1, 2, 1, 2), (1, 6, 40, 64)], ids=str)
def test_the_float_store(shape, ordered, device):
    x, cos, sin, order, *_ = heads(*shape)
    order = order if ordered else None
    y = rope_store(
        x.to(device), cos.to(device), sin.to(device), order=None if order is None else order.to(device), scaling=0.25,
        backend=Backend.TRITON,
    )  # fmt: skip
    assert torch.equal(y.cpu(), rotated(x, cos, sin, order, 0.25))
    assert torch.equal(y.cpu(), rope_store(x, cos, sin, order=order, scaling=0.25))


def test_one_set_of_angles_and_bfloat16(device):
    x, cos, sin, order, *_ = heads()
    x = x.to(torch.bfloat16)
    y = rope_store(x.to(device), cos[:1].to(device), sin[:1].to(device), order=order.to(device), backend=Backend.TRITON)
    expected = rotated(x, cos[:1], sin[:1], order, 1.0)
    assert y.dtype is torch.bfloat16 and (y.cpu().float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid(bits, device):
    x, cos, sin, order, scale, zero = heads()
    x[0, 0, 0] = 0.0
    grids = [HeadGrid(bits, scale.to(d), zero.to(d)) for d in ("cpu", device)]
    there = [t.to(device) for t in (x, cos, sin)]
    y = rope_store(*there, order=order.to(device), grid=grids[1], backend=Backend.TRITON)
    assert torch.equal(y.cpu(), rope_store(x, cos, sin, order=order, grid=grids[0]))


def test_an_odd_head_is_refused():
    x, cos, sin, *_ = heads()
    with pytest.raises(ValueError, match="even number"):
        rope_store(x[..., :5], cos[..., :5], sin[..., :5])

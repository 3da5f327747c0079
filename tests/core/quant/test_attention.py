"""Attention against softmax written out in float64, the probabilities rounded to the 8-bit grid of the published code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.quant.attention import QUERY_BLOCK, attend
from tests.core.tools import poisoned_memory
from tests.kernels.fake_cuda import on_second_gpu

BITS = (2, 4, 8, 16)


def states(
    tokens: int,
    keys: int,
    *,
    batch: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, tokens, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return tuple(torch.randn(s, generator=g).to(dtype) for s in shapes)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, bits: int) -> tuple[Tensor, Tensor]:
    """[B, T, H * E] in float64 and, per element, how much rounding may differ where p was within 1e-4 steps of a tie."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double() * scaling, k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3)
    if mask is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~visible, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask
    p = scores.softmax(-1)
    slack = torch.zeros_like(p)
    if bits < 16:
        steps = 2**bits - 1
        tie = (p * steps - (p * steps).floor() - 0.5).abs() < 1e-4
        p, slack = (p * steps).round() / steps, tie.double() / steps
    out, slack = p @ v, slack @ v.abs()
    return tuple(t.transpose(1, 2).flatten(2) for t in (out, slack))


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bits: int, *, scaling: float = 0.3) -> None:
    expected, slack = eager(q, k, v, mask, scaling, bits)
    found = attend(q, k, v, mask, scaling=scaling, softmax_bits=bits)
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= 3e-6 + slack).all()  # measured: 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", (1, 2, 17, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 5))
def test_causal_prefill(tokens, bits):
    check(*states(tokens, tokens), None, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens, past", [(1, 1), (1, 40), (3, 20), (QUERY_BLOCK + 3, 7), (5, 300)])
def test_decoding_with_a_past(tokens, past, bits):
    check(*states(tokens, past + tokens), None, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (9, 3), (1, 1)])
def test_grouped_heads(heads, kv_heads, bits):
    check(*states(13, 13, heads=heads, kv_heads=kv_heads), None, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ("bool", "float"))
@pytest.mark.parametrize("tokens, keys", [(1, 9), (20, 20), (QUERY_BLOCK + 9, QUERY_BLOCK + 20)])
@pytest.mark.parametrize("batch_of_mask", (1, 2))
def test_masks(tokens, keys, batch_of_mask, kind, bits):
    visible = torch.rand(batch_of_mask, 1, tokens, keys, generator=torch.Generator().manual_seed(3)) < 0.6
    visible[..., 0] = True
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    check(*states(tokens, keys), mask, bits)


@pytest.mark.parametrize("bits", BITS)
def test_a_sliding_window_mask(bits):
    distance = torch.arange(150)[:, None] - torch.arange(150)[None]
    check(*states(150, 150), ((distance >= 0) & (distance < 20))[None, None], bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_causal_mask_and_none_are_the_same(bits):
    q, k, v = states(140, 150)
    mask = torch.ones(140, 150, dtype=torch.bool).tril(10)[None, None]
    a, b = (attend(q, k, v, m, scaling=0.3, softmax_bits=bits) for m in (None, mask))
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_that_sees_nothing_stays_finite(bits):
    """Left padding makes such rows; their output is never read, but a NaN would spread through the next layers."""
    q, k, v = states(6, 6, batch=1)
    visible = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    visible[..., :2] = False
    assert torch.isfinite(attend(q, k, v, visible, scaling=0.3, softmax_bits=bits)).all()


def test_probabilities_are_on_the_grid():
    """One-hot values read P itself: 255 p is an integer, in particular 0 and 1 stay themselves."""
    q, k, _ = states(20, 20, batch=1, heads=2, kv_heads=2, dim=20)
    p = attend(q * 20, k, torch.eye(20).expand(1, 2, 20, 20), None, scaling=1.0, softmax_bits=8).unflatten(2, (2, 20)) * 255
    assert (p - p.round()).abs().max() < 1e-4 and (p.round() == 255).any() and (p.round() == 0).any()
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    assert (p.transpose(1, 2)[:, :, future] == 0).all()


@pytest.mark.parametrize("bits", (8, 16))
def test_inputs_are_not_changed_and_strides_do_not_matter(bits):
    q, k, v = states(140, 140)
    kept = [t.clone() for t in (q, k, v)]
    expected = attend(q, k, v, None, scaling=0.3, softmax_bits=bits)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.allclose(attend(*strided, None, scaling=0.3, softmax_bits=bits), expected, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


def test_poisoned_memory_changes_nothing():
    q, k, v = states(150, 160)
    plain = attend(q, k, v, None, scaling=0.3, softmax_bits=8)
    with poisoned_memory():
        poisoned = attend(q, k, v, None, scaling=0.3, softmax_bits=8)
    assert torch.equal(plain, poisoned)


@pytest.mark.parametrize("bits", (8, 16))
def test_double_stays_double(bits):
    q, k, v = states(9, 9, dtype=torch.float64)
    found = attend(q, k, v, None, scaling=0.3, softmax_bits=bits)
    assert found.dtype == torch.float64 and float((found - eager(q, k, v, None, 0.3, bits)[0]).abs().max()) < 1e-12


def test_on_a_gpu_grouped_heads_are_repeated(monkeypatch):
    """There no fused attention takes float32 and grouped heads at once."""
    q, k, v = states(9, 9)
    original, seen = torch.nn.functional.scaled_dot_product_attention, []

    def attention(q, k, v, **options):
        seen.append((k.shape[1], options["enable_gqa"]))
        return original(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    there = attend(*(on_second_gpu(t) for t in (q, k, v)), None, scaling=0.3)
    assert torch.equal(there, attend(q, k, v, None, scaling=0.3))
    assert seen == [(6, False), (2, True)]

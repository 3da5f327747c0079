"""What integer products and reordering rest on, as arithmetic in float64 and int64: what may be folded, and what may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("offsets", [(0, 40), (0, 1, 7, 8, 40), tuple(range(41))], ids=("one", "uneven", "per column"))
@pytest.mark.parametrize("zero", (0, 100, 10_000))
def test_integer_gemm_with_folded_zero_points(offsets, zero):
    """y = Σ_c s_c sw (Σ qa qw - zw Σ qa) + b',  b' = b - Σ_c s_c z_c Σ Ŵ, against (s(q - z)) Ŵᵀ + b."""
    g, m, k, n, clusters = generator(zero), 5, 40, 9, len(offsets) - 1
    qa, qw = torch.randint(-128, 128, (m, k), generator=g), torch.randint(-8, 8, (n, k), generator=g)
    s, sw = torch.rand(clusters, generator=g).double() + 0.1, torch.rand(n, clusters, generator=g).double() + 0.1
    z = torch.randint(-zero, zero + 1, (clusters,), generator=g)
    zw = torch.randint(-20, 20, (n, clusters), generator=g)
    bias = torch.randn(n, generator=g).double()
    run = torch.repeat_interleave(torch.arange(clusters), torch.tensor(offsets).diff())
    w_hat = sw[:, run] * (qw - zw[:, run])
    expected = (s[run] * (qa - z[run])) @ w_hat.t() + bias
    y = bias - sum(s[c] * z[c] * w_hat[:, offsets[c] : offsets[c + 1]].sum(1) for c in range(clusters))
    for c in range(clusters):
        part = slice(offsets[c], offsets[c + 1])
        accumulator = qa[:, part] @ qw[:, part].t()  # int64, exact
        y = y + s[c] * sw[:, c] * (accumulator - zw[:, c] * qa[:, part].sum(1, keepdim=True))
    assert relative(y, expected) < 1e-11  # measured: at most 2e-13, at zero points of 10000


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("hte,hse->hts", q, k) * q.shape[-1] ** -0.5
    causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    p = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    return torch.einsum("hts,hse->hte", p, v), p


class Head:
    """Two kv heads of 16 channels, three query heads each, per-channel static codes for keys and values."""

    groups, heads, dim, tokens, width = 3, 2, 16, 11, 96

    def __init__(self) -> None:
        g = generator(1)
        self.q = torch.randn(self.heads * self.groups, self.tokens, self.dim, generator=g).double()
        k, v = (torch.randn(self.heads, self.tokens, self.dim, generator=g).double() * 3 + 5 for _ in range(2))
        self.sk, self.sv = (torch.rand(self.heads, 1, self.dim, generator=g).double() + 0.2 for _ in range(2))
        self.zk, self.zv = (torch.randint(-20, 20, (self.heads, 1, self.dim), generator=g).double() for _ in range(2))
        self.qk, self.qv = (k / self.sk).round() + self.zk, (v / self.sv).round() + self.zv
        self.wo = torch.randn(50, self.heads * self.groups * self.dim, generator=g).double()
        self.bo = torch.randn(50, generator=g).double()

    def grouped(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.groups, dim=0)

    def project(self, mixed: Tensor, wo: Tensor, bo: Tensor) -> Tensor:
        return mixed.transpose(0, 1).flatten(1) @ wo.t() + bo

    def expected(self) -> Tensor:
        k, v = self.sk * (self.qk - self.zk), self.sv * (self.qv - self.zv)
        return self.project(attention(self.q, self.grouped(k), self.grouped(v))[0], self.wo, self.bo)

    def folded(self, *, scale_q: bool = True, fold_zero: bool = True) -> Tensor:
        """Attention on the integer codes themselves: s_K in q, z_K dropped, s_V in Wo's columns, z_V in its bias."""
        q = self.q * self.grouped(self.sk) if scale_q else self.q
        mixed, _ = attention(q, self.grouped(self.qk), self.grouped(self.qv))
        wo = self.wo * self.grouped(self.sv).flatten()
        bo = self.bo - wo @ self.grouped(self.zv).flatten() if fold_zero else self.bo
        return self.project(mixed, wo, bo)


def test_static_key_and_value_codes_fold_away():
    head = Head()
    assert relative(head.folded(), head.expected()) < 1e-12  # measured: 5e-15


@pytest.mark.parametrize("left_out", ("scale_q", "fold_zero"))
def test_the_fold_needs_each_of_its_parts(left_out):
    head = Head()
    assert relative(head.folded(**{left_out: False}), head.expected()) > 0.05


def test_the_key_zero_point_vanishes_in_softmax_whatever_it_is():
    head = Head()
    before = head.folded()
    head.qk = head.qk + torch.randint(-9, 9, head.zk.shape, generator=generator(3))  # constant over keys
    assert relative(head.folded(), before) < 1e-12


def test_a_value_zero_point_needs_probabilities_that_sum_to_one():
    """With P rounded to 8 bits ΣP is not 1: the fold must multiply z_V by ΣP (why the value codes are shifted back here)."""
    head = Head()
    _, p = attention(head.q * head.grouped(head.sk), head.grouped(head.qk), head.grouped(head.qv))
    p8 = (p * 255).round() / 255
    values, zeros = head.grouped(head.qv), head.grouped(head.zv)
    exact = torch.einsum("hts,hse->hte", p8, values - zeros)
    plain = torch.einsum("hts,hse->hte", p8, values)
    assert relative(plain - zeros, exact) > 1e-3
    assert relative(plain - p8.sum(-1, keepdim=True) * zeros, exact) < 1e-12

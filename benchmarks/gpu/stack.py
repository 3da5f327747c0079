"""A stack of decoder layers with random weights for `benchmarks.gpu`: packed for our kernels, or bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import kernels
from benchmarks.gpu.harness import Machine
from kernels.kv import PackedHeads

FULL = {"layers": 32, "hidden": 4096, "heads": 32, "kv": 8, "dim": 128, "ffn": 14336, "vocab": 128256}
SMALL = {"layers": 1, "hidden": 32, "heads": 2, "kv": 1, "dim": 16, "ffn": 64, "vocab": 64}


class Stack:
    """A model of equal layers for one decode step, always at the last slot of its cache.

    Attributes:
        bytes: of weights and cache that a step must read.
        peak: bytes allocated for it, filled in by the caller.
    """

    def __init__(self, m: Machine, *, batch: int, slots: int, packed: bool) -> None:
        self.m, self.packed, self.slots, self.peak = m, packed, slots, 0
        s = self.shape = FULL if m.cuda else SMALL
        width = (s["heads"] + 2 * s["kv"]) * s["dim"]
        sizes = ((width, s["hidden"]), (s["hidden"], s["heads"] * s["dim"]), (2 * s["ffn"], s["hidden"]), (s["hidden"], s["ffn"]))
        self.layers = [([self._weight(*size) for size in sizes], self._cache(batch)) for _ in range(s["layers"])]
        self.head, self.x = m.randn(s["vocab"], s["hidden"]), m.randn(batch, s["hidden"])
        self.gain = torch.ones(s["hidden"], device=m.device, dtype=m.dtype)
        self.cos, self.sin = (m.randn(1, 1, s["dim"], dtype=torch.float32) for _ in range(2))
        tensors = [t for weights, cache in self.layers for item in (*weights, *cache) for t in self._tensors(item)]
        self.bytes = sum(t.numel() * t.element_size() for t in (*tensors, self.head))

    def step(self) -> Tensor:
        """Compute the logits [B, V] of one token."""
        s, x = self.shape, self.x
        for (qkv, o, up, down), cache in self.layers:
            n1 = functional.rms_norm(x, (s["hidden"],), self.gain, 1e-5)
            mixed = self._attend(self._linear(n1, qkv), cache)
            x = x + self._linear(mixed, o)
            gate, rest = self._linear(functional.rms_norm(x, (s["hidden"],), self.gain, 1e-5), up).chunk(2, dim=-1)
            x = x + self._linear(functional.silu(gate) * rest, down)
        return functional.linear(x, self.head)

    def _weight(self, rows: int, width: int) -> tuple[Tensor, ...]:
        if not self.packed:
            return (self.m.randn(rows, width).mul_(width**-0.5),)
        scale = self.m.randn(rows, 1, dtype=torch.float16).abs().mul_(0.2 * width**-0.5)
        return self.m.randint(0, 256, rows, width // 2), scale, torch.zeros(rows, 1, dtype=torch.int8, device=self.m.device)

    def _cache(self, batch: int) -> tuple[PackedHeads, PackedHeads] | tuple[Tensor, Tensor]:
        kv, dim, m = self.shape["kv"], self.shape["dim"], self.m
        if not self.packed:
            return m.randn(batch, kv, self.slots, dim), m.randn(batch, kv, self.slots, dim)
        scale, zero = torch.full((kv, dim), 0.2, device=m.device), torch.full((kv, dim), 8.0, device=m.device)
        keys, values = (m.randint(0, 256, batch, kv, self.slots, dim // 2) for _ in range(2))
        return PackedHeads(keys, 4, dim, scale, zero), PackedHeads(values, 4, dim, scale, zero)

    def _linear(self, x: Tensor, weight: tuple[Tensor, ...]) -> Tensor:
        if not self.packed:
            return functional.linear(x, weight[0])
        return kernels.weight_only_linear(x, *weight, bits=4, offsets=(0, x.shape[1]), backend=self.m.backend)

    def _attend(self, qkv: Tensor, cache: tuple) -> Tensor:
        s, backend = self.shape, self.m.backend
        heads = qkv.view(len(qkv), 1, -1, s["dim"]).transpose(1, 2)  # [B, H + 2 Hkv, 1, E]
        q, k, v = heads.split((s["heads"], s["kv"], s["kv"]), dim=1)
        last = self.slots - 1
        if self.packed:
            q, k = (kernels.rope_store(t, self.cos, self.sin, backend=backend) for t in (q, k))
            for states, store in zip((k, v), cache, strict=True):
                kernels.kv_append(states, store, last, backend=backend)
            return kernels.decode_attention(q[:, :, 0], *cache, self.slots, scaling=s["dim"] ** -0.5, backend=backend).flatten(1)
        q, k = (self._rotated(t) for t in (q, k))
        cache[0][:, :, last:], cache[1][:, :, last:] = k, v
        return functional.scaled_dot_product_attention(q, *cache, enable_gqa=True)[:, :, 0].flatten(1)

    def _rotated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * self.cos + turned * self.sin).to(x.dtype)

    def _tensors(self, item: PackedHeads | Tensor) -> list[Tensor]:
        return [item.packed] if isinstance(item, PackedHeads) else list(item) if isinstance(item, tuple) else [item]

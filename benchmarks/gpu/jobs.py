"""The jobs of `benchmarks.gpu`: shapes, inputs, peers, limits; with small shapes where there is no GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

import kernels
from benchmarks.bench_gptq import column_loop
from benchmarks.gpu import peers
from benchmarks.gpu.harness import Job, Machine
from benchmarks.gpu.stack import Stack
from core.quant.affine import Grid
from core.quant.gptq import quantize_weight, round_to_nearest
from kernels import Backend, Codes, code_offset, dequantize, unpack
from kernels.codes import signed_codes
from kernels.kv import PackedHeads
from kernels.norm_quant import Norm
from kernels.ternary import pack_ternary


def norm_quant(m: Machine) -> Iterator[Job]:
    """Yield G1: RMSNorm, reorder and quantise, bfloat16 to bytes. 4-bit codes take a byte too: no product reads packed inputs."""
    rows, width = (16384, 4096) if m.cuda else (2, 64)
    n = m.copies(2 * rows * width)
    xs = [m.randn(rows, width) for _ in range(n)]
    order = torch.randperm(width, device=m.device)
    norm = Norm("rms", 1e-5, torch.ones(width, device=m.device), None, order.to(torch.int32))
    scale, zero = torch.full((width,), 0.05, device=m.device), torch.zeros(width, device=m.device)

    def call(backend: Backend) -> Callable[[int], Tensor]:
        return lambda i: kernels.norm_quantize(xs[i], norm, scale, zero, bits=8, backend=backend)[1].codes

    others = {"torch, eager": call(Backend.REFERENCE)}
    if m.cuda:
        compiled = torch.compile(lambda x: _eager_norm(x, norm, scale))
        others["torch.compile"] = lambda i: compiled(xs[i])
    yield Job(
        f"G1 norm + reorder + quantise {rows}×{width} to 8 bits", call(m.backend), others, n,
        lambda: call(Backend.REFERENCE)(0), rows * width * 3, target="≥ 75 % of copy",
        packages={"Liger, then quantise": functools.partial(peers.liger, xs, norm.weight, order, scale, norm.eps)},
    )  # fmt: skip


def _eager_norm(x: Tensor, norm: Norm, scale: Tensor) -> Tensor:
    y = x.float()
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.eps))[:, norm.order] * norm.weight
    return (y / scale).round().clamp(-128, 127).to(torch.int8)


def weight_only(m: Machine) -> Iterator[Job]:
    """Yield G2: 4-bit weights, bfloat16 inputs, few rows."""
    shapes = ((14336, 4096), (28672, 8192), (4096, 4096)) if m.cuda else ((32, 64),)
    for rows, width in shapes:
        n = m.copies(rows * width / 2)
        for clusters in (1, 32) if rows == shapes[0][0] else (1,):
            offsets = tuple(round(width * c / clusters) for c in range(clusters + 1))
            weights = [
                (m.randint(0, 256, rows, width // 2), m.randn(rows, clusters, dtype=torch.float16).abs() * 0.01,
                 m.randint(-2, 3, rows, clusters, dtype=torch.int8)) for _ in range(n)
            ]  # fmt: skip
            dense = [m.randn(rows, width) for _ in range(m.copies(2 * rows * width))]
            for tokens in (1, 2, 4, 8, 16) if m.cuda and clusters == 1 else (1,):
                x = m.randn(tokens, width)

                def ours(i: int, x: Tensor = x, o: tuple = offsets, w: list = weights) -> Tensor:
                    return kernels.weight_only_linear(x, *w[i], bits=4, offsets=o, backend=m.backend)

                def exact(x: Tensor = x, o: tuple = offsets, w: list = weights) -> Tensor:
                    packed, scale, zero = w[0]
                    lengths = torch.tensor(o, device=m.device).diff()
                    wide = [t.double().repeat_interleave(lengths, dim=1) for t in (scale, zero)]
                    return x.double() @ dequantize(unpack(packed, 4, o[-1]), wide[0], wide[1] + code_offset(4)).t()

                def cublas(i: int, x: Tensor = x, d: list = dense) -> Tensor:
                    return functional.linear(x, d[i % len(d)])

                yield Job(
                    f"G2 W4A16 {tokens}×{width}→{rows}, {clusters} cluster{'s' * (clusters > 1)}", ours,
                    {"cuBLAS bfloat16": cublas} | tinygemm(m, x, rows, n), n, exact,
                    rows * width / 2, target="≥ 2.3×",
                    packages={
                        "GemLite, g = 128": functools.partial(peers.gemlite, m, x, rows, n),
                        "bitsandbytes NF4": functools.partial(peers.bitsandbytes, m, x, rows, n),
                    },
                )  # fmt: skip


def tinygemm(m: Machine, x: Tensor, rows: int, copies: int) -> dict[str, Callable[[int], Tensor]]:
    """Make torch's own int4 product with groups of 128, where there is a GPU."""
    if not m.cuda:
        return {}
    width = x.shape[1]
    weights = [torch._convert_weight_to_int4pack(m.randint(0, 256, rows, width // 2), 8) for _ in range(copies)]
    scales = torch.ones(width // 128, rows, 2, dtype=torch.bfloat16, device=m.device)
    return {"torch int4 (tinygemm), g = 128": lambda i: torch._weight_int4pack_mm(x, weights[i], 128, scales)}


def cluster(m: Machine) -> Iterator[Job]:
    """Yield G3: 4-bit weights, int8 codes, clusters of whole blocks."""
    rows, width = (11008, 4096) if m.cuda else (32, 128)
    for tokens in (512, 2048, 8192) if m.cuda else (16,):
        codes, packed = m.randint(-128, 128, tokens, width, dtype=torch.int8), m.randint(0, 256, rows, width // 2)
        x, dense = m.randn(tokens, width), m.randn(rows, width)
        int8 = signed_codes(unpack(packed, 4, width), 4)
        for clusters in (1, 8, 32) if m.cuda else (1, 2):
            offsets = tuple(width * c // clusters for c in range(clusters + 1))
            scale = m.randn(clusters, rows, dtype=torch.float32).abs() * 1e-3

            def ours(_: int, s: Tensor = scale, o: tuple = offsets, c: Tensor = codes, p: Tensor = packed) -> Tensor:
                return kernels.cluster_linear(c, p, s, None, None, offsets=o, backend=m.backend)

            def separate(_: int, s: Tensor = scale, c: Tensor = codes, w: Tensor = int8) -> Tensor:
                return torch._int_mm(c, w.t()).float() * s[0]

            def exact(s: Tensor = scale, o: tuple = offsets, c: Tensor = codes, w: Tensor = int8) -> Tensor:
                runs = zip(o[:-1], o[1:], strict=True)
                return sum((c[:, a:b].double() @ w[:, a:b].double().t()) * s[i].double() for i, (a, b) in enumerate(runs))

            yield Job(
                f"G3 W4A8 {tokens}×{width}→{rows}, {clusters} cluster{'s' * (clusters > 1)}", ours,
                {"cuBLAS bfloat16": lambda _, x=x, d=dense: functional.linear(x, d), "torch._int_mm + scale": separate}, 1,
                exact, operations=2 * tokens * rows * width, target="≥ 1.25×",
                packages={"GemLite, 8-bit inputs": functools.partial(peers.gemlite, m, x, rows, 1, inputs=8)},
            )  # fmt: skip


def ternary(m: Machine) -> Iterator[Job]:
    """Yield G4: ternary weights, int8 codes."""
    for rows, width in ((13824, 2560), (28672, 8192)) if m.cuda else ((16, 64),):
        n = m.copies(rows * width / 4)
        weights = [pack_ternary(m.randint(-1, 2, rows, width, dtype=torch.int8)) for _ in range(n)]
        dense = [m.randn(rows, width) for _ in range(m.copies(2 * rows * width))]
        for tokens in (1, 16, 512, 4096) if m.cuda else (1,):
            codes, x = m.randint(-127, 128, tokens, width, dtype=torch.int8), m.randn(tokens, width)
            scale, alpha = m.randn(tokens, 1, dtype=torch.float32).abs(), torch.tensor(0.02, device=m.device)
            coded = Codes(codes, scale)

            def ours(i: int, c: Codes = coded, a: Tensor = alpha, w: list = weights) -> Tensor:
                return kernels.ternary_linear(c, w[i], a, backend=m.backend)

            def exact(c: Tensor = codes, s: Tensor = scale, a: Tensor = alpha, w: list = weights) -> Tensor:
                return (c.double() @ (unpack(w[0], 2, c.shape[1]).double() - 1).t()) * s.double() * a.double()

            others = {"cuBLAS bfloat16": lambda i, x=x, d=dense: functional.linear(x, d[i % len(d)])}
            few = tokens <= 16
            gemlite = functools.partial(peers.gemlite_ternary, m, x, rows, n if few else 1)
            yield Job(f"G4 ternary {tokens}×{width}→{rows}", ours, others, n if few else 1, exact, rows * width / 4 if few else 0,
                      2 * tokens * rows * width, target="≥ 3.5×" if tokens == 1 else "",
                      packages={"GemLite ternary, 8-bit inputs": gemlite})  # fmt: skip


def sparse(m: Machine) -> Iterator[Job]:
    """Yield G5: the down projection over half of its channels, and the selection itself."""
    rows, width = (4096, 11008) if m.cuda else (16, 64)
    n = m.copies(rows * width / 4)
    dense = [m.randint(-1, 2, rows, width, dtype=torch.int8) for _ in range(n)]
    packed, transposed = [pack_ternary(w) for w in dense], [pack_ternary(w.t().contiguous()) for w in dense]
    alpha = torch.tensor(0.02, device=m.device)
    for tokens in (1, 2):
        kept = kernels.topk_quant(m.randn(tokens, width), keep=0.5, backend=m.backend)

        def ours(i: int, c: Codes = kept) -> Tensor:
            return kernels.sparse_down(c, packed[i], transposed[i], alpha, backend=m.backend)

        def whole(i: int, c: Codes = kept) -> Tensor:
            return kernels.ternary_linear(c, packed[i], alpha, backend=m.backend)

        def exact(c: Codes = kept) -> Tensor:
            return (c.codes.double() @ dense[0].double().t()) * c.scale.double() * alpha.double()

        yield Job(f"G5 sparse down {tokens}×{width}→{rows}, half kept", ours, {"our dense kernel": whole}, n, exact,
                  rows * width / 8, target="≥ 1.4×" if tokens == 1 else "")  # fmt: skip
    xs = [m.randn(*((4096, width) if m.cuda else (2, width))) for _ in range(m.copies(2 * 4096 * width))]
    yield Job(
        f"G5 top-K + int8 {len(xs[0])}×{width}", lambda i: kernels.topk_quant(xs[i], backend=m.backend).codes,
        {"torch.topk, eager": lambda i: kernels.topk_quant(xs[i], backend=Backend.REFERENCE).codes}, len(xs),
        lambda: kernels.topk_quant(xs[0], backend=Backend.REFERENCE).codes, 3 * xs[0].numel(),
    )  # fmt: skip


def _heads(m: Machine, batch: int, kv: int, slots: int, dim: int, bits: int) -> PackedHeads:
    width = kernels.packed_width(dim, bits)
    scale = m.randn(kv, dim, dtype=torch.float32).abs() * 0.1 + 0.05
    return PackedHeads(m.randint(0, 256, batch, kv, slots, width), bits, dim, scale, torch.full_like(scale, code_offset(bits)))


def attention(m: Machine) -> Iterator[Job]:
    """Yield G6: one new token over a packed cache."""
    heads, kv, dim = (32, 8, 128) if m.cuda else (2, 1, 16)
    for batch, slots in ((64, 8192), (1, 32768)) if m.cuda else ((1, 64),):
        q, plain = m.randn(batch, heads, dim), [m.randn(batch, kv, slots, dim) for _ in range(2)]

        def sdpa(_: int, q: Tensor = q, p: list = plain) -> Tensor:
            return functional.scaled_dot_product_attention(q[:, :, None], *p, enable_gqa=True)

        for bits in (4, 3):
            keys, values = (_heads(m, batch, kv, slots, dim, bits) for _ in range(2))

            def ours(_: int, q: Tensor = q, k: PackedHeads = keys, v: PackedHeads = values, s: int = slots) -> Tensor:
                return kernels.decode_attention(q, k, v, s, scaling=dim**-0.5, backend=m.backend)

            def exact(q: Tensor = q, k: PackedHeads = keys, v: PackedHeads = values, s: int = slots) -> Tensor:
                k, v = (h.states(s)[:1].double().repeat_interleave(heads // kv, 1) for h in (k, v))
                return ((q[:1, :, None].double() @ k.transpose(2, 3) * dim**-0.5).softmax(-1) @ v)[:, :, 0]

            yield Job(
                f"G6 attention, KV {bits} bits, batch {batch}, {slots} tokens", ours, {"SDPA bfloat16": sdpa}, 1,
                exact if batch == 1 else None,
                2 * keys.packed.numel(), target="≥ 2.0×" if bits == 4 else "≥ 2.2×",
            )  # fmt: skip


def append(m: Machine) -> Iterator[Job]:
    """Yield G7: quantise and pack keys of a prompt, as the cache stores them."""
    rows, dim = (2**20, 128) if m.cuda else (8, 32)
    xs = [m.randn(1, 1, rows, dim) for _ in range(m.copies(2 * rows * dim))]
    scale, zero = torch.full((1, dim), 0.2, device=m.device), torch.full((1, dim), 8.0, device=m.device)
    for bits in (4, 3):
        width = kernels.packed_width(dim, bits)
        stores = [m.randint(0, 1, 1, 1, rows, width) for _ in range(2)]
        ours, steps = (PackedHeads(store, bits, dim, scale, zero) for store in stores)

        def call(i: int, backend: Backend = m.backend, heads: PackedHeads = ours) -> Tensor:
            kernels.kv_append(xs[i], heads, 0, backend=backend)
            return heads.packed

        def eager(i: int, c: Callable = call, heads: PackedHeads = steps) -> Tensor:
            return c(i, Backend.REFERENCE, heads)

        yield Job(
            f"G7 quantise + pack {rows}×{dim} to {bits} bits", call, {"torch, eager": eager},
            len(xs), lambda e=eager: e(0), rows * dim * (2 + bits / 8), target="≥ 75 % of copy",
        )  # fmt: skip


def gptq(m: Machine) -> Iterator[Job]:
    """Yield G9: GPTQ of one square matrix."""
    width = 4096 if m.cuda else 64
    weight, inputs = m.randn(width, width, dtype=torch.float32) * 0.05, m.randn(2 * width, width, dtype=torch.float32)
    hessian, offsets = inputs.t() @ inputs, torch.linspace(0, width, 33, device=m.device).round().to(torch.int64)
    grid = round_to_nearest(weight, offsets, bits=4, grid=Grid.EXACT).weight
    yield Job(
        f"G9 GPTQ {width}×{width}", lambda _: quantize_weight(weight, hessian, offsets, bits=4, grid=Grid.EXACT).weight.codes,
        {"column loop": lambda _: column_loop(weight, hessian, grid)}, 1, lambda: column_loop(weight, hessian, grid),
        operations=2 * width**3 / 3 + width**3, rate="bfloat16", target="≥ 3×",
        captured=False,
    )  # fmt: skip


def decoding(m: Machine) -> Iterator[Job]:
    """Yield G8: one token through a stack of Llama-3-8B-shaped layers with random weights, packed against bfloat16."""
    for batch, slots in ((1, 512), (16, 512), (64, 8192)) if m.cuda else ((1, 8),):
        stacks = {}
        for packed in (True, False):
            if m.cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            stacks[packed] = Stack(m, batch=batch, slots=slots, packed=packed)
            stacks[packed].step()
            if m.cuda:
                stacks[packed].peak = torch.cuda.max_memory_allocated() - before
        ours, plain = stacks[True], stacks[False]
        memory = f", memory {ours.peak / plain.peak:.2f} of it" if m.cuda else ""
        yield Job(
            f"G8 decode 8B shape, W4 and KV4, batch {batch}, {slots} tokens{memory}", lambda _, s=ours: s.step(),
            {"the same stack in bfloat16": lambda _, s=plain: s.step()}, 1, None, ours.bytes, target="≥ 2.0×",
        )  # fmt: skip
        del stacks, ours, plain


JOBS: dict[str, Callable[[Machine], Iterator[Job]]] = {
    "G1": norm_quant,
    "G2": weight_only,
    "G3": cluster,
    "G4": ternary,
    "G5": sparse,
    "G6": attention,
    "G7": append,
    "G8": decoding,
    "G9": gptq,
}

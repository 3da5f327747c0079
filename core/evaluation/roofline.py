"""Compute the least time of the products of a forward pass on a named GPU: the roofline.

    seconds >= max(FLOPs / peak rate, bytes / bandwidth)        intensity = FLOPs / bytes

An operator is bound by memory where its intensity is below the GPU's ridge, peak rate / bandwidth. For B sequences and T new
tokens each, that see S positions:

    linear N × K    FLOPs 2 B T N K        bytes: weights N K at their bits, inputs at theirs, outputs in 16 bits
    q kᵀ, p v       FLOPs 2 B H T S E      bytes: q and the cached keys, or the cached values, at their bits, and 16-bit outputs
    head            one row for each sequence, weights at their bits as in `core.evaluation.memory`

Decoding has T = 1, the prompt's pass T = S. Attention is fused: scores never reach memory, and all of them are counted, the
masked half of a prompt's too. Norms, activation functions, scales and the launch of kernels are left out. Integers are multiplied
at the integer rate only where both operands are integers; 4-bit rates count where the GPU has them.
Source: Williams, Waterman and Patterson, "Roofline" (2009); operators as in LLM-Viewer (arXiv:2402.16363).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from core.evaluation.memory import linear_copies, linear_sizes
from core.evaluation.shapes import Shape
from core.recipe import FLOAT_BITS, INPUT_SITE, Bits


@dataclass(frozen=True)
class GPU:
    """A GPU by its maker's numbers.

    Attributes:
        memory: bytes, the stated GB as 10**9: on cards that count in GiB this leaves 7 % to the runtime.
        bandwidth: bytes per second.
        float16, int8, int4: operations per second of dense matrix products, accumulated in float32 or int32; int4 is 0 where
            4-bit operands have no rate of their own.
        source: the document of these numbers.
    """

    name: str
    memory: int
    bandwidth: float
    float16: float
    int8: float
    int4: float
    source: str

    def rate(self, bits: int) -> float:
        """Return the operations per second of a product whose wider operand has so many bits."""
        if bits > 8:
            return self.float16
        return self.int4 if bits <= 4 and self.int4 else self.int8


def _gpu(name: str, memory: int, bandwidth: int, float16: float, int8: float, int4: float, source: str) -> GPU:
    """Make a GPU of GB, GB/s and 10**12 operations per second."""
    return GPU(name, memory * 10**9, bandwidth * 1e9, float16 * 1e12, int8 * 1e12, int4 * 1e12, source)


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 16, 320, 65, 130, 260, "NVIDIA T4 datasheet; Turing architecture whitepaper"),
        _gpu("RTX 3090", 24, 936, 71, 284, 568, "NVIDIA Ampere GA102 whitepaper, table of GeForce GPUs"),
        _gpu("RTX 4090", 24, 1008, 165.2, 660.6, 1321.2, "NVIDIA Ada architecture whitepaper, appendix A"),
        _gpu("L4", 24, 300, 121, 242, 0, "NVIDIA L4 datasheet, half of the rates with sparsity"),
        _gpu("L40S", 48, 864, 362, 733, 733, "NVIDIA L40S datasheet, rates without sparsity"),
        _gpu("A100 80 GB", 80, 2039, 312, 624, 1248, "NVIDIA A100 datasheet (SXM), rates without sparsity; GA100 whitepaper"),
        _gpu("H100", 80, 3350, 989.4, 1978.9, 0, "NVIDIA H100 datasheet and whitepaper (SXM5), rates without sparsity"),
        _gpu("H200", 141, 4800, 989.4, 1978.9, 0, "NVIDIA H200 datasheet (SXM), rates without sparsity"),
        _gpu("MI300X", 192, 5300, 1307.4, 2614.9, 0, "AMD Instinct MI300X datasheet, rates without sparsity"),
    )
}
"""GPUs that memory and time are projected for, by name."""

OUTPUT_BITS = 16
PHASES = ("decode", "prefill")
"""One new token for each sequence behind its S - 1 others; or the pass over a prompt of S tokens."""


@dataclass(frozen=True)
class Operator:
    """The products of one name in all layers, with the bytes that they read and write and the bits of their wider operand."""

    name: str
    flops: int
    bytes: int
    bits: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def seconds(self, gpu: GPU) -> float:
        """Compute the least time on a GPU."""
        return max(self.flops / gpu.rate(self.bits), self.bytes / gpu.bandwidth)

    def bound(self, gpu: GPU) -> str:
        """Name what limits the operator on a GPU: "memory" or "compute"."""
        return "compute" if self.flops / gpu.rate(self.bits) > self.bytes / gpu.bandwidth else "memory"

    def to_dict(self, gpu: GPU) -> dict[str, object]:
        """Return the fields, and what follows for a GPU, as JSON types."""
        return asdict(self) | {"intensity": self.intensity, "seconds": self.seconds(gpu), "bound": self.bound(gpu)}


def operators(shape: Shape, bits: Bits, *, batch: int, sequence: int, phase: str) -> list[Operator]:
    """List the products of one forward pass over `batch` sequences, in the order in which they run.

    Args: sequence: positions that the last token sees, itself included. phase: of `PHASES`.
    """
    tokens = sequence if phase == "prefill" else 1
    rows, layers, queries = batch * tokens, shape.layers, batch * tokens * shape.heads * shape.head_dim
    cached = batch * sequence * shape.kv_heads * shape.head_dim

    def linear(name: str) -> Operator:
        outputs, inputs = linear_sizes(shape)[name]
        own, read = bits.weight(name), bits.site(INPUT_SITE[name])
        sent = rows * max(1, shape.top_k) if name in ("up", "down") else rows
        matrices = min(linear_copies(shape, name), sent)  # those that some token is sent to
        moved = matrices * outputs * inputs * own + sent * inputs * read + sent * outputs * OUTPUT_BITS
        return Operator(name, 2 * layers * sent * outputs * inputs, layers * moved // 8, max(own, read))

    scores = 2 * layers * queries * sequence
    keys = layers * (queries * bits.q + cached * bits.k) // 8
    values = layers * (cached * bits.v + queries * OUTPUT_BITS) // 8
    outside = shape.vocab * shape.hidden * bits.weights + batch * (shape.hidden + shape.vocab) * OUTPUT_BITS
    attention = [
        Operator("q kᵀ", scores, keys, max(bits.q, bits.k)),
        Operator("p v", scores, values, max(bits.softmax, bits.v)),
    ]
    head = Operator("head", 2 * batch * shape.vocab * shape.hidden, outside // 8, FLOAT_BITS)
    return [linear("qkv"), *attention, linear("o"), linear("up"), linear("down"), head]


def least_seconds(found: list[Operator], gpu: GPU) -> float:
    """Compute the least time of operators that run one after the other on a GPU."""
    return math.fsum(operator.seconds(gpu) for operator in found)


def cards_needed(total: int, gpu: GPU) -> int:
    """Count the GPUs whose memories together hold `total` bytes."""
    return -(-total // gpu.memory)

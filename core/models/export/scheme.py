"""Describe one quantised linear layer in the terms that other formats share, or say why none of them can.

A weight of b bits with zero point z has the integers c - z of its codes c: where they fit 4 or 8 signed bits it is symmetric
there, and nothing is rounded. So 2 and 3 bits are stored in 4, and weights beside quantised inputs in 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from core.checks import FLOAT_BITS
from core.quant.affine import QParams, exact_qparams
from core.quant.linear.base import LinearLayer
from core.quant.linear.quant import QuantLinear
from core.quant.rotated import TokenQuantizer
from kernels import code_limits

GROUPS = (128, 64, 32, 16)
"""Numbers of neighbouring columns that may share a scale."""
INPUT_BITS = 8


class Unfit(ValueError):
    """A format cannot hold a model; the text says why, for the end of a sentence."""


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is stored.

    Attributes:
        bits: 4 or 8. symmetric: without zero points.
        group: columns that share a scale, 0 for a whole row.
        inputs: "float"; "static", one range for all tokens; or "token", a range for each.
    """

    bits: int
    symmetric: bool
    group: int
    inputs: str


def packs_zero_points(scheme: Scheme) -> bool:
    """Say whether a scheme stores zero points beside packed codes."""
    return scheme.inputs == "float" and not scheme.symmetric


def scheme_of(linear: LinearLayer, *, reordered: bool, sinks: int) -> Scheme | None:
    """Describe a layer; None where weight and input are float.

    Args:
        reordered: whether it reads its columns in another order than the checkpoint's.
        sinks: first tokens whose inputs stay in float.
    Raises: Unfit.
    """
    inputs = input_kind(linear, sinks)
    if not isinstance(linear, QuantLinear) or linear.bits >= FLOAT_BITS:
        if inputs != "float":
            raise Unfit("its inputs are quantised and its weights are not")
        return None
    return Scheme(*_storage(linear, inputs), _group(linear, reordered), inputs)


def input_kind(linear: LinearLayer, sinks: int) -> str:
    """Name how the input of a layer is quantised, as `Scheme.inputs` does. Raises: Unfit."""
    quantizer = linear.quantizer
    by_token = isinstance(quantizer, TokenQuantizer)
    if by_token and quantizer.block is not None:
        raise Unfit("it rotates its input while it runs, which no program does")
    if quantizer is None or quantizer.bits >= FLOAT_BITS:
        return "float"
    if quantizer.bits != INPUT_BITS:
        raise Unfit(f"its inputs have {quantizer.bits} bits, and programs take {INPUT_BITS}")
    if by_token and quantizer.limits is None:
        if quantizer.clip != 1:
            raise Unfit(f"ranges of tokens are shrunk by {quantizer.clip:g}, which no format can say: use clip=off")
        return "token"
    if not by_token and len(quantizer.scale) > 1:
        raise Unfit(f"its inputs have static ranges in {len(quantizer.scale)} clusters, and formats have one for all channels")
    if sinks:
        raise Unfit("static ranges leave out the first token, which stays in float here and would be clipped there")
    zero, (qmin, qmax) = static_input(linear).zero_point, code_limits(INPUT_BITS)
    if not qmin <= int(zero) <= qmax:
        raise Unfit(f"the zero point of its inputs, {int(zero)}, lies off the grid of {INPUT_BITS} bits")
    return "static"


def static_input(linear: QuantLinear) -> QParams:
    """Return scale and zero point of an input whose kind is "static", one number each."""
    quantizer = linear.quantizer
    if isinstance(quantizer, TokenQuantizer):
        return exact_qparams(*(torch.tensor([limit], dtype=torch.float32) for limit in quantizer.limits), bits=quantizer.bits)
    return QParams(quantizer.scale, quantizer.zero_point)


def _storage(linear: QuantLinear, inputs: str) -> tuple[int, bool]:
    """Choose bits and symmetry that hold every code of a weight exactly."""
    low, high = integer_range(linear)
    zero, (qmin, qmax) = linear.weight_zero, code_limits(linear.bits)
    own = bool((zero >= qmin).all() and (zero <= qmax).all()) and linear.bits in (4, 8)
    for bits in (8,) if inputs != "float" else (4, 8):
        least, most = code_limits(bits)
        if least <= low and high <= most:
            return bits, True
        if own and bits == linear.bits:
            return bits, False
    raise Unfit(f"zero points up to {int(zero.abs().max())} lie off the grid of its {linear.bits}-bit codes")


def integer_range(linear: QuantLinear) -> tuple[int, int]:
    """Return the least and the largest value that code minus zero point may have in a layer's weight."""
    qmin, qmax = code_limits(linear.bits)
    zero = linear.weight_zero.to(torch.int64)
    return qmin - int(zero.max()), qmax - int(zero.min())


def _group(linear: QuantLinear, reordered: bool) -> int:
    """Return the size of equal groups of neighbours into which a weight's runs of columns can be cut, 0 for whole rows."""
    offsets = linear.offsets.tolist()
    if len(offsets) == 2:
        return 0
    if reordered:
        raise Unfit("it groups reordered columns: vLLM ignores an order of columns (g_idx), compressed-tensors refuses it")
    step = gcd(*offsets)
    group = next((size for size in GROUPS if step % size == 0), None)
    if group is None:
        sizes = linear.offsets.diff()
        found = f"its groups have {int(sizes.min())} to {int(sizes.max())} columns"
        raise Unfit(f"{found}, and formats have groups of one size: {', '.join(map(str, GROUPS))}")
    return group

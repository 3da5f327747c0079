"""Quantise by the rules of BitNet b1.58, a4.8 and v2, into integer codes and scales: pure functions.

    ternary   round(w / α) clipped to -1 … 1      α = mean |w|, one per projection
    int8      round(127 x / γ)                    γ = max |x|, one per token; value = code · γ / 127
    int4      round(√7 x / β) clipped to -8 … 7   β = factor · mean |x|; value = code · β / √7
    fp4       nearest of ±{0,1,2,3,4,6,8,12}      E2M1: twice its grid, so that codes are integers; value = code · γ / 12
    topk8     int8 codes, the k largest |x| of each token kept, the others 0; γ is not changed by the mask
    h-int8    int8 of x R                         R orthogonal and symmetric (`kernels.hadamard` over all of x)
    h-int4    int4 of x R

Behind h-int8 or h-int4 the ternary weight is that of W R: its projection computes (x R) Ŵᵀ, in float x (Ŵ R)ᵀ.
Rounding is half to even, statistics are clamped at 1e-5, everything is computed in float32. Sources: BitNet b1.58
(arXiv:2402.17764, equations 1-3), BitNet a4.8 (arXiv:2411.04965, equations 1-9), Q-Sparse (arXiv:2407.10969) for TopK,
BitNet v2 (arXiv:2504.18415, section 2) for the Hadamard matrix before o and down.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import hadamard

EPS = 1e-5
ROOT7 = math.sqrt(7.0)

INPUT_KINDS = ("int8", "int4", "int4x2", "fp4", "topk8", "h-int8", "h-int4")
"""Names of the quantisers of a projection's input. Callers add "fp" for an input that is not quantised."""

MODES: dict[str, dict[str, str]] = {
    "fp": {"attn_in": "fp", "o_in": "fp", "mlp_in": "fp", "down_in": "fp"},
    "w1.58a8": {"attn_in": "int8", "o_in": "int8", "mlp_in": "int8", "down_in": "int8"},
    "a4.8": {"attn_in": "int4", "o_in": "topk8", "mlp_in": "int4", "down_in": "int8"},
    "a4.8-fp4": {"attn_in": "fp4", "o_in": "fp4", "mlp_in": "fp4", "down_in": "int8"},
    "int4": {"attn_in": "int4", "o_in": "int4", "mlp_in": "int4", "down_in": "int4x2"},
    "fp4": {"attn_in": "fp4", "o_in": "fp4", "mlp_in": "fp4", "down_in": "fp4"},
    "v2-a8": {"attn_in": "int8", "o_in": "h-int8", "mlp_in": "int8", "down_in": "h-int8"},
    "v2": {"attn_in": "int4", "o_in": "h-int4", "mlp_in": "int4", "down_in": "h-int4"},
}
"""Quantiser of each projection's input by mode. "fp" keeps the weights in float too; all others have ternary weights."""


def ternary_absmean(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the weight of one projection to ternary codes.

    Args:
        w: floating, any shape; the whole tensor has one scale, so q, k and v are given one by one.
    Returns: (codes int8 in {-1, 0, 1} like w, scale 0-dim float32).
    """
    w = w.to(torch.float32)
    scale = w.abs().mean().clamp(min=EPS)
    return (w / scale).round().clamp(-1, 1).to(torch.int8), scale


def int8_absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows by their maximum.

    Args:
        x: [..., C] floating.
    Returns: (codes [..., C] float32 holding integers -127 … 127, scale [..., 1] float32).
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    return (x * (127.0 / largest)).round(), largest / 127.0


def int4_absmean(x: Tensor, *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Quantise rows by their mean magnitude; larger values are clipped.

    Args:
        x: [..., C] floating.
        factor: multiplies the mean.
    Returns: (codes [..., C] float32 holding integers -8 … 7, scale [..., 1] float32).
    """
    x = x.to(torch.float32)
    size = (factor * x.abs().mean(-1, keepdim=True)).clamp(min=EPS)
    return (x * (ROOT7 / size)).round().clamp(-8, 7), size / ROOT7


def fp4_minmax(x: Tensor, *, fmt: str = "e2m1") -> tuple[Tensor, Tensor]:
    """Quantise rows to a 4-bit float, written as integers.

    Args:
        x: [..., C] floating.
        fmt: "e2m1", codes ±{0,1,2,3,4,6,8,12} and scale max|x| / 12; "e1m2", the uniform grid -7 … 7 and max|x| / 7.
    Returns: (codes [..., C] float32 holding integers, scale [..., 1] float32).
    Raises: ValueError for another format.
    """
    if fmt not in ("e2m1", "e1m2"):
        raise ValueError(f"4-bit float {fmt[:20]!r} is unknown: use e2m1 or e1m2")
    x = x.to(torch.float32)
    largest = x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    if fmt == "e1m2":
        return (x * (7.0 / largest)).round(), largest / 7.0
    u = x * (12.0 / largest)
    size = u.abs()
    step = 1.0 + (size >= 4) + 2.0 * (size >= 8)  # 1 below 4, 2 below 8, 4 above
    return (u / step).round() * step, largest / 12.0


def topk_mask(x: Tensor, keep: float = 0.5) -> Tensor:
    """Select the int(keep · C), at least 1, largest |x| of each row of x [..., C]: a bool mask; among equals the first ones."""
    count = max(1, int(x.shape[-1] * keep))
    size = x.abs()
    threshold = size.topk(count, dim=-1).values[..., -1:]
    above, equal = size > threshold, size == threshold
    room = count - above.sum(-1, keepdim=True)  # entries equal to the threshold that still fit
    return above | (equal & (equal.cumsum(-1) <= room))


def topk_int8(x: Tensor, *, keep: float = 0.5) -> tuple[Tensor, Tensor]:
    """Quantise rows as `int8_absmax` does and set all codes to 0 but those in `topk_mask` of the float values."""
    codes, scale = int8_absmax(x)
    return codes * topk_mask(x, keep), scale


def rotates(kind: str) -> bool:
    """Return whether a quantiser rotates its input, so that the ternary weight behind it belongs to the rotated channels."""
    return kind.startswith("h-")


def quantize_weight(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Quantise w [N, K], of one projection, to ternary codes: w R where the quantiser `kind` of its input rotates.

    Returns: as `ternary_absmean`.
    """
    return ternary_absmean(hadamard(w.to(torch.float32)) if rotates(kind) else w)


def quantize_input(x: Tensor, kind: str, *, keep: float = 0.5) -> tuple[Tensor, Tensor]:
    """Quantise the input of a projection with one scale per token.

    Args:
        x: [..., C] floating.
        kind: one of INPUT_KINDS; int4x2 is `int4_absmean` with factor 2.
        keep: share that topk8 keeps.
    Returns: (codes [..., C] float32 holding integers in -127 … 127, scale [..., 1] float32).
    Raises: ValueError for another kind.
    """
    if rotates(kind):
        x, kind = hadamard(x.to(torch.float32)), kind.removeprefix("h-")
    if kind == "int8":
        return int8_absmax(x)
    if kind == "int4":
        return int4_absmean(x)
    if kind == "int4x2":
        return int4_absmean(x, factor=2.0)
    if kind == "fp4":
        return fp4_minmax(x)
    if kind == "topk8":
        return topk_int8(x, keep=keep)
    raise ValueError(f"input quantiser {kind[:20]!r} is unknown: use one of {', '.join(INPUT_KINDS)}")

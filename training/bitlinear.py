"""BitLinear: a linear layer trained with ternary weights and quantised inputs, straight-through.

    y  = (c @ tᵀ) · s · α        c, s = quantize_input(x, kind), per token;  t, α = quantize_weight(weight, kind)
    dx = dy · (α t)              at every position, also where TopK or a clip changed the value
    dW = dyᵀ · (c s)             both products use the quantised operands

Where the quantiser rotates its input (h-int8, h-int4), c s stands for x R and α t for W R, and both gradients are multiplied by
Rᵀ = R: the master stays in the channels as they come, whose few large gradients AdamW scales one by one.

The float weight is the master that the optimizer updates; t and α are computed from it in each pass. Codes are at most 127 in
size, so they are exact in bfloat16, and so are products and float32 sums of them. Sources: BitNet b1.58
(arXiv:2402.17764, section 2), BitNet a4.8 (arXiv:2411.04965, section 2), Q-Sparse (arXiv:2407.10969, equation 13), BitNet v2
(arXiv:2504.18415, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from core.checks import require_choice
from core.errors import InputError
from core.quant.dynamic import INPUT_KINDS, MODES, quantize_input, quantize_weight, rotates
from kernels import hadamard

_SITE_OF = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "o_proj": "o_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "down_in",
}


class BitLinear(nn.Linear):
    """y = x̂ Ŵᵀ without bias, the master weight [N, K] in `weight`.

    Args:
        in_features, out_features: K and N.
        kind: quantiser of the input, one of INPUT_KINDS; "fp" multiplies the float input and the float weight.
        keep: share that topk8 keeps.
    """

    def __init__(self, in_features: int, out_features: int, *, kind: str = "int8", keep: float = 0.5) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.kind, self.keep = kind, keep

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., K] by the quantised weight: [..., N], in the autocast type where autocast is on."""
        if self.kind == "fp":
            return linear(x, self.weight)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _StraightThrough.apply(x, self.weight, self.kind, self.keep, dtype)


class _StraightThrough(torch.autograd.Function):
    """The three products of the module's docstring, computed in `dtype` with float32 scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: str, keep: float, dtype: torch.dtype) -> Tensor:
        codes, scale = quantize_input(x, kind, keep=keep)
        ternary, alpha = quantize_weight(weight, kind)
        codes, ternary = codes.to(dtype), ternary.to(dtype)
        ctx.save_for_backward(codes, scale, ternary, alpha)
        ctx.types, ctx.rotated = (x.dtype, weight.dtype), rotates(kind)
        return (linear(codes, ternary) * (scale * alpha)).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        codes, scale, ternary, alpha = ctx.saved_tensors
        x_type, weight_type = ctx.types
        to_input = (grad.to(ternary.dtype) @ ternary).to(x_type) * alpha.to(x_type)
        to_input = hadamard(to_input) if ctx.rotated else to_input
        scaled = (grad * scale).to(codes.dtype).flatten(0, -2)
        to_weight = (scaled.T @ codes.flatten(0, -2)).to(weight_type)
        return to_input, hadamard(to_weight) if ctx.rotated else to_weight, None, None, None


def convert_to_bitlinear(model: nn.Module, mode: str, *, inputs: Mapping[str, str] | None = None, keep: float = 0.5) -> nn.Module:
    """Replace every projection of a Llama-shaped decoder by BitLinear, in place; parameters stay the same objects.

    Args:
        model: has `model.layers`, with q, k, v, o, gate, up and down projections without bias.
        mode, inputs: as `set_mode`.
    Returns: `model`.
    Raises: InputError E-PARAM-ARCHITECTURE where a projection has a bias or an unknown name.
    """
    layers = model.get_submodule("model.layers")
    for path, module in list(layers.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        parent, _, name = path.rpartition(".")
        if name not in _SITE_OF or module.bias is not None:
            raise InputError(
                f"The projection {name[:40]!r} cannot become ternary: use an architecture of Llama's shape without biases.",
                code="E-PARAM-ARCHITECTURE",
            )
        with torch.device("meta"):
            layer = BitLinear(module.in_features, module.out_features, keep=keep)
        layer.weight = module.weight
        setattr(layers.get_submodule(parent), name, layer)
    set_mode(model, mode, inputs=inputs)
    return model


def set_mode(model: nn.Module, mode: str, *, inputs: Mapping[str, str] | None = None) -> None:
    """Choose the input quantisers of every BitLinear of `model`; no parameter and no optimizer state is changed.

    Args:
        mode: a name of MODES.
        inputs: quantisers of single projection inputs (attn_in, o_in, mlp_in, down_in) that replace the mode's.
    Raises: InputError E-PARAM-MODE or E-PARAM-INPUTS.
    """
    kinds = input_kinds(mode, inputs)
    for path, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.kind = kinds[_SITE_OF[path.rpartition(".")[2]]]


def input_kinds(mode: str, inputs: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the quantiser of each projection input under a mode with replacements. Raises: as `set_mode`."""
    require_choice("mode", mode, tuple(MODES))
    for site, kind in (inputs or {}).items():
        if site not in MODES[mode] or kind not in INPUT_KINDS or mode == "fp":
            raise InputError(
                f"inputs has {str(site)[:20]!r}: {str(kind)[:20]!r}: name one of {', '.join(MODES[mode])} with one "
                f"of {', '.join(INPUT_KINDS)}, in a mode with ternary weights.",
                code="E-PARAM-INPUTS",
            )
    return MODES[mode] | dict(inputs or {})

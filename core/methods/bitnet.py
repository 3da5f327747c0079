"""The method "bitnet": run any model by BitNet's rules, ternary weights and dynamic activation quantisers.

How good the result is depends on the rules that the model was trained by; `BitNetRules.fidelity` says which case it is:

    trained by the same rules       nothing is approximated
    trained as BitNet, other rules  the same ternary weights, another mode, share of TopK, bits of attention: approximate
    trained in full precision       weights rounded to ternary, no sub-norms, its own activation: simulated, expect noise

Products skipped for zeros of the squared ReLU are exact in every case. Nothing is calibrated: the text only serves to measure
noise.
Source: BitNet a4.8 (arXiv:2411.04965), section 2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from core.methods.base import LayerPlan, LayerStatistics
from core.models.architectures import BlockSpec
from core.models.bitnet import AttentionBits, BitNetRules
from core.models.block import DecoderBlock
from core.quant.dynamic import MODES, quantize_input
from core.quant.kv_grid import fake_per_row
from core.quant.linear.ternary import TernaryLinear
from core.quant.observer import SitePlan, sqnr_db
from core.recipe import INPUT_SITE, SITES, BitNetOptions, QuantRecipe
from core.report import WeightError


class BitNet:
    """The method "bitnet": see the module's docstring."""

    keeps_ternary = True

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """Return 0: every token is quantised by its own scale."""
        return 0

    def calibration_softmax_bits(self, recipe: QuantRecipe) -> int:
        """Return 16: the softmax output stays in float."""
        return 16

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """Return False: ternary weights are rounded by their mean."""
        return False

    def plan_layer(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> LayerPlan:
        """Record the bits of every site and the noise that its dynamic quantiser makes on sampled rows."""
        bits = recipe.tensor_bits
        sites = {}
        for site in SITES:
            whole = torch.tensor([0, spec.width(site)])
            rows = stats.ranges[site].rows
            found = _approximation(site, rows, recipe.bitnet, spec)
            sites[site] = SitePlan(bits.site(site), whole, None, None if found is None else sqnr_db(rows, found))
        return LayerPlan({}, sites, softmax_bits=16, weight_bits=2, sink_tokens=0)

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Build a block with the same norms and ternary layers, made of its ternary weights or of its float ones, rounded."""
        options, layers, errors = recipe.bitnet, {}, {}
        rules = replace(
            block.rules or BitNetRules(options.mode),
            mode=options.mode,
            keep=options.keep,
            attention=AttentionBits(options.kv_bits, options.bos_bits, options.q_bits),
        )
        for name, linear in block.linears().items():
            kind = rules.kind(INPUT_SITE[name])
            if isinstance(linear, TernaryLinear):
                layer = linear.with_input(kind, rules.keep)
                errors[name] = WeightError(2, "ternary", float("inf"), None, layer.effective_bits)
            else:
                weight, bias = linear.weight.detach().to(torch.float32), linear.bias
                parts = list(weight.split(_rows(name, block.spec)))
                layer = TernaryLinear.from_weights(parts, None if bias is None else bias.detach(), kind=kind, keep=rules.keep)
                noise = sqnr_db(weight, layer.dequantized_weight())
                errors[name] = WeightError(2, "ternary", noise, None, layer.effective_bits)
            layers[name] = layer
        return block.with_parts(**layers, rules=rules), errors


def _rows(name: str, spec: BlockSpec) -> list[int]:
    """Count the output rows of each projection that a fused linear layer holds."""
    if name == "qkv":
        return [spec.width(site) for site in ("q", "k", "v")]
    if name == "up":
        return [spec.ffn] * (2 if spec.gated else 1)
    return [spec.hidden]


def _approximation(site: str, rows: Tensor, options: BitNetOptions, spec: BlockSpec) -> Tensor | None:
    """Quantise and dequantise rows [R, C] of a site; None where it is not quantised. The first token's bits are left out."""
    if site in MODES[options.mode]:
        codes, scale = quantize_input(rows, MODES[options.mode][site], keep=options.keep)
        return codes * scale
    bits = options.q_bits if site == "q" else options.kv_bits
    if bits >= 16:
        return None
    return fake_per_row(rows.unflatten(-1, (-1, spec.head_dim)), bits).flatten(-2)


METHOD = BitNet()

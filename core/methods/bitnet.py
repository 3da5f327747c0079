"""The method "bitnet": run any model by BitNet's rules, ternary weights and dynamic activation quantisers.

How good the result is depends on the rules that the model was trained by; `BitNetRules.fidelity` says which case it is:

    trained by the same rules       nothing is approximated
    trained as BitNet, other rules  the same ternary weights, another mode, share of TopK, bits of attention: approximate
    trained in full precision       weights rounded to ternary, no sub-norms, its own activation: simulated, expect noise
    trained with other rotations    the weights behind rotated inputs (modes v2, v2-a8) are rounded again: simulated, expect noise

Products skipped for zeros of the squared ReLU are exact in every case. Nothing is calibrated: the text only serves to measure
noise.
Sources: BitNet a4.8 (arXiv:2411.04965), section 2, BitNet v2 (arXiv:2504.18415), section 2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from core.checks import FLOAT_BITS
from core.methods.base import LayerPlan, LayerStatistics, Method, SiteKey
from core.methods.fake import Fake
from core.models.adapter import BlockSpec
from core.models.bitnet import AttentionBits, BitNetRules
from core.models.block import DecoderBlock
from core.options import same_weights
from core.quant.dynamic import MODES, quantize_input, rotates
from core.quant.kv_grid import fake_per_row
from core.quant.linear.base import LinearLayer
from core.quant.linear.ternary import TernaryLinear
from core.quant.observer import SitePlan, sqnr_db
from core.recipe import INPUT_SITE, BitNetOptions, QuantRecipe
from core.report import WeightError
from kernels import hadamard


class BitNet(Method):
    """The method "bitnet": see the module's docstring."""

    keeps_ternary = True

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """Return False: ternary weights are rounded by their mean."""
        return False

    def site_key(self, site: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `plan_site` depends on beside the statistics."""
        return SiteKey(recipe.tensor_bits.site(site), 1, _rules(recipe.bitnet))

    def weight_key(self, name: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `fake_weight` depends on: whether the input is rotated; weights are ternary."""
        return SiteKey(2, 1, ("ternary", rotates(_rules(recipe.bitnet).kind(INPUT_SITE[name]))))

    def plan_site(self, stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> SitePlan:
        """Record the bits of one site and the noise that its dynamic quantiser makes on sampled rows."""
        key = self.site_key(site, recipe)
        return stats.once(("bitnet", site, key), partial(_plan_site, stats.ranges[site].rows, site, key, spec))

    def fake_site(self, plan: SitePlan, site: str, recipe: QuantRecipe, spec: BlockSpec) -> Fake | None:
        """Make the function that rounds a site token by token."""
        return fake_dynamic(site, _rules(recipe.bitnet), spec)

    def fake_weight(self, linear: LinearLayer, name: str, plan: SitePlan, recipe: QuantRecipe, spec: BlockSpec) -> Tensor | None:
        """Round a float weight to ternary, each projection by its own mean."""
        kind = _rules(recipe.bitnet).kind(INPUT_SITE[name])
        if _serves(linear, kind):
            return None
        weight = linear.dequantized_weight().to(torch.float32)
        return TernaryLinear.from_weights(list(weight.split(_rows(name, spec))), kind=kind).dequantized_weight()

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Build a block with the same norms and ternary layers, made of its ternary weights or of its float ones, rounded."""
        layers, errors = {}, {}
        keeps = block.rules is not None and same_weights(recipe.bitnet.mode, block.rules.mode)
        rules = _rules(recipe.bitnet, block.rules if keeps else None)
        for name, linear in block.linears().items():
            kind = rules.kind(INPUT_SITE[name])
            if _serves(linear, kind):
                layer = linear.with_input(kind, rules.keep)
                errors[name] = WeightError(2, "ternary", float("inf"), None, layer.effective_bits)
            else:
                weight, bias = linear.dequantized_weight().detach().to(torch.float32), linear.bias
                parts = list(weight.split(_rows(name, block.spec)))
                layer = TernaryLinear.from_weights(parts, None if bias is None else bias.detach(), kind=kind, keep=rules.keep)
                noise = sqnr_db(weight, layer.dequantized_weight())
                errors[name] = WeightError(2, "ternary", noise, None, layer.effective_bits)
            layers[name] = layer
        return block.with_parts(**layers, rules=rules), errors


def _serves(linear: LinearLayer, kind: str) -> bool:
    """Return whether a layer's weights are ternary already, and for an input that is rotated as `kind` says."""
    return isinstance(linear, TernaryLinear) and rotates(kind) == rotates(linear.kind)


def _rows(name: str, spec: BlockSpec) -> list[int]:
    """Count the output rows of each projection that a fused linear layer holds."""
    if name == "qkv":
        return [spec.width(site) for site in ("q", "k", "v")]
    if name == "up":
        return [spec.ffn] * (2 if spec.gated else 1)
    return [spec.hidden]


def _rules(options: BitNetOptions, trained: BitNetRules | None = None) -> BitNetRules:
    """Return the rules that a recipe asks for, of a model trained by `trained`."""
    attention = AttentionBits(options.kv_bits, options.bos_bits, options.q_bits)
    return replace(trained or BitNetRules(options.mode), mode=options.mode, keep=options.keep, attention=attention)


def _plan_site(rows: Tensor, site: str, key: SiteKey, spec: BlockSpec) -> SitePlan:
    """Record the bits of a site and the noise on rows [R, C]; the first token's own bits are left out."""
    rules = replace(key.rest, attention=replace(key.rest.attention, bos=key.rest.attention.kv))
    fake, whole = fake_dynamic(site, rules, spec), torch.tensor([0, spec.width(site)])
    return SitePlan(key.bits, whole, None, None if fake is None else sqnr_db(rows, fake(rows[None])[0]))


def fake_dynamic(site: str, rules: BitNetRules, spec: BlockSpec) -> Fake | None:
    """Make the function that rounds a site [B, T, C] token by token, as `rules` say; None where it stays in float."""
    if site in MODES[rules.mode]:
        kind = rules.kind(site)
        return None if kind == "fp" else partial(_fake_input, kind=kind, keep=rules.keep)
    attention = rules.attention
    if (attention.q if site == "q" else attention.kv) >= FLOAT_BITS:
        return None
    rounded = partial(fake_per_row, bits=attention.q) if site == "q" else partial(attention.kv_grid.fake, past=0)

    def fake(x: Tensor) -> Tensor:
        return rounded(x.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)).transpose(1, 2).flatten(2)

    return fake


def _fake_input(x: Tensor, *, kind: str, keep: float) -> Tensor:
    codes, scale = quantize_input(x, kind, keep=keep)
    return hadamard(codes * scale) if rotates(kind) else codes * scale


METHOD = BitNet()

"""The method "rotation": scale and rotate channels, quantise token by token; grouped GPTQ weights.

    s = √(rms x / rms w) per channel      x̃ = (x / s) R      w̃ = (w s) R      x wᵀ = x̃ w̃ᵀ      R of `kernels.hadamard`

Scales are folded (`core.methods.rotation.fold`); R is folded for v and o_in, inside heads, and runs with the layer or after the
rotation by position elsewhere. From the keys their mean over calibration tokens is subtracted, which softmax does not see, unless
scores are capped (Gemma 2): those models keep the mean. A site changes its basis where it is quantised, or the weight that reads
it.

Weights are quantised in groups of neighbouring columns of w̃ with H = Σ_t x̂ x̂ᵀ of the quantised inputs x̂ and, where it is chosen,
the target W' in place of W, so that W' x̂ lies half-way between W x̂ and W x:

    W' = W + ½ W C (H + λ I)⁻¹        C = Σ_t (x - x̂) x̂ᵀ        x the input in the unquantised model

λ is half the mean of H's diagonal: a regression on few tokens that is damped less follows their noise.

Each ingredient is a switch of `RotationOptions`.
Sources: SmoothQuant (arXiv:2211.10438), QuaRot (arXiv:2404.00456), FlatQuant (arXiv:2410.09426) for scaling before rotating,
GPTAQ (arXiv:2504.02692) for the target; docs/beyond.md says what each ingredient is worth here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from core.methods.apply import quantizer
from core.methods.base import (
    FLOAT_FIRST_TOKENS,
    LayerPlan,
    LayerStatistics,
    Method,
    SiteKey,
    Streams,
)
from core.methods.fake import Fake
from core.methods.rotation.fold import Basis, fold_scales, scales_down_in
from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.gptq import fake_columns, quantize_weight
from core.quant.kv_grid import fake_per_row
from core.quant.linear.base import LinearLayer
from core.quant.linear.quant import QuantLinear
from core.quant.observer import SHRINK, RangeRules, SitePlan, plan_site, sqnr_db
from core.quant.ranges import ChannelRanges
from core.quant.rotated import TokenQuantizer
from core.quant.static import ActivationQuantizer, InputUse
from core.recipe import FLOAT_BITS, INPUT_SITE, QuantRecipe, RotationOptions
from core.report import WeightError

PARTNER = {"q": "k", "k": "q", "v": "o_in", "o_in": "v"}
"""Sites whose bases are tied: both change if one of them is quantised."""
PER_HEAD = ("q", "k", "v")
"""Sites whose heads have ranges of their own."""
TARGET_DAMPING = 0.5
"""λ over the mean of H's diagonal. With 0.01, GPTQ's own damping, the target raises the perplexity that it is to lower."""
SHRINK_WEIGHTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class RotatedPlan(SitePlan):
    """The quantisation of one site in a basis of its own.

    Attributes:
        basis: of the site. folded: whether its rotation is part of weights or of the attention, not of the quantiser.
        clip, limits: as in `TokenQuantizer`, where `params` is None.
    """

    basis: Basis = field(default_factory=Basis)
    folded: bool = False
    clip: float = 1.0
    limits: tuple[float, float] | None = None

    def quantizer(self) -> ActivationQuantizer | TokenQuantizer | None:
        """Make the module that quantises the site; None where nothing is to do."""
        block = None if self.folded else self.basis.block
        if self.params is not None or (self.bits >= FLOAT_BITS and block is None):
            return quantizer(self)
        return TokenQuantizer(self.bits, block, self.clip, self.limits)


class Rotation(Method):
    """The method "rotation": see the module's docstring."""

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """Return 1 where activations are quantised, as RPTQ does; else 0."""
        return FLOAT_FIRST_TOKENS if recipe.tensor_bits.quantizes_activations else 0

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """Return False: Hessians are made of quantised inputs, by `apply_layer`."""
        return False

    def uses_exact_inputs(self, recipe: QuantRecipe) -> bool:
        """Say whether the target of GPTQ is half-way to the unquantised model."""
        return recipe.rotation.halfway and recipe.weights == "gptq" and recipe.tensor_bits.quantizes_weights

    def site_key(self, site: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `plan_site` depends on beside the statistics."""
        return SiteKey(recipe.tensor_bits.site(site), 1, (recipe.rotation, changes_basis(site, recipe)))

    def weight_key(self, name: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `fake_weight` depends on beside the statistics."""
        return self.site_key(INPUT_SITE[name], recipe)._replace(bits=recipe.tensor_bits.weight(name))

    def plan_site(self, stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> RotatedPlan:
        """Choose basis and ranges of one site."""
        key = self.site_key(site, recipe)
        return stats.once(("rotation", site, key), partial(_plan_site, stats, site, key, spec))

    def fake_site(self, plan: SitePlan, site: str, recipe: QuantRecipe, spec: BlockSpec) -> Fake | None:
        """Make the function that rounds a site in its basis and returns to the model's own; None where it stays in float."""
        return fake_based_site(plan, site, spec, self.sink_tokens(recipe))

    def fake_weight(self, linear: LinearLayer, name: str, plan: SitePlan, recipe: QuantRecipe, spec: BlockSpec) -> Tensor | None:
        """Round a weight to nearest in the basis of its input; rows of v are taken as they are before their rotation."""
        return fake_based_weight(linear, plan, recipe.tensor_bits.weight(name), clip=recipe.rotation.clip)

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Run the layer with quantised activations in its new bases for Hessians and targets, and quantise the weights."""
        clip, gptq = recipe.rotation.clip, recipe.weights == "gptq"
        return quantize_block(change_bases(block, plan), plan, stats.streams, clip=clip, gptq=gptq)


def fake_based_site(plan: RotatedPlan, site: str, spec: BlockSpec, sinks: int) -> Fake | None:
    """Make the function that rounds a site in its basis and returns to the model's own; None where it stays in float.

    Args: sinks: first positions that stay in float.
    """
    if plan.bits >= FLOAT_BITS:
        return None
    rounded = _rounding(plan, site, spec)

    def fake(x: Tensor) -> Tensor:
        found = plan.basis.back(rounded(plan.basis.to(x)))
        found[:, :sinks] = x[:, :sinks]
        return found

    return fake


def fake_based_weight(linear: LinearLayer, plan: RotatedPlan, bits: int, *, clip: bool) -> Tensor | None:
    """Round a weight [N, K] to nearest in the basis of its input, and return to the model's own; None at 16 bits.

    Args: clip: search ratios that shrink the ranges of its groups.
    """
    if bits >= FLOAT_BITS:
        return None
    own = plan.basis.weight(linear.dequantized_weight().to(torch.float32)).t().contiguous()
    shrink = SHRINK_WEIGHTS if clip else (1.0,)
    rounded = fake_columns(own, plan.weight_offsets.to(own.device), bits=bits, grid=Grid.EXACT, shrink=shrink).t()
    return plan.basis.weight_back(rounded)


def quantize_block(
    shaped: DecoderBlock, plan: LayerPlan, streams: Streams, *, clip: bool, gptq: bool
) -> tuple[DecoderBlock, dict[str, WeightError]]:
    """Run a layer with quantised activations for Hessians and targets, quantise its weights, attach the quantisers.

    Args:
        shaped: float, in the bases and orders of the plan, but for the rotations that run online, and the keys' mean.
        plan: its sites are `RotatedPlan`s.
        streams: of the layer; weights aim half-way where it has exact inputs.
        clip: fit the grid of each group by a search of ratios. gptq: or else round to nearest.
    Returns: as `Method.apply_layer`.
    """
    live, bits = with_quantizers(shaped, plan), plan.weight_bits
    wanted = gptq and min(bits.values()) < FLOAT_BITS
    moments = collect_moments(live, plan, streams) if wanted else {}
    layers, errors = {}, {}
    shrink = SHRINK_WEIGHTS if clip else (1.0,)
    for name, linear in live.linears().items():
        site = plan.sites[INPUT_SITE[name]]
        weight = linear.weight
        if bits[name] >= FLOAT_BITS:
            layers[name], errors[name] = linear, WeightError(FLOAT_BITS, "float", float("inf"), None, linear.effective_bits)
            continue
        hessian, target = None, weight
        if wanted:
            hessian, shift = moments[INPUT_SITE[name]]
            target = weight if shift is None else weight + half_way(weight, hessian, shift)
        offsets = site.weight_offsets.to(weight.device)
        made = quantize_weight(target, hessian, offsets, bits=bits[name], grid=Grid.EXACT, shrink=shrink)
        layers[name] = QuantLinear.from_weight(made.weight, linear.bias, site.quantizer())
        noise = sqnr_db(weight, made.weight.dequantize())
        errors[name] = WeightError(bits[name], made.method, noise, made.fallback, layers[name].effective_bits)
    return attach(live.with_parts(**layers), plan), errors


def changes_basis(site: str, recipe: QuantRecipe) -> bool:
    """Say whether a site changes its basis: where it, a weight that reads it or its `PARTNER` is quantised."""
    bits, tied = recipe.tensor_bits, (site, PARTNER.get(site, site))
    weights = [bits.weight(name) for name, read in INPUT_SITE.items() if read in tied]
    return min(*map(bits.site, tied), *weights) < FLOAT_BITS


def change_bases(block: DecoderBlock, plan: LayerPlan) -> DecoderBlock:
    """Make the float block in the bases of a plan, but for the rotations that run online, and the keys' mean."""
    spec, scales = block.spec, {}
    for site in ("attn_in", "mlp_in", "down_in", "k", *(("o_in",) if spec.sub_norms else ("v",))):
        scale = plan.sites[site].basis.scale
        if scale is not None:
            scales[site] = scale.view(spec.kv_heads, spec.head_dim) if site in PER_HEAD else scale
    return fold_scales(block, scales, rotate_values=plan.sites["v"].basis.block is not None)


def with_quantizers(shaped: DecoderBlock, plan: LayerPlan) -> DecoderBlock:
    """Make the block that rotates and quantises activations as a plan says, with float weights.

    Args: shaped: of `change_bases`.
    """
    layers = {}
    for name, linear in shaped.linears().items():
        site = plan.sites[INPUT_SITE[name]]
        weight = Basis(block=None if site.folded else site.basis.block).weight(linear.weight.detach().to(torch.float32))
        layers[name] = QuantLinear.from_weight(weight, linear.bias, site.quantizer(), offsets=site.weight_offsets)
    return attach(shaped.with_parts(**layers), plan)


def attach(block: DecoderBlock, plan: LayerPlan) -> DecoderBlock:
    """Put into the attention what a plan says of q, k, v and softmax. Returns: the block."""
    attention, spec, key = block.attention, block.spec, plan.sites["k"].basis
    attention.softmax_bits, attention.sink_tokens = plan.softmax_bits, plan.sink_tokens
    attention.rotates_heads = key.block is not None
    attention.key_mean = None if key.mean is None else key.mean.view(spec.kv_heads, spec.head_dim)
    for site in PER_HEAD:
        setattr(attention, f"{site}_quantizer", plan.sites[site].quantizer())
    return block


def collect_moments(live: DecoderBlock, plan: LayerPlan, streams: Streams) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Run a layer with quantised activations; return H and C of the module's docstring by site, C None without a target."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    seen: dict[str, Tensor] = {}
    for batch, item in enumerate(streams.inputs):
        with live.slots.watch(lambda site, x: seen.update({site: x})):
            live(item.hidden, item.rotary)
        for name, linear in live.linears().items():
            site = INPUT_SITE[name]
            x = seen[site] if linear.quantizer is None else linear.quantizer.fake(seen[site], InputUse(plan.sink_tokens))
            x, shift = x.flatten(0, 1), None
            hessian = x.t() @ x
            if streams.exact:
                shift = (plan.sites[site].basis.to(streams.exact[site][batch]).flatten(0, 1) - x).t() @ x
            before = found.get(site)
            if before is not None:
                hessian, shift = hessian.add_(before[0]), None if shift is None else shift.add_(before[1])
            found[site] = hessian, shift
    return found


def half_way(weight: Tensor, hessian: Tensor, shift: Tensor) -> Tensor:
    """Compute ½ W C (H + λ I)⁻¹ [N, K]; zeros where it cannot be factorised, which GPTQ then reports."""
    damped = hessian.clone()
    damped.diagonal().add_(TARGET_DAMPING * damped.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        return torch.zeros_like(weight)
    return 0.5 * torch.cholesky_solve((weight @ shift).t(), lower).t()


def _plan_site(stats: LayerStatistics, site: str, key: SiteKey, spec: BlockSpec) -> RotatedPlan:
    options, changes = key.rest
    return plan_rotated(stats, site, site_basis(stats, site, options, spec) if changes else Basis(), key.bits, options, spec)


def plan_rotated(
    stats: LayerStatistics, site: str, basis: Basis, bits: int, options: RotationOptions, spec: BlockSpec
) -> RotatedPlan:
    """Choose the ranges of one site in a basis."""
    width, rows = spec.width(site), basis.to(stats.calibrated[site].rows)
    own = {"basis": basis, "folded": site in PER_HEAD or (site == "o_in" and not spec.sub_norms)}
    whole, step = torch.tensor([0, width]), options.group or width
    groups = torch.tensor([*range(0, width, step), width])
    if bits >= FLOAT_BITS:
        return RotatedPlan(FLOAT_BITS, whole, None, None, groups, **own)
    if site in ("k", "v") and options.kv == "static":
        low, high = rows.amin(0), rows.amax(0)
        rules = RangeRules(Grid.EXACT, ema=False, clip_search=options.clip)
        found = plan_site(ChannelRanges(low, high, low[None], high[None], rows), torch.arange(width + 1), bits, rules)
        return RotatedPlan(bits, found.offsets, found.params, found.sqnr_db, groups, **own)
    least, best = float("inf"), None
    for factor in SHRINK if options.clip else (1.0,):
        clip, limits = _range(rows, site, factor, options)
        plan = RotatedPlan(bits, whole, None, None, groups, **own, clip=clip, limits=limits)
        fake = _rounding(plan, site, spec)(rows)
        # relative to each row: a few tokens are hundreds of times larger than the others
        error = float(((fake - rows).square().sum(1) / rows.square().sum(1).clamp_min(1e-12)).mean())
        if best is None or error < least:
            least, best = error, replace(plan, sqnr_db=sqnr_db(rows, fake))
    return best


def _range(rows: Tensor, site: str, factor: float, options: RotationOptions) -> tuple[float, tuple[float, float] | None]:
    """Return clip ratio and limits of a quantiser whose range is shrunk by a factor."""
    if options.dynamic or site in ("k", "v"):
        return factor, None
    low, high = float(rows.min().clamp_max(0)), float(rows.max().clamp_min(0))
    return 1.0, (low * factor, high * factor if high > low else 1.0)


def _rounding(plan: RotatedPlan, site: str, spec: BlockSpec) -> Fake:
    """Make the function that rounds a site [..., C] in its basis."""
    if plan.params is not None:
        return quantizer(plan).fake
    if site in ("k", "v"):
        rounded = partial(fake_per_row, bits=plan.bits)
    else:
        rounded = TokenQuantizer(plan.bits, None, plan.clip, plan.limits).fake
    if site not in PER_HEAD:
        return rounded
    return lambda x: rounded(x.unflatten(-1, (-1, spec.head_dim))).flatten(-2)


def site_basis(stats: LayerStatistics, site: str, options: RotationOptions, spec: BlockSpec) -> Basis:
    """Choose scale and rotation of one site, and the mean that is subtracted from keys."""
    basis = _scale_and_rotation(stats, site, options, spec)
    if site != "k" or not options.key_mean or spec.softcap is not None:  # a cap makes softmax see the mean
        return basis
    return replace(basis, mean=basis.to(stats.calibrated[site].rows).mean(0))


def _scale_and_rotation(stats: LayerStatistics, site: str, options: RotationOptions, spec: BlockSpec) -> Basis:
    scale = _scale(stats, site, spec) if options.scale else None
    if not options.rotate or (site == "v" and spec.sub_norms):
        return Basis(scale)
    heads = site in PER_HEAD or (site == "o_in" and not spec.sub_norms)
    return Basis(scale, spec.head_dim if heads else options.block)


def _scale(stats: LayerStatistics, site: str, spec: BlockSpec) -> Tensor | None:
    """Choose the factors that a site's channels are divided by, [C]; None where none may be folded."""

    def square(name: str) -> Tensor:
        return stats.calibrated[name].rows.square().mean(0)

    if site in ("q", "k"):
        key = square("k").view(spec.kv_heads, spec.head_dim)
        query = square("q").view(spec.kv_heads, spec.groups, spec.head_dim).mean(1)
        if spec.rope:  # the two channels that the rotation by position mixes share their scale
            key, query = (t.unflatten(1, (2, -1)).mean(1).repeat(1, 2) for t in (key, query))
        if spec.qk_norm and not spec.wide_qk_norm:  # heads share the norms' gains
            key, query = (t.mean(0, keepdim=True).expand(spec.kv_heads, -1) for t in (key, query))
        scale = _balance(key, query)
        return scale.flatten() if site == "k" else 1 / scale.repeat_interleave(spec.groups, dim=0).flatten()
    if site in ("v", "o_in") and not spec.sub_norms:
        shape = (spec.kv_heads, spec.groups, spec.head_dim)
        scale = _balance(square("o_in").view(shape).mean(1), stats.importance["o_in"].view(shape).mean(1))
        return scale.flatten() if site == "v" else scale.repeat_interleave(spec.groups, dim=0).flatten()
    if site == "v" or (site == "down_in" and not scales_down_in(spec)):
        return None
    return _balance(square(site), stats.importance[site])


def _balance(first: Tensor, second: Tensor) -> Tensor:
    """Compute √(rms of the first / rms of the second) of mean squares, its geometric mean 1; 1 where either is 0."""
    log = torch.where((first > 0) & (second > 0), (first / second).clamp(1e-12, 1e12).log() / 4, 0.0)
    return (log - log.mean()).exp()


METHOD = Rotation()

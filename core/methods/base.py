"""The base of the quantisation methods: `plan_layer` decides, `apply_layer` builds the layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor

from core.bits import kind_of
from core.calibration.observe import BlockInputs
from core.methods.fake import Fake, fake_site, fake_weight
from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.quant.affine import Grid
from core.quant.linear.base import LinearLayer
from core.quant.observer import RangeRules, SitePlan
from core.quant.ranges import ChannelRanges
from core.recipe import FLOAT_BITS, INPUT_SITE, QuantRecipe
from core.report import WeightError

Made = TypeVar("Made")

SEARCHED_RANGES = RangeRules(Grid.EXACT, ema=False, clip_search=True)
"""Range rules of RPTQ's variant default and of the matched baseline."""

FLOAT_FIRST_TOKENS = 1
"""Positions at the start of a sequence that both of them keep in float: their activations are hundreds of times larger."""


@dataclass(frozen=True)
class LayerPlan:
    """Decisions for one decoder layer.

    Attributes:
        orders: R1 … R5 -> new = old[order]; [D], [Hkv, E] for R2 and R3, [F], or [N, F] for N experts. Left out: the order stays.
        sites: every site of the block (`BlockSpec.sites`).
        softmax_bits: 2 to 8 or 16. weight_bits: of the weights of each kind of linear layer, by name; 2 to 8 or 16.
        sink_tokens: first positions whose activations stay in float.
    """

    orders: dict[str, Tensor]
    sites: dict[str, SitePlan]
    softmax_bits: int
    weight_bits: dict[str, int]
    sink_tokens: int


@dataclass(frozen=True)
class Streams:
    """What enters one layer, batch by batch: for methods that run the layer themselves.

    Attributes:
        inputs: hidden states [B, T, D] behind the quantised layers before this one, with the rotation of their tokens.
        exact: per linear input site, its tensors [B, T, C] in the unquantised model; empty where no method asks for them.
    """

    inputs: list[BlockInputs]
    exact: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerStatistics:
    """Everything that a method may use to plan a layer.

    Attributes:
        ranges: per site, channels in the original order; clusters are formed on these.
        calibrated: ranges for scales where a method calibrates apart from clustering; else the same object as `ranges`.
        hessians: Xᵀ X [K, K] per linear input site, original order; empty when not asked for.
        importance: per linear input site [C], mean square of the weight columns that read it.
        streams: of the layer while a model is quantised; None where plans alone are made.
        residual: [D] int64, the order that all layers share (`Method.residual_order`); None where these statistics' channels lie
            in it already.
        made: what plans of these statistics were made of so far, by all that it depends on: see `once`.
    """

    ranges: dict[str, ChannelRanges]
    calibrated: dict[str, ChannelRanges]
    hessians: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    streams: Streams | None = None
    residual: Tensor | None = None
    made: dict[Hashable, object] = field(default_factory=dict)

    def at(self, site: str) -> tuple[LayerStatistics, str]:
        """Return the statistics by which a site is planned, and its kind; for an expert's site, those of that expert."""
        kind = kind_of(site)
        return (self, site) if kind == site else (self.once(site, lambda: self._of_expert(site, kind)), kind)

    def _of_expert(self, site: str, kind: str) -> LayerStatistics:
        def only(held: dict[str, Made]) -> dict[str, Made]:
            return {n: x for n, x in held.items() if n == kind_of(n)} | ({kind: held[site]} if site in held else {})

        parts = map(only, (self.ranges, self.calibrated, self.hessians, self.importance))
        return LayerStatistics(*parts, residual=self.residual)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what `make` gives, made at most once for each key: a second plan only makes what differs from the first.

        Args: key: everything that the result depends on beside these statistics.
        """
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


class SiteKey(NamedTuple):
    """All of a recipe that the plan of one site, or the rounding of one weight, depends on: bits, clusters, and the rest."""

    bits: int
    clusters: int
    rest: Hashable


class Method(ABC):
    """A quantisation method. Planning is pure; `apply_layer` builds a new block and does not change its inputs.

    Every method takes the recipe of one layer (`QuantRecipe.for_layer`).

    `keeps_ternary`: whether the method takes blocks whose weights are ternary already as they are; else it gets float weights.
    `takes_experts`: whether the method quantises mixtures of experts.
    """

    keeps_ternary = False
    takes_experts = False

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """Count the first positions of each window that are left out of the ranges and kept in float: none."""
        return 0

    def calibration_softmax_bits(self, recipe: QuantRecipe) -> int:
        """Return the bits of the softmax output while scales and Hessians are calibrated: 16, which needs no pass of its own."""
        return FLOAT_BITS

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """Say whether `apply_layer` reads Hessians, as GPTQ does: each costs a product of every input with itself."""
        return recipe.weights == "gptq" and recipe.tensor_bits.quantizes_weights

    def uses_exact_inputs(self, recipe: QuantRecipe) -> bool:
        """Say whether `apply_layer` reads `Streams.exact`, for which the unquantised model runs beside the quantised one."""
        return False

    def residual_order(self, layers: Iterable[Mapping[str, ChannelRanges]], recipe: QuantRecipe) -> Tensor | None:
        """Choose one order [D] int64 of the residual stream for all layers; None keeps the model's own.

        Args:
            layers: ranges of every layer's sites in the unquantised model, without the FLOAT_FIRST_TOKENS of each window; read
                only where an order is chosen.
            recipe: of the model.
        """
        return None

    def orders(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> dict[str, Tensor]:
        """Choose the `LayerPlan.orders` of one layer: no channel moves."""
        return {}

    def weight_grid(self, recipe: QuantRecipe) -> Grid:
        """Return the grid of the weights."""
        return Grid.EXACT

    def plan_layer(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> LayerPlan:
        """Decide orders, clusters, scales and bits of one layer from its statistics."""
        sites, bits = {site: self.plan_site(*stats.at(site), recipe, spec) for site in spec.sites}, recipe.tensor_bits
        weights = {name: bits.weight(name) for name in INPUT_SITE}
        return LayerPlan(self.orders(stats, recipe, spec), sites, bits.softmax, weights, self.sink_tokens(recipe))

    @abstractmethod
    def site_key(self, site: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `plan_site` depends on beside the statistics."""

    @abstractmethod
    def weight_key(self, name: str, recipe: QuantRecipe) -> SiteKey:
        """Collect what `fake_weight` of the linear layer `name` depends on beside the statistics."""

    @abstractmethod
    def plan_site(self, stats: LayerStatistics, site: str, recipe: QuantRecipe, spec: BlockSpec) -> SitePlan:
        """Decide clusters, scales and bits of one site."""

    def fake_site(self, plan: SitePlan, site: str, recipe: QuantRecipe, spec: BlockSpec) -> Fake | None:
        """Make the function that rounds a site as the quantised layer does; None where the site stays in float."""
        return fake_site(plan, self.sink_tokens(recipe))

    def fake_weight(self, linear: LinearLayer, name: str, plan: SitePlan, recipe: QuantRecipe, spec: BlockSpec) -> Tensor | None:
        """Round the weight [N, K] of a float layer to nearest, columns in the model's own order; None where it stays as it is.

        Args: plan: of the site that the layer reads.
        """
        return fake_weight(linear, plan, bits=recipe.tensor_bits.weight(name), grid=self.weight_grid(recipe))

    @abstractmethod
    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightError]]:
        """Build the quantised block that `plan` describes. Returns: (block, error of each fused weight by name)."""


def channel_importance(stats: LayerStatistics, spec: BlockSpec) -> dict[str, Tensor]:
    """Compute the weight of each channel's squared error by its effect on the next product: per site [C], original order.

        attn_in, o_in, mlp_in, down_in   mean square of the weight columns that read the channel
        q                                mean square of the key channel it is multiplied with
        k                                mean square of the query channels it is multiplied with, over the heads that share it
        v                                as o_in, over the query heads that share it
    """
    result = dict(stats.importance)
    q2 = stats.ranges["q"].rows.square().mean(0).view(spec.kv_heads, spec.groups, spec.head_dim)
    k2 = stats.ranges["k"].rows.square().mean(0).view(spec.kv_heads, 1, spec.head_dim)
    result["k"] = q2.mean(1).flatten()
    result["q"] = k2.expand(-1, spec.groups, -1).flatten()
    if "o_in" in result:
        result["v"] = result["o_in"].view(spec.kv_heads, spec.groups, spec.head_dim).mean(1).flatten()
    return result

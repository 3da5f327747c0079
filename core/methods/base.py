"""What a method is: it decides (a `LayerPlan`, pure data) and then builds a quantised layer from the decision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from core.models.adapter import BlockSpec
from core.models.block import DecoderBlock
from core.quant.observer import SitePlan
from core.quant.ranges import ChannelRanges
from core.recipe import FLOAT_BITS, QuantRecipe
from core.registry import Registry


@dataclass(frozen=True)
class LayerPlan:
    """Decisions for one decoder layer.

    Attributes:
        orders: R1 … R5 -> new = old[order]; [D], [Hkv, E] for R2 and R3, [F]. Left out: the order stays.
        sites: every site of `core.recipe.SITES`.
        softmax_bits, weight_bits: 2 to 8 or 16.
        sink_tokens: first positions whose activations stay in float.
    """

    orders: dict[str, Tensor]
    sites: dict[str, SitePlan]
    softmax_bits: int
    weight_bits: int
    sink_tokens: int


@dataclass(frozen=True)
class LayerStatistics:
    """What a method may look at when it plans a layer.

    Attributes:
        ranges: per site, channels in the original order; clusters are formed on these.
        calibrated: ranges for scales where a method calibrates apart from clustering; else the same object as `ranges`.
        hessians: Xᵀ X per linear input site, original order; empty when not asked for.
        importance: per linear input site [C], mean square of the weight columns that read it.
    """

    ranges: dict[str, ChannelRanges]
    calibrated: dict[str, ChannelRanges]
    hessians: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightNote:
    """How one weight matrix was quantised: bits, method used, signal to noise in dB, reason of a fallback, stored bits."""

    bits: int
    method: str
    sqnr_db: float
    fallback: str | None
    effective_bits: float


class Method(Protocol):
    """A quantisation method. `plan_layer` is pure; `apply_layer` builds a new block and leaves its inputs alone.

    `keeps_ternary`: whether blocks whose weights are ternary already are given as they are, not as float weights.
    """

    keeps_ternary: bool

    def sink_tokens(self, recipe: QuantRecipe) -> int:
        """First positions of each window left out of the ranges and kept in float."""

    def calibration_softmax_bits(self, recipe: QuantRecipe) -> int:
        """Bits of the softmax output while scales and Hessians are calibrated; 16 needs no pass of its own."""

    def uses_hessians(self, recipe: QuantRecipe) -> bool:
        """Whether `apply_layer` reads `LayerStatistics.hessians`, which cost a product of every input with itself."""

    def plan_layer(self, stats: LayerStatistics, recipe: QuantRecipe, spec: BlockSpec) -> LayerPlan:
        """Decide orders, clusters, scales and bits of one layer from its statistics."""

    def apply_layer(
        self, block: DecoderBlock, plan: LayerPlan, stats: LayerStatistics, recipe: QuantRecipe
    ) -> tuple[DecoderBlock, dict[str, WeightNote]]:
        """The quantised block that `plan` describes, and a note per weight."""


def rounds_by_gptq(recipe: QuantRecipe) -> bool:
    """Whether weights are quantised, and by GPTQ."""
    return recipe.weights == "gptq" and recipe.tensor_bits.weights < FLOAT_BITS


METHODS: Registry[Method] = Registry("method")

"""What a recipe does to one layer: plans on kept statistics, and the change a float block runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from core.errors import InputError
from core.methods import method
from core.methods.base import LayerStatistics, SiteKey
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.probe.layers import Change, float_twin
from core.probe.statistics import Statistics
from core.recipe import INPUT_SITE, SITES, QuantRecipe

CELLS = (*SITES, "softmax", *INPUT_SITE)
"""What can be quantised in one layer: the seven sites, the softmax output, and the weights of the four linear layers."""


def cell_name(layer: int, cell: str) -> str:
    """Return the name of a cell: "layers.3.k"."""
    return f"layers.{layer}.{cell}"


def require_cell(model: CausalModel, layer: int, cell: str) -> None:
    """Check that a layer and a cell exist. Raises: InputError E-PARAM-SITE."""
    last = len(model.blocks) - 1
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= last or cell not in CELLS:
        name = f"layers.{str(layer)[:10]}.{str(cell)[:20]}"
        raise InputError(f"{name} does not exist: use layers 0 to {last} with {', '.join(CELLS)}.", code="E-PARAM-SITE")


@dataclass(frozen=True)
class Layer:
    """One layer of a model beside its recipe.

    Attributes:
        block: the float block. own: what the model itself has at its sites.
        stats: of the layer, as the recipe's method wants them.
        source: the block whose weights the method rounds.
    """

    block: DecoderBlock
    own: Change
    stats: LayerStatistics
    recipe: QuantRecipe
    source: DecoderBlock

    @classmethod
    def of(cls, model: CausalModel, index: int, statistics: Statistics, recipe: QuantRecipe) -> Layer:
        """Look at layer `index`."""
        planner, source = method(recipe.method), model.blocks[index]
        block, own = float_twin(source)
        stats = statistics.of_layer(planner, index, recipe)
        return cls(block, own, stats, recipe.for_layer(index), source if planner.keeps_ternary else block)

    def own_site(self, site: str, x: Tensor) -> Tensor:
        """Return what the model itself has at a site where its block computes x [B, T, C]."""
        return self.own.sites[site](x) if site in self.own.sites else x

    def change(self, cell: str) -> Change:
        """Return what the recipe does to one cell, everything else staying as it is in the model."""
        planner, spec, bits = method(self.recipe.method), self.block.spec, self.recipe.tensor_bits
        if cell == "softmax":
            return Change(self.own.sites, {}, bits.softmax)
        plan = planner.plan_site(self.stats, INPUT_SITE.get(cell, cell), self.recipe, spec)
        if cell in INPUT_SITE:
            found = planner.fake_weight(self.source.linears()[cell], cell, plan, self.recipe, spec)
            return Change(self.own.sites, {} if found is None else {cell: found})
        fake = planner.fake_site(plan, cell, self.recipe, spec)
        others = {site: own for site, own in self.own.sites.items() if site != cell}  # the recipe's rules replace the model's
        return Change(others if fake is None else {**others, cell: fake})

    def whole_change(self) -> Change:
        """Return what the recipe does to the whole layer."""
        sites, weights = {}, {}
        for cell in CELLS:
            found = self.change(cell)
            if cell in found.sites and cell in SITES:
                sites[cell] = found.sites[cell]
            weights |= found.weights
        return Change(sites, weights, self.recipe.tensor_bits.softmax)


def cell_key(recipe: QuantRecipe, cell: str) -> SiteKey:
    """Collect all of a layer's recipe that the divergence of a cell depends on, beside the model and the statistics."""
    planner = method(recipe.method)
    if cell == "softmax":
        return SiteKey(recipe.tensor_bits.softmax, 1, None)
    return planner.weight_key(cell, recipe) if cell in INPUT_SITE else planner.site_key(cell, recipe)

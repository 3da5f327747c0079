"""Write the diagram of a decoder layer: its operations, and between them the reorderings."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from app.view import texts
from app.view import texts_guide as words
from app.view.names import model_name, short_name
from core.recipe import REORDER_OF, REORDERS, SITES, QuantRecipe


def diagram(recipe: QuantRecipe, layer: int, sites: Mapping[str, Any], chosen: str) -> str:
    """Write the diagram; each place with a reordering is a button with the site's place in `SITES`.

    Args:
        recipe: of the whole model. sites: SiteRanges of this layer, by kind. chosen: the kind that the charts show.
    """
    own = recipe.for_layer(layer)
    off = {name: reason for name in REORDERS if (reason := why_off(name, own))}
    halves = []
    for half in words.FUSED_FLOW:
        parts = [
            f'<span class="qs-op">{escape(part)}</span>'
            if isinstance(part, str)
            else f'<span class="qs-fork">{"".join(_place(own, kind, sites[kind], kind == chosen, off) for kind in part)}</span>'
            for part in half
        ]
        halves.append(f'<div class="qs-flow">{"".join(parts)}</div>')
    said = words.FUSED_SAID.format(
        layer=layer,
        model=model_name(recipe.model),
        recipe=short_name(recipe, recipe.label()),
        count=len(REORDERS) - len(off),
    )
    where, note = words.FUSED_WHERE, words.FUSED_NOTE
    if recipe.order == "shared":
        where, note = where | dict.fromkeys(("R1", "R4"), words.FUSED_SHARED), words.FUSED_SHARED_NOTE
    facts = "".join(f"<div><dt>{name}</dt><dd>{escape(off.get(name, where[name]))}</dd></div>" for name in REORDERS)
    return (
        f'<div class="qs-fused"><h2>{escape(words.FUSED)}</h2><p class="qs-caption">{escape(said)}</p>{"".join(halves)}'
        f'<div class="qs-facts"><dl>{facts}</dl></div><p class="qs-caption">{escape(note)}</p></div>'
    )


def why_off(name: str, recipe: QuantRecipe) -> str:
    """Say why a reordering is not made in a layer with this recipe; "" if it is."""
    if not recipe.reorderings:
        return words.OFF_METHOD.format(recipe.method.upper())
    if name not in recipe.reorderings:
        return words.OFF_FLOAT
    return words.OFF_ONE if getattr(recipe.clusters, name) == 1 else ""


def _place(recipe: QuantRecipe, kind: str, site: Any, chosen: bool, off: Mapping[str, str]) -> str:
    """Write the button of one site: lit where its reordering is on, with its clusters, channels and bits."""
    name, width, block = REORDER_OF[kind], len(site.low), site.block
    clusters = words.FUSED_PER_HEAD if block < width else words.FUSED_CLUSTERS
    facts = words.OFF if name in off else clusters.format(min(getattr(recipe.clusters, name), block))
    pattern = words.FUSED_HEADS if block < width else words.FUSED_WIDTH
    size = pattern.format(channels=block, heads=width // block, bits=recipe.tensor_bits.site(kind))
    lit = "" if name in off else " qs-lit"
    return (
        f'<button type="button" class="qs-place{lit}" data-index="{SITES.index(kind)}" aria-pressed="{str(chosen).lower()}">'
        f"<b>{escape(texts.site_label(kind))}</b><span>{escape(facts)}</span><span>{escape(size)}</span></button>"
    )

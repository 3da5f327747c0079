"""The diagram of the reorderings under the charts of the tab Reorder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gradio as gr

from app.context import LIGHT, Context, Updates
from app.session import Session
from app.view import fused
from app.view import texts_guide as texts
from app.view.chart import Table, picked_row
from core.errors import QuantscopeError
from core.recipe import SITES, QuantRecipe


class Fused:
    """The diagram, and the handlers that draw it and that show a clicked site."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.html = Table(label=texts.FUSED_LABEL, elem_id="fused", elem_classes="qs-card")

    def wire(
        self,
        recipe: Callable[[Updates], QuantRecipe],
        inputs: set,
        triggers: Sequence[Callable],
        shown: Callable[[Session], Updates],
        targets: list,
    ) -> None:
        """Connect the events.

        Args:
            recipe: returns the recipe of the fields' values. inputs: these fields.
            triggers: events after which recipe, layer, site or model are others.
            shown: shown(session): updates of `targets`, everything that a chosen site changes.
        """
        self.recipe_of, self.shown = recipe, shown
        guard, key, status = self.ctx.guard, self.ctx.key, [self.ctx.status, self.ctx.stop]
        light = {**LIGHT, "trigger_mode": "always_last"}
        for trigger in triggers:
            trigger(guard(self.draw), {key, *inputs}, [self.html, *status], **light)
        self.html.select(guard(self.chosen), {key}, [*targets, *status], **light)

    def draw(self, values: Updates) -> Updates:
        """Draw the diagram for the recipe of the fields and the chosen layer, if the tab is open."""
        session = self.ctx.session(values)
        if session.ranges is None or session.tab != "reorder":
            return {}
        try:
            recipe = self.recipe_of(values)
        except QuantscopeError:
            return {}  # a field that is being filled in: whoever uses the recipe says what is missing
        layer, kind = session.selection.layer, session.selection.kind
        sites = {site.kind: site for site in session.ranges.sites.values() if site.layer == layer}
        return {self.html: fused.diagram(recipe, layer, sites, kind)}

    def chosen(self, values: Updates, event: gr.EventData) -> Updates:
        """Show the site whose place in the diagram was clicked."""
        session, place = self.ctx.session(values), picked_row(event)
        if session.ranges is None or not 0 <= place < len(SITES):
            return {}
        if SITES[place] != session.selection.kind:
            session.selection.kind, session.selection.channel = SITES[place], None
        return self.shown(session)

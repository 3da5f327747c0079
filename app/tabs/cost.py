"""The panel of the tab Quantise that shows what a recipe costs: predicted, then measured."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import gradio as gr

from app import engine
from app.context import Context, Updates
from app.session import Costs, Session
from app.tabs.explore import select_widest
from app.tabs.measured import QUICK_TOKENS, window_of
from app.view import cards, cost
from app.view import texts_divergence as texts
from app.view.chart import Chart, Table, picked_row, sent
from app.view.names import short_name
from app.worker.job import Step
from core.errors import InputError
from core.recipe import INPUT_SITE, QuantRecipe

QUICK_SECONDS = 0.1
"""Time for a prediction while a slider moves; parts not reached by then are read off neighbouring choices, and computed next."""


class Cost:
    """The panel: its widgets, and the handlers that predict and measure the recipe of the fields."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.before = gr.HTML(cards.hint(texts.BEFORE_WAIT), elem_id="before-start", apply_default_css=False)
        self.card = gr.HTML(cards.hint(texts.COST_WAIT), elem_id="cost", apply_default_css=False)
        with gr.Accordion(texts.WHERE, open=True, elem_id="where-panel"):
            self.blame = gr.HTML("", elem_id="blame", apply_default_css=False)
            self.map = Chart(None, label=texts.WHERE_LABEL, height=360, elem_id="where", visible=False)
            self.swaps = gr.Button(texts.SWAPS, size="sm", elem_id="swaps", visible=False)
            self.note = gr.HTML("", elem_id="swaps-note", apply_default_css=False)
            with gr.Accordion(texts.WHERE_TABLE, open=False):
                self.table = Table(label=texts.WHERE_TABLE, elem_id="where-table")
            with gr.Accordion(texts.LEARN_COST_TITLE, open=False):
                gr.Markdown(texts.LEARN_COST)

    @property
    def outputs(self) -> list:
        """Components that another recipe changes."""
        return [self.before, self.card, self.blame, self.map, self.swaps, self.note, self.table]

    def wire(self, recipe: Callable[[Updates], QuantRecipe], inputs: set, opened: Callable, triggers: list[Callable]) -> None:
        """Connect the panel.

        Args:
            recipe: returns the recipe of the fields' values. inputs: these fields.
            opened: the event of the tab's opening. triggers: events after which the recipe is another one.
        """
        self.recipe_of = recipe
        shown = [*self.outputs, self.ctx.status, self.ctx.stop]
        for trigger in triggers:
            self.ctx.on(trigger, self.changed, {self.ctx.key, *inputs}, shown)
        self.ctx.on(opened, self.opened, {self.ctx.key, *inputs}, shown)
        self.ctx.on(self.swaps.click, self.measure_parts, {self.ctx.key}, shown)

    async def opened(self, values: Updates) -> AsyncIterator[Updates]:
        """Predict the recipe of the fields when the tab is opened."""
        async for updates in self.follow(self.ctx.session(values), self.recipe_of(values)):
            yield updates

    async def changed(self, values: Updates) -> AsyncIterator[Updates]:
        """Predict the recipe of the fields after a change, if the tab is open."""
        session = self.ctx.session(values)
        if session.tab == "quantize":
            async for updates in self.follow(session, self.recipe_of(values)):
                yield updates

    async def follow(self, session: Session, recipe: QuantRecipe) -> AsyncIterator[Updates]:
        """Predict a recipe; when no newer one comes, measure it too."""
        if session.info is None or session.info.name != recipe.model:
            return
        if session.costs.recipe == recipe and None not in (session.costs.measured, session.costs.estimate):
            yield self.render(session)
            return
        if session.costs.recipe != recipe:
            kept = session.costs.recipe is not None and session.costs.recipe.model == recipe.model
            fresh = {"recipe": recipe, "measured": None, "swaps": {}, "estimate": None}
            session.costs = replace(session.costs, **fresh) if kept else Costs(recipe)
        quick = {"recipe": recipe, "seconds": QUICK_SECONDS}
        size = {"tokens": QUICK_TOKENS, "window": window_of(session.info)}
        estimate = [("estimate", Step("estimate", {"recipe": recipe, **size}, texts.BEFORE, 0.5))]
        parts = [
            ("probe", Step("probe", {"recipe": recipe}, "Reading the probe", 5.0)),
            ("predicted", Step("predict", quick, "Predicting the cost", 0.2)),
            ("predicted", Step("predict", {"recipe": recipe}, "Predicting the cost", 1.0)),
            ("measured", Step("measure", {"recipe": recipe}, "Measuring on the probe", 1.0)),
        ]
        parts = [*estimate, *parts] if session.costs.probe is None else [*parts, *estimate]  # a moving control waits for neither
        seen = 0
        async for job in self.ctx.follow(session, "cost", [step for _, step in parts]):
            if session.costs.recipe != recipe:
                return
            new = job.results[seen:]
            for (name, _), found in zip(parts[seen:], new, strict=False):
                setattr(session.costs, name, found)
            seen += len(new)
            if new and "predicted" in (name for name, _ in parts[:seen]):
                yield self.render(session, busy="" if job.finished else texts.COST_MEASURING)
            elif new and session.costs.estimate is not None:
                yield {self.before: cost.before_start(session.costs.estimate)}
            elif session.costs.predicted is None:
                yield {self.card: cards.hint(f"{job.stage or texts.COST_LINE}: {texts.COST_READING}")}

    def render(self, session: Session, busy: str = "") -> Updates:
        """Show the card, the map and the table of the session's costs."""
        costs, hidden = session.costs, gr.update(visible=False)
        before = {self.before: cost.before_start(costs.estimate)} if costs.estimate is not None else {}
        if costs.predicted is None:
            return {**before, self.card: cards.hint(texts.COST_WAIT), self.map: hidden, self.swaps: hidden}
        cells, run = costs.predicted.cells, session.run(costs.recipe.hash)
        bytes_ = engine.recipe_bytes(session.info, costs.recipe)
        rows = cost.where_rows(cells, costs.swaps)
        note = cost.swaps_note(cells, costs.swaps, costs.control, costs.measured) if costs.swaps else ""
        label = short_name(costs.recipe, costs.recipe.label())
        return {
            **before,
            self.card: cost.cost_card(label, costs, run.evaluation if run else None, bytes_, session.info.caution, busy),
            self.blame: f'<p class="qs-verdict">{cost.blame(cells)}</p>',
            self.map: gr.update(
                value=cost.where_map(cells, costs.swaps, session.info.layers, revision=costs.recipe.model), visible=True
            ),
            self.swaps: gr.update(visible=bool(cells)),
            self.note: note,
            self.table: cards.table(texts.WHERE_HEADERS, rows, pick=True, caption=texts.WHERE_PICK) if rows else "",
        }

    def choose(self, session: Session, event: gr.EventData) -> None:
        """Select the site of a part that was clicked in the map or the table; for weights, the site that they read.

        Raises: InputError if the part has no channels, or if the observed ranges are not those of the recipe's model.
        """
        shown, costs = session.ranges, session.costs
        if shown is None or costs.predicted is None or shown.model != costs.recipe.model:
            raise InputError(texts.WHERE_OTHER, code="E-PARAM-SITE")
        custom = sent(event, "custom")
        ranked, row = cost.ranked(costs.predicted.cells), picked_row(event)
        name = ranked[row] if 0 <= row < len(ranked) else custom[0] if isinstance(custom, list) and custom else ""
        layer, _, cell = str(name).rpartition(".")
        site = shown.sites.get(f"{layer}.{INPUT_SITE.get(cell, cell)}")
        if site is None:
            raise InputError(texts.WHERE_NONE, code="E-PARAM-SITE")
        select_widest(session, site)

    async def measure_parts(self, values: Updates) -> AsyncIterator[Updates]:
        """Measure every part of the shown recipe alone, and nothing as the control; the map fills in."""
        session = self.ctx.session(values)
        recipe, predicted = session.costs.recipe, session.costs.predicted
        if recipe is None or predicted is None:
            raise InputError(texts.COST_WAIT, code="E-PARAM-RECIPE")
        parts = cost.ranked(predicted.cells)
        places = [(0, None), *map(cost.split, parts)]
        steps = [
            Step("swap", {"recipe": recipe, "layer": layer, "cell": cell}, f"Layer {layer}, {texts.WHERE_ROWS.get(cell, '')}")
            for layer, cell in places
        ]
        seen = 0
        async for job in self.ctx.follow(session, "swaps", steps):
            if session.costs.recipe != recipe:
                return
            for (layer, cell), found in zip(places[seen:], job.results[seen:], strict=False):
                if cell is None:
                    session.costs.control = found.kld
                else:
                    session.costs.swaps[f"layers.{layer}.{cell}"] = found
            news, seen = len(job.results) > seen, len(job.results)
            shown = self.render(session) if news else {}
            yield {**shown, **(self.ctx.rest(session) if job.finished else self.ctx.busy(job, texts.SWAPS))}

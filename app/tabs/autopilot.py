"""The section of the tab Quantise that spends a budget of bytes on the bits of single layers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from app import engine
from app.context import LIGHT, Context, Updates
from app.session import Session
from app.view import autopilot, cards
from app.view import texts_layers as texts
from app.worker.job import Step
from core.checks import require_float
from core.errors import InputError
from core.probe.report import CONTEXT, require_context
from core.recipe import SCHEMES, Overrides, QuantRecipe

MEGABYTE = 1e6


@dataclass
class Spent:
    """An allocation for a recipe, and what was measured on the probe: of the new recipe, and of its uniform rival."""

    recipe: QuantRecipe
    found: Any
    measured: Any = None
    rival: Any = None

    @property
    def made(self) -> QuantRecipe:
        """The recipe with the bits that were chosen."""
        return replace(self.recipe, overrides=Overrides.from_dict(self.found.overrides))


class Autopilot:
    """The section: its widgets, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Accordion(texts.AUTOPILOT, open=False, elem_id="autopilot") as self.panel:
            gr.Markdown(texts.AUTOPILOT_INFO, elem_classes="qs-caption")
            with gr.Row():
                choices = [(label, name) for name, label in texts.BY.items()]
                self.by = gr.Radio(choices, value="bytes", label=texts.BY_LABEL, min_width=150, scale=1, elem_id="budget-by")
                self.size = gr.Slider(0, 100, 50, label=texts.BYTES_LABEL, min_width=240, scale=3, elem_id="budget", buttons=[])
                self.kld = gr.Number(0.05, label=texts.KLD_LABEL, visible=False, min_width=240, scale=3, elem_id="budget-kld")
                self.context = gr.Number(
                    CONTEXT, precision=0, label=texts.CONTEXT_LABEL, min_width=120, scale=1, elem_id="budget-context"
                )
            self.marks = gr.Radio(list(SCHEMES), value=None, label=texts.MARKS_LABEL, elem_id="budget-marks")
            self.spread = gr.Checkbox(False, label=texts.SPREAD, container=False, elem_id="spread")
            self.start = gr.Button(texts.SPEND, size="sm", elem_id="spend")
            self.card = gr.HTML("", elem_id="spent", apply_default_css=False)
            self.map = gr.HTML("", elem_id="spent-map", apply_default_css=False)
            self.use = gr.Button(texts.USE, size="sm", visible=False, elem_id="use-spent")
            with gr.Row(equal_height=True):
                self.within = gr.Number(5, label=texts.WITHIN, min_width=240, elem_id="within")
                with gr.Column(min_width=180, elem_classes="qs-tight"):
                    self.find = gr.Button(texts.SMALLEST, size="sm", elem_id="find-g")
            self.smallest = gr.HTML("", elem_id="smallest-g", apply_default_css=False)

    @property
    def outputs(self) -> list:
        """Components that an allocation changes."""
        return [self.card, self.map, self.use]

    def wire(
        self,
        recipe: Callable[[Updates], QuantRecipe],
        inputs: set,
        opened: list[Callable],
        fill: Callable[[QuantRecipe], Updates],
    ) -> Callable:
        """Connect the section.

        Args:
            recipe: returns the recipe of the fields' values. inputs: these fields.
            opened: events after which the range of the budget is another one. fill: updates that set the fields to a recipe.
        Returns: the event after which a chosen recipe is in the fields.
        """
        self.recipe_of, self.fill = recipe, fill
        guard, status = self.ctx.guard, [self.ctx.status, self.ctx.stop]
        every = {self.ctx.key, self.by, self.size, self.kld, self.context, self.marks, self.spread, *inputs}
        limits = [self.size, self.marks, *status]
        for event in (*opened, self.panel.expand, self.context.change):
            event(guard(self.offered), every, limits, **LIGHT)
        self.by.input(self.chosen, self.by, [self.size, self.marks, self.kld], **LIGHT)
        spent = [self.size, self.marks, *self.outputs, *status]
        self.ctx.on(self.size.release, self.slid, every, spent)
        self.ctx.on(self.marks.input, self.spend, every, spent)
        self.ctx.on(self.start.click, self.spend, every, spent)
        self.ctx.on(self.find.click, self.find_g, {self.ctx.key, self.within, *inputs}, [self.smallest, *status])
        fields = [*fill(QuantRecipe("m")), *status]
        return self.use.click(guard(self.used), {self.ctx.key}, fields, **LIGHT).then

    def chosen(self, by: object) -> Updates:
        """Show the field of a budget in bytes or of a bound on the divergence."""
        return {part: gr.update(visible=(by == "kld") == (part is self.kld)) for part in (self.size, self.marks, self.kld)}

    def offered(self, values: Updates) -> Updates:
        """Set the slider's range to what 2 to 8 bits take, and name what uniform schemes take."""
        session = self.ctx.session(values)
        if session.info is None:
            return {}
        recipe = self.recipe_of(values)
        if recipe.method == "bitnet":
            return {}
        points = engine.budgets(session.info, recipe, self._context(values))
        low, high = (points.pop(end) / MEGABYTE for end in ("least", "most"))
        digits = 4 - len(str(int(high - low)))  # some thousand steps
        step, size = 10.0**-digits, values[self.size]
        if not isinstance(size, (int, float)) or not low <= size <= high:
            size = points.get(recipe.scheme, points["W4A4KV"]) / MEGABYTE
        low, high = round(low + step, digits), round(high, digits)
        return {
            self.size: gr.update(minimum=low, maximum=high, step=step, value=min(max(size, low), high)),
            self.marks: gr.update(choices=autopilot.marks(points)),
        }

    def _context(self, values: Updates) -> int:
        return require_context(values[self.context])

    async def slid(self, values: Updates) -> AsyncIterator[Updates]:
        """Choose bits for what the slider says."""
        yield {self.marks: None}
        async for updates in self.spend(values | {self.marks: None}):
            yield updates

    async def spend(self, values: Updates) -> AsyncIterator[Updates]:
        """Choose bits for the budget, then measure the result and its uniform rival on the probe."""
        session, recipe = self.ctx.session(values), self.recipe_of(values)
        if session.info is None or session.info.name != recipe.model:
            raise InputError(texts.OPEN_FIRST, code="E-PARAM-MODEL")
        context, limits = self._context(values), {"activations": bool(values[self.spread])}
        if values[self.by] == "kld":
            limits["bound"] = require_float("bound", values[self.kld], 0, 100, "give nats per token, 0 to 100")
        elif values[self.marks] is not None:
            points = engine.budgets(session.info, recipe, context)
            mark = values[self.marks]
            if mark not in SCHEMES:
                raise InputError(f"Scheme {str(mark)[:40]!r} is not known: choose one of the list.", code="E-PARAM-SCHEME")
            limits["budget"] = points[mark]
            yield {self.size: points[mark] / MEGABYTE}
        else:
            megabytes = require_float("budget", values[self.size], 0, 1e9, "give megabytes")
            limits["budget"] = megabytes * MEGABYTE
        step = Step("allocate", {"recipe": recipe, "context": context, **limits}, texts.AUTOPILOT, 3.0)
        async for job in self.ctx.follow(session, "autopilot", [step]):
            yield self.ctx.busy(job, texts.AUTOPILOT)
        spent = session.spent = Spent(recipe, job.results[0])
        yield self.render(session)
        rival = spent.found.rival
        recipes = [spent.made, *([recipe.with_bits(rival.bits)] if rival is not None else [])]
        steps = [Step("measure", {"recipe": made}, texts.AUTOPILOT) for made in recipes]
        async for job in self.ctx.follow(session, "autopilot", steps):
            spent.measured, spent.rival = [*job.results, None, None][:2]
            yield {**self.render(session), **self.ctx.busy(job, texts.AUTOPILOT)}
        yield {**self.render(session), **self.ctx.rest(session)}

    def render(self, session: Session) -> Updates:
        """Show the session's allocation."""
        spent = session.spent
        if spent is None:
            return {}
        return {
            self.card: autopilot.card(spent.found, spent.measured, spent.rival, self._rank(session)),
            self.map: autopilot.bits_map(spent.found.bits),
            self.use: gr.update(visible=True),
        }

    def _rank(self, session: Session) -> str:
        """Say how a run of the allocation stands among the session's uniform runs of the same model."""
        made, own = session.spent.made, session.run(session.spent.made.hash)
        runs = [run for run in session.runs if run.recipe is not None and run.model == made.model]
        uniform = [
            (session.title(run), report)
            for run in runs
            if not run.recipe.overrides.entries
            for report in run.measured.values()
            if report.kld_mean is not None
        ]
        return autopilot.ranked(own and own.evaluation, uniform, session.spent.found.context)

    async def find_g(self, values: Updates) -> AsyncIterator[Updates]:
        """Find the smallest g of the recipe of the fields that is near one cluster per channel, both predicted."""
        session, recipe = self.ctx.session(values), self.recipe_of(values)
        within = require_float("within", values[self.within], 0, 1000, "give per cent, 0 to 1000") / 100
        step = Step("smallest_g", {"recipe": recipe, "within": within}, texts.SMALLEST, 3.0)
        async for job in self.ctx.follow(session, "smallest_g", [step]):
            yield self.ctx.busy(job, texts.SMALLEST)
        yield {self.smallest: autopilot.smallest(job.results[0]), **self.ctx.rest(session)}

    def used(self, values: Updates) -> Updates:
        """Put the allocated recipe into the fields."""
        session = self.ctx.session(values)
        if session.spent is None:
            raise InputError(texts.SPEND_FIRST, code="E-PARAM-RECIPE")
        return {**self.fill(session.spent.made), self.ctx.status: cards.note(texts.USE, texts.USED)}

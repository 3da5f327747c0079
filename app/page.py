"""The whole page: side, status line, five tabs, and the events that join them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.context import HEAVY, LIGHT, Context, Updates, observe_steps
from app.session import Session
from app.tabs.bitnet import BitNet
from app.tabs.compare import Compare
from app.tabs.explore import Explore
from app.tabs.quantize import QUICK_TOKENS, Quantize
from app.tabs.reorder import MAX_CLUSTERS, Reorder
from app.tabs.sidebar import PASTE, Sidebar
from app.view import cards, tables, texts
from app.view.chart import serve_script
from core.errors import InputError, QuantscopeError
from core.folders import state_of
from core.recipe import Calibration, Clusters, QuantRecipe

SAVE_JS = """(file) => {
  if (!file) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([file.text], { type: file.type }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
LINK_JS = """(query) => {
  const url = `${location.origin}${location.pathname}?${query}`;
  if (navigator.clipboard) navigator.clipboard.writeText(url).catch(() => {});
  return url;
}"""
CLOSE_JS = """
  const side = document.querySelector('#side');
  if (window.innerWidth < 768 && side?.classList.contains('open')) side.querySelector('.toggle-button')?.click();
"""
"""On a phone the side covers the page: put it away once it has been used."""
TAB_JS = """() => {
  const tabs = [...document.querySelectorAll('#tabs button[role=tab]')];
  tabs.find((tab) => tab.textContent.trim() === '%s' && tab.offsetParent)?.click();
  window.scrollTo({ top: 0 });
  %s
}"""


def build_app(ctx: Context) -> gr.Blocks:
    """The page, ready to launch."""
    serve_script()
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        page = Page(ctx)
        page.wire(demo)
    return demo


class Page:
    """The page's parts, and the events that concern more than one of them."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        ctx.key = gr.State(None, time_to_live=int(ctx.settings.session_seconds))
        self.side = Sidebar(ctx.settings.model, on_space=ctx.settings.on_space)
        with gr.Row(elem_id="status-row", equal_height=True):
            ctx.status = gr.HTML(cards.starting(), elem_id="status", scale=10, apply_default_css=False)
            ctx.stop = gr.Button(texts.STOP, visible=False, elem_id="stop", size="sm", scale=0, min_width=90)
        with gr.Tabs(selected="explore", elem_id="tabs", overflow_behavior="wrap"):
            self.explore = Explore(ctx)
            self.reorder = Reorder(ctx)
            self.quantize = Quantize(ctx, self.side)
            self.compare = Compare(ctx)
            self.bitnet = BitNet(ctx)
        self.saved = gr.JSON(None, visible=False)

    def wire(self, demo: gr.Blocks) -> None:
        """Connect all events of the page."""
        ctx, side = self.ctx, self.side
        self._wire_steps()  # first: of one click's listeners, Gradio runs those after a stream only when it has ended
        self.quantize.wire(self.compare.choices, [self.compare.runs])
        self.compare.wire()
        self.bitnet.wire()
        observed = self._wire_side()
        self._wire_saving()
        demo.load(None, None, None, js=f"() => {{{CLOSE_JS}}}", api_visibility="private")
        filled = self.fill(default_recipe(ctx))
        outputs = list(dict.fromkeys([ctx.key, *filled, *self.range_outputs]))
        opened = demo.load(
            ctx.guard(self.opened), None, outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private"
        )
        self.explore.wire([opened, observed])
        self.reorder.wire([side.clusters, *self.quantize.clusters.values()], [opened, observed])
        demo.unload(self.closed)

    def _wire_side(self) -> Any:
        ctx, side = self.ctx, self.side
        side.observe.click(None, None, None, js=f"() => {{{CLOSE_JS}}}", show_progress="hidden", api_visibility="private")
        side.text.input(lambda choice: gr.update(visible=choice == PASTE), side.text, side.pasted, **LIGHT)
        ctx.stop.click(ctx.guard(self.stopped), {ctx.key}, [ctx.status, ctx.stop], **LIGHT)
        return side.observe.click(ctx.guard(self.observe_clicked), {ctx.key, *side.source}, self.range_outputs, **HEAVY)

    def _wire_saving(self) -> None:
        ctx, side = self.ctx, self.side
        inputs = {ctx.key, *side.source, *side.recipe, *self.quantize.inputs}
        status = [ctx.status, ctx.stop]
        files = {
            side.save_recipe: self.recipe_file,
            side.save_ranges: self.ranges_file,
            side.save_report: self.report_file,
        }
        for button, handler in files.items():
            written = button.click(ctx.guard(handler), inputs, [self.saved, *status], **LIGHT)
            written.then(None, self.saved, None, js=SAVE_JS, api_visibility="private")
        side.link.click(ctx.guard(self.link), inputs, [side.link_text, *status], **LIGHT).success(
            None, side.link_text, side.link_text, js=LINK_JS, api_visibility="private"
        )

    def _wire_steps(self) -> None:
        """The buttons that lead to the next tab."""
        steps = {
            self.explore.forward: texts.REORDER,
            self.reorder.forward: texts.QUANTIZE_TAB,
            self.quantize.forward: texts.COMPARE,
            self.side.quantize: texts.QUANTIZE_TAB,
        }
        for button, label in steps.items():
            button.click(None, None, None, js=TAB_JS % (label, CLOSE_JS), show_progress="hidden", api_visibility="private")

    @property
    def range_outputs(self) -> list:
        """Targets of `show_ranges`."""
        selectors = [self.reorder.layer, self.reorder.kind, self.reorder.clusters]
        return [*self.explore.outputs, *selectors, self.compare.runs, self.ctx.status, self.ctx.stop]

    def show_ranges(self, session: Session) -> Updates:
        """Explore for new ranges, the selectors of Reorder, and the base model among the runs."""
        return {
            **self.explore.render(session),
            **self.explore.glance(session),
            **self.reorder.controls(session),
            **self.compare.choices(session),
            **self.ctx.rest(session),
        }

    def fill(self, recipe: QuantRecipe) -> Updates:
        """All fields of the recipe, set to `recipe`."""
        return {**self.side.fill(recipe), **self.quantize.fill(recipe)}

    async def opened(self, request: gr.Request) -> AsyncIterator[Updates]:
        """Start a session: fill the fields from the link, and show the ranges of its model."""
        ctx = self.ctx
        session = ctx.sessions.open(str(request.session_hash))
        yield {ctx.key: session.key}
        recipe, refused = default_recipe(ctx), None
        if query := urlencode(dict(request.query_params)):
            try:
                if request.query_params.get("method") == "rtn":
                    recipe = replace(recipe, weights="rtn")  # as the method's name says, unless the link says otherwise
                recipe = QuantRecipe.from_query(query, default=recipe)
                yield self.fill(recipe)
            except QuantscopeError as error:
                refused = error  # a damaged link opens the default model and says so at the end
        session.selection.clusters = min(recipe.clusters.R1, MAX_CLUSTERS)
        text = recipe.calibration.text if recipe.calibration.text in texts.TEXT_NAMES else ctx.settings.text
        calibration = Calibration(text, ctx.settings.first_tokens)
        async for updates in self.observe(session, recipe.model, recipe.revision, calibration):
            yield updates
        if refused:
            yield ctx.failed(refused)

    def closed(self, request: gr.Request) -> None:
        """Stop the jobs of a browser tab that was closed."""
        session = self.ctx.sessions.of_tab(str(request.session_hash))
        if session is not None:
            self.ctx.runner.cancel_all(session.key)

    async def observe_clicked(self, values: Updates) -> AsyncIterator[Updates]:
        """Observe the ranges of the model and text at the side."""
        model, revision = self.side.chosen_model(values)
        async for updates in self.observe(self.ctx.session(values), model, revision, self.side.calibration(values)):
            yield updates

    async def observe(
        self, session: Session, model: str, revision: str | None, calibration: Calibration
    ) -> AsyncIterator[Updates]:
        """Show the ranges of a model on a text: known ones, those being made for everyone, or those of a job of this session."""
        ctx = self.ctx
        results = ctx.known_ranges(model, revision, calibration)
        if results is None:
            public = ctx.prefetching(model, revision, calibration)
            if public:
                jobs = ctx.watch(session, "observe", ctx.prefetch)
            else:
                jobs = ctx.follow(session, "observe", observe_steps(model, revision, calibration))
            try:
                async for job in jobs:
                    if job.finished:
                        results = job.results
                    else:
                        yield ctx.busy(job, f"Opening {model}", stoppable=not public)
            except QuantscopeError:
                if session.ranges is None:
                    yield self.explore.render(session)  # not “starting” any more
                raise
            ctx.share_ranges(model, revision, calibration, results)
        elif older := session.jobs.pop("observe", None):
            ctx.runner.cancel(session.key, older)
        session.info, session.ranges = results
        session.models[model] = session.info
        session.calibration, session.channel = calibration, None
        session.base_run(model, state_of(model))
        widest = session.ranges.outliers(1)[0]
        chosen = session.selection
        chosen.layer, chosen.kind, chosen.channel = widest.layer, widest.kind, widest.channel
        yield await asyncio.to_thread(self.show_ranges, session)

    def stopped(self, values: Updates) -> Updates:
        """Stop every job of the session."""
        session = self.ctx.session(values)
        count = self.ctx.runner.cancel_all(session.key)
        return {self.ctx.stop: gr.update(visible=False)} if count else self.ctx.rest(session)

    def calm(self, values: Updates) -> Updates:
        """Take away an earlier error's card; a running job's line stays."""
        session = self.ctx.session(values)
        return {} if session.jobs else self.ctx.rest(session)

    def recipe_file(self, values: Updates) -> Updates:
        """Hand out the recipe as JSON."""
        recipe = self.quantize.recipe(values)
        saved = {"name": f"recipe-{recipe.hash}.json", "type": "application/json", "text": recipe.to_json()}
        return self.calm(values) | {self.saved: saved}

    def ranges_file(self, values: Updates) -> Updates:
        """Hand out every channel's range as CSV."""
        report = self.ctx.session(values).ranges
        if report is None:
            raise InputError(texts.NO_RANGES, code="E-PARAM-RANGES")
        text = tables.ranges_csv(report)
        return self.calm(values) | {self.saved: {"name": f"ranges-{report.tokens}-tokens.csv", "type": "text/csv", "text": text}}

    def report_file(self, values: Updates) -> Updates:
        """Hand out all runs of the session as JSON."""
        text = tables.report_json(self.ctx.session(values).runs)
        return self.calm(values) | {self.saved: {"name": "report.json", "type": "application/json", "text": text}}

    def link(self, values: Updates) -> Updates:
        """Write the link to this model and recipe."""
        query = self.quantize.recipe(values).to_query()
        return self.calm(values) | {self.side.link_text: gr.update(value=query, visible=True)}


def default_recipe(ctx: Context) -> QuantRecipe:
    """The recipe that the page opens with."""
    return QuantRecipe(
        ctx.settings.model, clusters=Clusters.uniform(32), calibration=Calibration(ctx.settings.text, QUICK_TOKENS)
    )

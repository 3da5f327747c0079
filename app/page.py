"""The whole page: side, status line, five tabs, and the events that join them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import urlencode

import gradio as gr

from app.context import FETCH_SECONDS, LIGHT, Context, Updates, observe_steps, ranges_key
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
REMEMBERED_JS = "() => { try { return sessionStorage.getItem('quantscope'); } catch { return null; } }"
REMEMBER_JS = "(key) => { try { sessionStorage.setItem('quantscope', key); } catch {} }"
"""The session's key outlives a reload of its browser tab; where the browser keeps nothing, a reload starts anew."""
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


FIRST_SECONDS = 0.5
"""The page's opening waits this long for ranges that are known already, so that they come with its first answer."""


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
        ctx.key = gr.Textbox(visible=False)
        ctx.timer = gr.Timer(FETCH_SECONDS, active=False)
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
        self._wire_steps()
        self.quantize.wire(self.compare.choices, [self.compare.runs])
        self.compare.wire()
        self.bitnet.wire()
        self._wire_side()
        self._wire_saving()
        self.explore.wire()
        self.reorder.wire([side.clusters, *self.quantize.clusters.values()])
        demo.load(None, None, None, js=f"() => {{{CLOSE_JS}}}", api_visibility="private")
        filled = self.fill(default_recipe(ctx))
        outputs = list(dict.fromkeys([ctx.key, ctx.timer, *filled, *self.range_outputs]))
        opened = demo.load(ctx.guard(self.opened), ctx.key, outputs, js=REMEMBERED_JS, **LIGHT)
        opened.then(None, ctx.key, None, js=REMEMBER_JS, api_visibility="private")
        ctx.timer.tick(ctx.guard(self.news), ctx.key, ctx.followed, trigger_mode="once", **LIGHT)
        demo.unload(self.closed)

    def _wire_side(self) -> None:
        ctx, side = self.ctx, self.side
        side.observe.click(None, None, None, js=f"() => {{{CLOSE_JS}}}", show_progress="hidden", api_visibility="private")
        side.text.input(lambda choice: gr.update(visible=choice == PASTE), side.text, side.pasted, **LIGHT)
        ctx.stop.click(ctx.guard(self.stopped), {ctx.key}, [ctx.status, ctx.stop], **LIGHT)
        ctx.on(side.observe.click, self.observe_clicked, {ctx.key, *side.source}, self.range_outputs)

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
        return [*self.explore.outputs, *self.reorder.outputs, self.compare.runs, self.ctx.status, self.ctx.stop]

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

    async def opened(self, key: object, request: gr.Request) -> Updates:
        """Open the session that this browser tab had before a reload, or a new one with the model of the link."""
        ctx, page = self.ctx, str(request.session_hash)
        session = ctx.sessions.open(page, key)
        recipe, refused = default_recipe(ctx), None
        if query := urlencode(dict(request.query_params)):
            try:
                if request.query_params.get("method") == "rtn":
                    recipe = replace(recipe, weights="rtn")  # as the method's name says, unless the link says otherwise
                recipe = QuantRecipe.from_query(query, default=recipe)
            except QuantscopeError as error:
                refused = error  # a damaged link opens the default model and says so at the end
        if session.ranges is not None:
            ctx.start(session, self.shown_again(session))
        elif not session.opening:
            session.selection.clusters = min(recipe.clusters.R1, MAX_CLUSTERS)
            ctx.start(session, self.observe_linked(session, recipe, refused))
        first = await session.page(page).take(FIRST_SECONDS)
        return {ctx.key: session.key, **ctx.listening, **self.fill(recipe), **first}

    async def news(self, key: object, request: gr.Request) -> Updates:
        """Fetch what the handlers of this session have to show."""
        return await self.ctx.news(key, str(request.session_hash))

    async def closed(self, request: gr.Request) -> None:
        """Note that a browser tab was closed or reloaded."""
        self.ctx.closed(str(request.session_hash))

    async def observe_linked(
        self, session: Session, recipe: QuantRecipe, refused: QuantscopeError | None
    ) -> AsyncIterator[Updates]:
        """Show the ranges of a link's model, then why the link was refused if it was."""
        text = recipe.calibration.text if recipe.calibration.text in texts.TEXT_NAMES else self.ctx.settings.text
        calibration = Calibration(text, self.ctx.settings.first_tokens)
        async for updates in self.observe(session, recipe.model, recipe.revision, calibration):
            yield updates
        if refused:
            yield self.ctx.failed(refused)

    async def shown_again(self, session: Session) -> AsyncIterator[Updates]:
        """Show what a session holds on the page that was reloaded; a running job's line comes from its handler."""
        updates = await asyncio.to_thread(self.show_ranges, session)
        if session.jobs:
            del updates[self.ctx.status], updates[self.ctx.stop]
        yield updates | {self.side.model: session.ranges.model}

    async def observe_clicked(self, values: Updates) -> AsyncIterator[Updates]:
        """Observe the ranges of the model and text at the side."""
        model, revision = self.side.chosen_model(values)
        async for updates in self.observe(self.ctx.session(values), model, revision, self.side.calibration(values)):
            yield updates

    async def observe(
        self, session: Session, model: str, revision: str | None, calibration: Calibration
    ) -> AsyncIterator[Updates]:
        """Show the ranges of a model on a text, then its widest channel. Those of a public text are made once for everyone."""
        ctx, key = self.ctx, ranges_key(model, revision, calibration)
        try:
            async for job in ctx.follow(session, "observe", observe_steps(model, revision, calibration), key=key):
                if job.finished:
                    results = job.results
                else:
                    yield ctx.busy(job, f"Opening {model}")
        except QuantscopeError:
            if session.ranges is None:
                yield self.explore.render(session)  # not “starting” any more
            raise
        session.info, session.ranges = results
        session.models[model] = session.info
        session.calibration, session.channel = calibration, None
        session.base_run(model, state_of(model))
        widest = session.ranges.outliers(1)[0]
        chosen = session.selection
        chosen.layer, chosen.kind, chosen.channel = widest.layer, widest.kind, widest.channel
        yield await asyncio.to_thread(self.show_ranges, session)
        async for updates in self.explore.show_channel(session, widest.channel):
            yield updates
        yield await asyncio.to_thread(self.reorder.render, session)

    async def stopped(self, values: Updates) -> Updates:
        """Stop every job of the session."""
        session = self.ctx.session(values)
        return {self.ctx.stop: gr.update(visible=False)} if session.stop() else self.ctx.rest(session)

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

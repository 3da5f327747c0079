"""Build the whole page: side, status line, five tabs, and the events that connect them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import gradio as gr

from app import engine
from app.context import FETCH_SECONDS, LIGHT, Context, Updates, observe_steps, ranges_key
from app.endpoints import Endpoints
from app.session import Session
from app.tabs.bitnet import BitNet
from app.tabs.compare import Compare
from app.tabs.explore import Explore
from app.tabs.guide import Guide
from app.tabs.link import TABS, Fields, Linked, go_to
from app.tabs.quantize import Quantize
from app.tabs.reorder import Reorder
from app.tabs.share import is_unknown_text
from app.tabs.sidebar import DEFAULT_TOKENS, PASTE, Sidebar
from app.tabs.start import Start
from app.view import cards, texts
from app.view.chart import serve_script
from app.view.scripts import CLOSE_JS, OPEN_TAB_JS, REMEMBER_JS, REMEMBERED_JS, START_JS, TAB_JS, TOP_JS
from core.errors import Cancelled, InputError, QuantscopeError
from core.folders import state_of
from core.recipe import BITNET_MODES, Calibration, Clusters, QuantRecipe

QUANTIZED = "E-MODEL-QUANTIZED"
"""Code of core's refusal to observe a quantised model."""
FIRST_SECONDS = 0.5
"""Seconds that the page's opening waits for ranges that are already known, so that its first answer has them."""


def build_app(ctx: Context) -> gr.Blocks:
    """Build the page, ready to launch."""
    serve_script()
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        page = Page(ctx)
        page.wire(demo)
        Endpoints(ctx)
    return demo


class Page:
    """The parts of the page, and the events that concern more than one of them."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        ctx.key = gr.Textbox(visible=False)
        ctx.timer = gr.Timer(FETCH_SECONDS, active=False)
        self.start_tab = gr.Textbox("", visible=False)
        self.side = Sidebar(ctx)
        with gr.Column(elem_id="head"):
            with gr.Row(elem_id="status-row", equal_height=True):
                ctx.status = gr.HTML(cards.starting(), elem_id="status", scale=10, apply_default_css=False)
                ctx.stop = gr.Button(texts.STOP, visible=False, elem_id="stop", size="sm", scale=0, min_width=90)
            Guide()
        self.start = Start()
        with gr.Tabs(selected="explore", elem_id="tabs", overflow_behavior="wrap") as self.tabs:
            self.explore = Explore(ctx)
            self.reorder = Reorder(ctx)
            self.quantize = Quantize(ctx, self.side)
            self.compare = Compare(ctx)
            self.bitnet = BitNet(ctx)
        self.footer = gr.HTML(cards.footer(engine.versions()), elem_id="footer", apply_default_css=False)

    def wire(self, demo: gr.Blocks) -> None:
        """Connect all events of the page."""
        ctx, side, quantize = self.ctx, self.side, self.quantize
        self._wire_steps()
        quantize.wire(self.open_for, self.after_run, [*self.range_outputs, *self.compare.keep.outputs])
        self.compare.wire()
        self.bitnet.wire(self.open_ternary, [self.start.ternary], self.range_outputs)
        self._wire_side()
        recipe = {*side.source, *side.recipe, *quantize.inputs}
        side.share.wire(recipe, quantize.recipe, self.fill, self.fields, self.compare.runs)
        self.explore.wire()
        self.reorder.wire([side.clusters, *quantize.clusters.values()])
        self._wire_fused()
        demo.load(None, None, None, js=START_JS, api_visibility="private")
        own = [ctx.key, ctx.timer, self.start_tab]
        outputs = list(dict.fromkeys([*own, *self.fill(default_recipe(ctx)), *self.range_outputs, *self.fields.values()]))
        opened = demo.load(ctx.guard(self.opened), ctx.key, outputs, js=REMEMBERED_JS, **LIGHT)
        opened.then(None, ctx.key, None, js=REMEMBER_JS, api_visibility="private")
        opened.then(None, self.start_tab, None, js=OPEN_TAB_JS % list(TABS), api_visibility="private")
        ctx.timer.tick(ctx.guard(self.news), ctx.key, ctx.followed, trigger_mode="once", **LIGHT)
        demo.load(self.examined, None, self.footer, **LIGHT)
        demo.unload(self.closed)

    def _wire_side(self) -> None:
        ctx, side = self.ctx, self.side
        side.observe.click(None, None, None, js=f"() => {{{CLOSE_JS}}}", show_progress="hidden", api_visibility="private")
        side.text.input(lambda choice: gr.update(visible=choice == PASTE), side.text, side.pasted, **LIGHT)
        status = [ctx.status, ctx.stop]
        ctx.stop.click(ctx.guard(self.stopped), {ctx.key}, status, **LIGHT)
        for name, tab in zip(TABS, (self.explore, self.reorder, self.quantize, self.compare, self.bitnet), strict=True):
            tab.tab.select(ctx.guard(self._chooser(name)), {ctx.key}, status, **LIGHT)
        targets = [*self.range_outputs, *self.fill(default_recipe(ctx)), *self.compare.keep.outputs]
        ctx.on(side.observe.click, self.observe_clicked, {ctx.key, *side.source}, targets)
        ctx.on(self.start.larger.click, self.larger_opened, {ctx.key, *side.source}, targets)

    def _wire_fused(self) -> None:
        """Connect the diagram of the reorderings; the charts above it change with every layer, site, model and g."""
        side, quantize, reorder = self.side, self.quantize, self.reorder
        inputs = {*side.source, *side.recipe, *quantize.inputs}
        triggers = [reorder.tab.select, reorder.scatter.change, side.method.input, side.scheme.input]
        reorder.fused.wire(quantize.recipe, inputs, triggers, reorder.shown, reorder.outputs)

    def _wire_steps(self) -> None:
        """Connect the buttons that lead to the next tab."""
        steps = {
            self.explore.forward: "reorder",
            self.reorder.forward: "quantize",
            self.quantize.forward: "compare",
            self.side.quantize: "quantize",
            self.start.ternary: "bitnet",
        }
        for button, name in steps.items():
            script = TAB_JS % (TABS.index(name), CLOSE_JS)
            button.click(None, None, None, js=script, show_progress="hidden", api_visibility="private")
        cost, shown = self.quantize.cost, [self.tabs, self.ctx.status, self.ctx.stop]
        for part in (cost.map, cost.table):
            opened = part.select(self.ctx.guard(self.part_clicked), {self.ctx.key}, shown, **LIGHT)
            opened.then(None, None, None, js=TOP_JS, show_progress="hidden", api_visibility="private")

    def part_clicked(self, values: Updates, event: gr.EventData) -> Updates:
        """Open the tab Explore at the part whose cost was clicked."""
        self.quantize.cost.choose(self.ctx.session(values), event)
        return {self.tabs: gr.update(selected="explore")}

    def _chooser(self, name: str) -> Any:
        def chosen(values: Updates) -> Updates:
            """Record the open tab for links and reloads; remove the error card, which belongs to the tab before."""
            session = self.ctx.session(values)
            session.held &= session.tab == name  # the page's script chooses the tab of a link
            session.tab = name
            return {}

        return chosen

    @property
    def fields(self) -> Fields:
        """Settings that a link names, besides those of the recipe."""
        compare, tokens, size = self.compare, self.compare.tokens, self.compare.memory
        sampling = {"new_tokens": compare.new_tokens, "temperature": compare.temperature, "chat": compare.chat}
        memory = {"memory_of": size.size, "memory_scheme": size.scheme, "batch": size.batch, "sequence": size.sequence}
        read = {"read_on": tokens.text, "read_tokens": tokens.count, "ternary_tokens": self.bitnet.tokens}
        measured = {"measure_on": compare.eval_text, "measure_tokens": compare.eval_tokens}
        return measured | memory | read | sampling | {"sampling_seed": compare.seed, "unit": size.unit, "gpu": size.gpu}

    @property
    def range_outputs(self) -> list:
        """Components that `show_ranges` updates."""
        side, quantize = self.side, self.quantize
        method = [side.method, side.mode, *side.show("rptq"), *quantize.show("rptq"), side.model, *self.start.outputs]
        shown = [*self.explore.outputs, *self.reorder.outputs, self.compare.runs, *method, self.ctx.status, self.ctx.stop]
        return list(dict.fromkeys(shown))

    def show_ranges(self, session: Session) -> Updates:
        """Show new ranges on the open tab, the base model among the runs, and the model's facts.

        A hidden tab draws itself when it is selected.
        """
        tab = {"explore": self.explore, "reorder": self.reorder}.get(session.tab)
        return {
            **(tab.shown(session) if tab else {}),
            **self.compare.choices(session),
            **self.start.render(session),
            **self.ctx.rest(session),
        }

    def after_run(self, session: Session) -> Updates:
        """Show the lists of runs after a run was added."""
        return {**self.compare.choices(session), **self.compare.keep.render(session)}

    def fill(self, recipe: QuantRecipe) -> Updates:
        """Fill all fields of the recipe from `recipe`."""
        return self.quantize.fill_all(recipe)

    async def opened(self, key: object, request: gr.Request) -> Updates:
        """Open the session that this browser tab had before a reload, or a new one with the link's model."""
        ctx, page, query = self.ctx, str(request.session_hash), dict(request.query_params)
        session = ctx.sessions.open(page, key)
        link = {name: value for name, value in query.items() if not name.startswith("__")}
        known, session.link = not link or link == session.link, link
        linked = Linked.read(link, default_recipe(ctx), self.fields)
        recipe = linked.recipe
        if session.ranges is not None and known:
            recipe = self.recipe_of(session)
            ctx.start(session, self.shown_again(session))
        elif not (session.opening and known):
            session.selection.clusters = recipe.clusters
            session.tab = link["tab"] if link.get("tab") in TABS else session.tab
            ctx.start(session, self.observe_linked(session, linked, link))
        first = await session.page(page).take(FIRST_SECONDS)
        filled = {**self.fill(recipe), **linked.settings, **first}
        return {ctx.key: session.key, self.start_tab: session.tab, **ctx.listening, **filled}

    def recipe_of(self, session: Session) -> QuantRecipe:
        """Return the recipe for a reloaded page: the one quantised last, else the default one for the current model."""
        calibration = replace(session.calibration, tokens=DEFAULT_TOKENS)
        clusters, model = session.selection.clusters, session.info.name
        return session.recipe or replace(default_recipe(self.ctx), model=model, calibration=calibration, clusters=clusters)

    async def examined(self) -> str:
        """Write the footer with the backends, which are known once the numerical libraries are loaded."""
        return cards.footer(engine.versions(), await asyncio.to_thread(engine.examined))

    async def news(self, key: object, request: gr.Request) -> Updates:
        """Fetch the updates of this session's handlers."""
        return await self.ctx.news(key, str(request.session_hash))

    async def closed(self, request: gr.Request) -> None:
        """Handle the closing or reloading of a browser tab."""
        self.ctx.closed(str(request.session_hash))

    async def observe_linked(self, session: Session, linked: Linked, query: dict[str, str]) -> AsyncIterator[Updates]:
        """Show the ranges of a link's model at the link's place, and its runs, then say why a part of it was refused."""
        recipe = linked.recipe
        text = recipe.calibration.text if recipe.calibration.text in texts.TEXT_NAMES else self.ctx.settings.text
        calibration = Calibration(text, self.ctx.settings.first_tokens)
        preset, session.held = "method" not in query, True
        async for updates in self.observe(session, recipe.model, recipe.revision, calibration, preset=preset, place=query):
            yield updates
        for key in linked.runs:
            try:
                async for updates in self.compare.keep.follow(session, {"folder": key}):
                    yield updates
            except QuantscopeError as error:
                if error.code == Cancelled.code:
                    raise
                linked.refused = linked.refused or InputError(texts.LINK_RUN.format(key), code="E-PARAM-RUNS")
        if linked.refused:
            raise linked.refused
        session.held = False
        if is_unknown_text(recipe.calibration.text):
            said = texts.LINK_FOREIGN.format(texts.TEXT_NAMES[text])
            yield {self.ctx.status: cards.note(session.info.name, said)}

    async def shown_again(self, session: Session) -> AsyncIterator[Updates]:
        """Show a session's results on a reloaded page; a running job's status line comes from its handler."""
        updates = await asyncio.to_thread(self.show_ranges, session)
        if session.jobs:
            del updates[self.ctx.status], updates[self.ctx.stop]
        yield updates
        async for updates in self._look_closer(session):
            yield updates

    async def _look_closer(self, session: Session) -> AsyncIterator[Updates]:
        """Read the chosen channel, or predict the chosen site's cost, if the open tab shows it."""
        closer = {"explore": self.explore.read, "reorder": self.reorder.price}.get(session.tab)
        if closer is not None:
            async for updates in closer(session):
                yield updates

    async def observe_clicked(self, values: Updates) -> AsyncIterator[Updates]:
        """Observe the ranges of the model and text chosen at the side."""
        model, revision = self.side.chosen_model(values)
        async for updates in self.observe(self.ctx.session(values), model, revision, self.side.calibration(values)):
            yield updates

    async def larger_opened(self, values: Updates) -> AsyncIterator[Updates]:
        """Open the larger model of the catalogue on the text chosen at the side."""
        session, calibration = self.ctx.session(values), self.side.calibration(values)
        model = engine.larger_model(session.info.name) if session.info is not None else ""
        if model:
            yield {self.side.model: model}
            async for updates in self.observe(session, model, None, calibration):
                yield updates

    async def open_for(self, session: Session, recipe: QuantRecipe) -> AsyncIterator[Updates]:
        """Open the model to be quantised, unless the charts show it already."""
        session.recipe = recipe
        shown = session.ranges
        if shown is None or (shown.model, shown.revision) != (recipe.model, recipe.revision):
            async for updates in self._open(session, recipe.model, recipe.revision, recipe.calibration, False):
                yield updates

    async def open_ternary(self, session: Session) -> AsyncIterator[Updates]:
        """Open the BitNet model that is part of the installation."""
        model = engine.ternary_model()
        calibration = Calibration(self.ctx.settings.text, self.ctx.settings.first_tokens)
        yield {self.side.model: model}
        async for updates in self._open(session, model, None, calibration, True):
            yield updates

    async def observe(
        self,
        session: Session,
        model: str,
        revision: str | None,
        calibration: Calibration,
        *,
        preset: bool = True,
        place: dict[str, str] | None = None,
    ) -> AsyncIterator[Updates]:
        """Show the ranges of a model on a text, then the channel of `place`, or the widest one.

        Args:
            preset: whether the page may choose the method that fits the model.
            place: layer, site and channel to show, as texts of a link.
        Raises: the job's error; InputError for a place that does not exist, after the ranges are shown.
        """
        try:
            async for updates in self._open(session, model, revision, calibration, preset):
                yield updates
        except QuantscopeError as error:
            if error.code != QUANTIZED:
                raise
            async for updates in self.open_run(session, model):
                yield updates
            return
        refused = None
        try:
            go_to(session, place or {})
            yield self.show_ranges(session) if place else {}
        except QuantscopeError as error:
            refused = error
        async for updates in self._look_closer(session):
            yield updates
        if refused:
            raise refused

    async def open_run(self, session: Session, model: str) -> AsyncIterator[Updates]:
        """Open a model that is quantised already among the runs, and the float model that it was made from on the charts."""
        async for updates in self.compare.keep.follow(session, {"folder": model}):
            yield updates
        run = session.run(model)
        recipe = session.recipe = run.recipe
        settings = self.ctx.settings
        text = settings.text if is_unknown_text(recipe.calibration.text) else recipe.calibration.text
        yield self.fill(recipe)
        calibration = Calibration(text, settings.first_tokens)
        async for updates in self._open(session, recipe.model, recipe.revision, calibration, False):
            yield updates
        said = texts.RUN_OPENED.format(session.title(run), texts.COMPARE, recipe.model)
        yield {self.ctx.status: cards.note(model, said)}

    async def _open(
        self, session: Session, model: str, revision: str | None, calibration: Calibration, preset: bool
    ) -> AsyncIterator[Updates]:
        """Show the ranges of a model on a text. Those of a public text are computed once for everyone."""
        ctx, key = self.ctx, ranges_key(model, revision, calibration)
        try:
            async for job in ctx.follow(session, "observe", observe_steps(model, revision, calibration), key=key):
                if job.finished:
                    results = job.results
                else:
                    yield ctx.busy(job, f"Opening {model}")
        except QuantscopeError:
            if session.ranges is None:
                yield self.explore.render(session)  # replaces “starting”
            raise
        chosen = self._take(session, results, calibration, preset)
        yield {**chosen, **await asyncio.to_thread(self.show_ranges, session)}

    def _take(self, session: Session, results: tuple[Any, Any], calibration: Calibration, preset: bool) -> Updates:
        """Give ranges to the session: select the widest channel, and the method that fits the model."""
        session.info, session.ranges = results
        model = session.info.name
        session.models[model] = session.info
        session.calibration, session.channel, session.bases = calibration, None, None
        session.base_run(model, state_of(model))
        widest = session.ranges.outliers(1)[0]
        chosen = session.selection
        chosen.layer, chosen.kind, chosen.channel = widest.layer, widest.kind, widest.channel
        return self._fit_method(session) if preset else {}

    def _fit_method(self, session: Session) -> Updates:
        """Choose the method that fits the model: BitNet for a BitNet model, and RPTQ again for the next other model."""
        fidelity = session.info.fidelity
        if not fidelity and not session.preset:
            return {}
        session.preset = bool(fidelity)
        method = "bitnet" if fidelity else "rptq"
        mode = next((mode for mode in BITNET_MODES if fidelity and fidelity.endswith(f" {mode}")), None)
        chosen = {self.side.mode: mode} if mode else {}
        return {self.side.method: method, **chosen, **self.side.show(method), **self.quantize.show(method)}

    async def stopped(self, values: Updates) -> Updates:
        """Stop every job of the session."""
        session = self.ctx.session(values)
        return {self.ctx.stop: gr.update(visible=False)} if session.stop() else self.ctx.rest(session)


def default_recipe(ctx: Context) -> QuantRecipe:
    """Return the recipe that the page opens with."""
    settings = ctx.settings
    return QuantRecipe(settings.model, clusters=Clusters.uniform(32), calibration=Calibration(settings.text, DEFAULT_TOKENS))

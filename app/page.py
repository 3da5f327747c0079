"""The whole page: side, status line, five tabs, and the events that join them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.context import HEAVY, LIGHT, Context, Updates, observe_steps, state_of
from app.session import Session
from app.tabs import bitnet, compare, explore, quantize, reorder, sidebar
from app.view import cards, tables, texts
from app.view.chart import serve_script
from app.view.figure import THEMES
from core.errors import InputError, QuantscopeError
from core.recipe import Calibration, Clusters, QuantRecipe

CSS = Path(__file__).parent / "view" / "page.css"
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


@dataclass
class Page:
    """The page's parts."""

    ctx: Context
    side: sidebar.Sidebar
    explore: explore.Explore
    reorder: reorder.Reorder
    quantize: quantize.Quantize
    compare: compare.Compare
    bitnet: bitnet.BitNet
    tabs: gr.Tabs

    def show_ranges(self, session: Session) -> Updates:
        """Explore for new ranges, the selectors of Reorder, and the base model among the runs."""
        return {
            **self.explore.render(session),
            **self.explore.glance(session),
            **self.reorder.controls(session),
            **self.compare.choices(session),
            **self.ctx.rest(session),
        }

    @property
    def range_outputs(self) -> list:
        """Targets of `show_ranges`."""
        selectors = [self.reorder.layer, self.reorder.kind, self.reorder.clusters]
        return [*self.explore.outputs, *selectors, self.compare.runs, self.ctx.status, self.ctx.stop]


def theme() -> gr.themes.Base:
    """Quiet greys; colour is kept for data."""
    base = gr.themes.Default(
        primary_hue=gr.themes.colors.slate,
        secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_sm,
        font=["ui-sans-serif", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "SF Mono", "Consolas", "Liberation Mono", "monospace"],
        radius_size=gr.themes.sizes.radius_sm,
        text_size=gr.themes.sizes.text_sm,
    )
    return base.set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#0e1217",
        block_background_fill="#ffffff",
        block_background_fill_dark="#161b22",
        background_fill_secondary_dark="#12171d",
        background_fill_primary_dark="#161b22",
        border_color_primary_dark="#2a323d",
        block_border_width="0px",
        block_shadow="none",
        input_background_fill_dark="#1d232b",
        input_border_color_dark="#343d49",
        button_primary_background_fill="*neutral_800",
        button_primary_background_fill_hover="*neutral_700",
        button_primary_background_fill_dark="#e8ecf2",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#12171d",
        button_primary_text_color_hover_dark="#12171d",
        slider_color="*neutral_700",
        slider_color_dark="*neutral_300",
        block_info_text_size="12px",
        block_info_text_color=THEMES["light"]["muted"],
        block_info_text_color_dark=THEMES["dark"]["muted"],
        body_text_color_subdued=THEMES["light"]["muted"],
        body_text_color_subdued_dark=THEMES["dark"]["muted"],
        block_label_background_fill="transparent",
        block_title_text_weight="600",
    )


def stylesheet() -> str:
    """The page's rules, with the charts' colours as CSS variables."""

    def variables(name: str) -> str:
        return "".join(f"--qs-{key}:{value};" for key, value in THEMES[name].items() if isinstance(value, str))

    return f":root{{{variables('light')}}}.dark{{{variables('dark')}}}" + CSS.read_text(encoding="utf-8")


def build_app(ctx: Context) -> gr.Blocks:
    """The page, ready to launch."""
    serve_script()
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as demo:
        ctx.key = gr.State(None, time_to_live=int(ctx.settings.session_seconds))
        side = sidebar.build(ctx.settings.model, on_space=ctx.settings.on_space)
        with gr.Row(elem_id="status-row", equal_height=True):
            ctx.status = gr.HTML(cards.starting(), elem_id="status", scale=10, apply_default_css=False)
            ctx.stop = gr.Button(texts.STOP, visible=False, elem_id="stop", size="sm", scale=0, min_width=90)
        with gr.Tabs(selected="explore", elem_id="tabs", overflow_behavior="wrap") as tabs:
            stages = (explore.build(), reorder.build(), quantize.build(), compare.build(ctx.settings.model), bitnet.build())
            page = Page(ctx, side, *stages, tabs)
        saved = gr.JSON(None, visible=False)
        _wire(page, demo, saved)
    return demo


def _wire(page: Page, demo: gr.Blocks, saved: gr.JSON) -> None:
    ctx, side = page.ctx, page.side
    _wire_steps(page)  # first: of one click's listeners, Gradio runs those after a stream only when it has ended
    quantize.wire(ctx, page.quantize, side, page.compare.choices, [page.compare.runs])
    compare.wire(ctx, page.compare)
    bitnet.wire(ctx, page.bitnet)
    observed = _wire_side(page)
    _wire_saving(page, saved)
    demo.load(None, None, None, js=f"() => {{{CLOSE_JS}}}", api_visibility="private")
    filled = [*side.fill(_default_recipe(ctx)), *page.quantize.fill(_default_recipe(ctx))]
    outputs = list(dict.fromkeys([ctx.key, *filled, *page.range_outputs]))
    opened = demo.load(
        ctx.guard(_opener(page)), None, outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private"
    )
    explore.wire(ctx, page.explore, [opened, observed])
    reorder.wire(ctx, page.reorder, [side.clusters, *page.quantize.clusters.values()], [opened, observed])

    def close(request: gr.Request) -> None:
        session = ctx.sessions.of_tab(str(request.session_hash))
        if session is not None:
            ctx.runner.cancel_all(session.key)

    demo.unload(close)


def _default_recipe(ctx: Context) -> QuantRecipe:
    return QuantRecipe(
        ctx.settings.model, clusters=Clusters.uniform(32), calibration=Calibration(ctx.settings.text, quantize.QUICK_TOKENS)
    )


def _opener(page: Page) -> Callable:
    ctx = page.ctx

    async def opened(request: gr.Request) -> AsyncIterator[Updates]:
        session = ctx.sessions.open(str(request.session_hash))
        yield {ctx.key: session.key}
        recipe, refused = _default_recipe(ctx), None
        if query := urlencode(dict(request.query_params)):
            try:
                if request.query_params.get("method") == "rtn":
                    recipe = replace(recipe, weights="rtn")  # as the method's name says, unless the link says otherwise
                recipe = QuantRecipe.from_query(query, default=recipe)
                yield {**page.side.fill(recipe), **page.quantize.fill(recipe)}
            except QuantscopeError as error:
                refused = error  # a damaged link opens the default model and says so at the end
        session.selection.clusters = min(recipe.clusters.R1, reorder.MAX_CLUSTERS)
        text = recipe.calibration.text if recipe.calibration.text in texts.TEXT_NAMES else ctx.settings.text
        calibration = Calibration(text, ctx.settings.first_tokens)
        async for updates in observe(page, session, recipe.model, recipe.revision, calibration):
            yield updates
        if refused:
            yield ctx.failed(refused)

    return opened


async def observe(
    page: Page, session: Session, model: str, revision: str | None, calibration: Calibration
) -> AsyncIterator[Updates]:
    """Show the ranges of a model on a text: those known already, those being made for everyone, or a job of this session."""
    ctx = page.ctx
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
                yield page.explore.render(session)  # not “starting” any more
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
    yield await asyncio.to_thread(page.show_ranges, session)


def _wire_side(page: Page) -> Any:
    ctx, side = page.ctx, page.side

    async def observe_clicked(values: dict) -> AsyncIterator[Updates]:
        model, revision = side.chosen_model(values)
        async for updates in observe(page, ctx.session(values), model, revision, side.calibration(values)):
            yield updates

    def stop(values: dict) -> Updates:
        session = ctx.session(values)
        count = ctx.runner.cancel_all(session.key)
        return {ctx.stop: gr.update(visible=False)} if count else {**ctx.rest(session)}

    side.observe.click(None, None, None, js=f"() => {{{CLOSE_JS}}}", show_progress="hidden", api_visibility="private")
    observed = side.observe.click(
        ctx.guard(observe_clicked),
        {ctx.key, *side.source},
        page.range_outputs,
        **HEAVY,
    )
    side.text.input(lambda choice: gr.update(visible=choice == sidebar.PASTE), side.text, side.pasted, **LIGHT)
    ctx.stop.click(ctx.guard(stop), {ctx.key}, [ctx.status, ctx.stop], **LIGHT)
    return observed


def _wire_saving(page: Page, saved: gr.JSON) -> None:
    ctx, side = page.ctx, page.side
    inputs = {ctx.key, *side.source, *side.recipe, *page.quantize.inputs}
    outputs = [saved, ctx.status, ctx.stop]

    def calm(values: dict) -> Updates:
        """An earlier error's card goes; a running job's line stays."""
        session = ctx.session(values)
        return {} if session.jobs else ctx.rest(session)

    def recipe_file(values: dict) -> Updates:
        recipe = page.quantize.recipe(side, values)
        return calm(values) | {
            saved: {"name": f"recipe-{recipe.hash}.json", "type": "application/json", "text": recipe.to_json()}
        }

    def ranges_file(values: dict) -> Updates:
        report = ctx.session(values).ranges
        if report is None:
            raise InputError(texts.NO_RANGES, code="E-PARAM-RANGES")
        text = tables.ranges_csv(report)
        return calm(values) | {saved: {"name": f"ranges-{report.tokens}-tokens.csv", "type": "text/csv", "text": text}}

    def report_file(values: dict) -> Updates:
        text = tables.report_json(ctx.session(values).runs)
        return calm(values) | {saved: {"name": "report.json", "type": "application/json", "text": text}}

    def link(values: dict) -> Updates:
        query = page.quantize.recipe(side, values).to_query()
        return calm(values) | {side.link_text: gr.update(value=query, visible=True)}

    for button, handler in ((side.save_recipe, recipe_file), (side.save_ranges, ranges_file), (side.save_report, report_file)):
        button.click(ctx.guard(handler), inputs, outputs, **LIGHT).then(None, saved, None, js=SAVE_JS, api_visibility="private")
    side.link.click(ctx.guard(link), inputs, [side.link_text, ctx.status, ctx.stop], **LIGHT).success(
        None, side.link_text, side.link_text, js=LINK_JS, api_visibility="private"
    )


def _wire_steps(page: Page) -> None:
    """The buttons that lead to the next tab."""
    steps = {page.explore.forward: texts.REORDER, page.reorder.forward: texts.QUANTIZE_TAB, page.quantize.forward: texts.COMPARE}
    for button, label in (steps | {page.side.quantize: texts.QUANTIZE_TAB}).items():
        button.click(None, None, None, js=TAB_JS % (label, CLOSE_JS), show_progress="hidden", api_visibility="private")

"""Quantise: the whole recipe, the run with its progress, and what it cost layer by layer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from app import cards, engine, plots_runs, tables, texts
from app.chart import Chart
from app.context import Context, Updates
from app.figure import axis_name
from app.jobs import Step
from app.session import Run, Session, is_public
from app.tabs.sidebar import Sidebar
from core.config import REORDERS, SCHEMES, SITES, BitNetOptions, Bits, Calibration, Clusters, QuantRecipe, require_int
from core.errors import InputError

QUICK_TOKENS = 2048
WINDOW = 512
BIT_CHOICES = [2, 3, 4, 5, 6, 7, 8, 16]
ATTENTION_BITS = (16, 8, 4, 3)


@dataclass
class Quantize:
    """The tab's widgets."""

    tab: gr.Tab
    variant: gr.Dropdown
    weights: gr.Dropdown
    keep: gr.Slider
    attention: dict[str, gr.Dropdown]
    grid: gr.Column
    ternary: gr.Column
    folds: gr.Row
    tokens: gr.Slider
    measure: gr.Checkbox
    bits: dict[str, gr.Dropdown]
    clusters: dict[str, gr.Number]
    segments: gr.Dropdown
    start: gr.Button
    stop: gr.Button
    summary: gr.HTML
    numbers: gr.HTML
    sqnr: Chart
    sites: Chart
    details: gr.HTML
    forward: gr.Button

    @property
    def inputs(self) -> set:
        """Everything of the recipe that is chosen here."""
        fields = (self.bits, self.clusters, self.attention)
        return {
            self.variant,
            self.weights,
            self.segments,
            self.keep,
            self.tokens,
            self.measure,
            *(f for group in fields for f in group.values()),
        }

    @property
    def results(self) -> list:
        """What a run changes."""
        return [self.summary, self.numbers, self.sqnr, self.sites, self.details]

    def recipe(self, side: Sidebar, values: dict) -> QuantRecipe:
        """The recipe the page shows. Raises InputError naming what is out of range."""
        model, revision = side.chosen_model(values)
        tokens = require_int("calibration tokens", values[self.tokens], WINDOW, 65_536, f"use {WINDOW} to 65536")
        calibration = Calibration(side.chosen_text(values), tokens, WINDOW)
        if values[side.method] == "bitnet":
            attention = {name: _whole(values[field]) for name, field in self.attention.items()}
            options = BitNetOptions(values[side.mode], values[self.keep], **attention)
            return QuantRecipe(model, revision, "bitnet", calibration=calibration, bitnet=options)
        custom = values[side.scheme] == "custom"
        bits = Bits(**{name: _whole(values[field]) for name, field in self.bits.items()}) if custom else None
        counts = {
            name: require_int(f"clusters of {name}", values[field], 1, 65536, "use 1 or more")
            for name, field in self.clusters.items()
        }
        return QuantRecipe(
            model,
            revision,
            values[side.method],
            values[side.scheme],
            bits,
            Clusters(**counts),
            values[self.weights],
            values[self.variant],
            calibration,
            segments=values[self.segments] if values[side.method] == "rptq" else "exact",
        )

    def fill(self, recipe: QuantRecipe) -> Updates:
        """The widgets, set to a recipe."""
        options = recipe.bitnet or BitNetOptions()
        return {
            self.keep: options.keep,
            **{field: getattr(options, name) for name, field in self.attention.items()},
            **self.show(recipe.method),
            self.variant: recipe.variant,
            self.weights: recipe.weights,
            self.segments: recipe.segments,
            self.tokens: recipe.calibration.tokens,
            **{field: getattr(recipe.tensor_bits, name) for name, field in self.bits.items()},
            **{field: getattr(recipe.clusters, name) for name, field in self.clusters.items()},
        }

    def show(self, method: object) -> Updates:
        """Only the controls that concern a method."""
        ternary = method == "bitnet"
        return {part: gr.update(visible=ternary == (part is self.ternary)) for part in (self.grid, self.ternary, self.folds)}

    def render(self, session: Session) -> Updates:
        """Results of the session's last run, beside the others'."""
        runs = [(place, run) for place, run in enumerate(session.runs) if run.quantize is not None]
        if not runs:
            return {
                self.summary: cards.hint(texts.RUN_EMPTY),
                self.numbers: "",
                self.sqnr: gr.update(visible=False),
                self.sites: gr.update(visible=False),
                self.details: "",
            }
        place, last = runs[-1]
        lines = [(p, axis_name(session.title(run), 48), run.quantize) for p, run in runs[-5:]]
        kinds = [(kind, texts.SITE_LABELS[kind]) for kind in SITES]
        quantized_sites = any(entry.sites for entry in last.quantize.layers)
        return {
            self.summary: cards.run_summary(last.quantize, session.title(last), place),
            self.numbers: numbers_table(session, session.runs),
            self.sqnr: gr.update(value=plots_runs.layer_sqnr(lines, revision=last.key), visible=True),
            self.sites: gr.update(value=plots_runs.site_sqnr(last.quantize, kinds), visible=True)
            if quantized_sites
            else gr.update(visible=False),
            self.details: details(last.quantize),
        }


def _whole(value: object) -> int:
    return require_int("bits", value, 2, 16, "use 2 to 8, or 16 for not quantised")


def numbers_table(session: Session, runs: list[Run]) -> str:
    """Measured runs as a table with the protocol under it; empty text if none is measured."""
    measured = [(session.runs.index(run), run) for run in runs if run.evaluation is not None]
    if not measured:
        return ""
    rows = tables.number_rows([(session.title(run), run.evaluation, estimated_bytes(session, run)) for _, run in measured])
    protocol = " ".join(dict.fromkeys(str(run.evaluation.protocol) for _, run in measured))
    table = cards.table(tables.NUMBER_HEADERS, rows, colours=[place for place, _ in measured])
    models = [session.models.get(name) for name in dict.fromkeys(run.model for _, run in measured)]
    return table + cards.protocol(protocol) + cards.caution(tables.several_models(models))


def estimated_bytes(session: Session, run: Run) -> float | None:
    """The formula's weight bytes of a quantised run."""
    info = session.models.get(run.model)
    if run.recipe is None or info is None:
        return None
    return float(engine.project_model(info, run.recipe.tensor_bits, batch=1, sequence=1).weights)


def details(report: Any) -> str:
    """Stages, fallbacks and kernels of a run as small tables."""
    parts = [cards.table(["stage", "time"], tables.stage_rows(report), caption="where the time went")]
    if fallen := tables.fallback_rows(report):
        parts.append(cards.table(["layer", "weight", "reason"], fallen, caption="rounded to nearest instead of GPTQ"))
    parts.append(
        cards.table(["kernel", "layers", "why"], tables.backend_rows(report), caption="what executes the low-bit layers here")
    )
    return f'<div class="qs-columns">{"".join(parts)}</div>'


def build() -> Quantize:
    """The tab's widgets, in place."""
    with gr.Tab(texts.QUANTIZE_TAB, id="quantize") as tab:
        with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
            with gr.Column(scale=6, min_width=240, elem_classes="qs-plain") as grid, gr.Row():
                variant = gr.Dropdown(
                    [(label, name) for name, label in texts.VARIANTS.items()],
                    value="default",
                    label=texts.VARIANT,
                    min_width=220,
                    filterable=False,
                    elem_id="variant",
                )
                weights = gr.Dropdown(
                    [(label, name) for name, label in texts.WEIGHT_METHODS.items()],
                    value="gptq",
                    label=texts.WEIGHTS,
                    min_width=200,
                    filterable=False,
                    elem_id="weights",
                )
            with gr.Column(scale=6, min_width=240, elem_classes="qs-plain", visible=False) as ternary:
                keep, attention = _ternary_options()
            tokens = gr.Slider(
                512,
                16384,
                2048,
                step=512,
                label=texts.CALIBRATION_TOKENS,
                scale=3,
                min_width=200,
                elem_id="quantize-tokens",
                buttons=[],
            )
            with gr.Column(scale=2, min_width=170, elem_classes="qs-tight"):
                start = gr.Button(texts.QUANTIZE, variant="primary", elem_id="quantize")
                stop = gr.Button(texts.STOP, elem_id="quantize-stop", size="sm")
        folds, bits, clusters, segments = _folds()
        measure = gr.Checkbox(
            True,
            label=f"{texts.MEASURE}: the run and the original, on {QUICK_TOKENS:,} tokens",
            container=False,
            elem_id="measure",
        )
        summary = gr.HTML(cards.hint(texts.RUN_EMPTY), elem_id="summary", apply_default_css=False)
        numbers = gr.HTML("", elem_id="quick-numbers", elem_classes="qs-card", apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                sqnr = Chart(None, label=texts.SQNR_LABEL, height=300, elem_id="sqnr", visible=False)
            with gr.Column(scale=4, min_width=300):
                sites = Chart(None, label=texts.SITES_LABEL, height=300, elem_id="sites", visible=False)
        forward = gr.Button(texts.TO_COMPARE, elem_classes="qs-next", elem_id="to-compare")
        with gr.Accordion(texts.DETAILS, open=False):
            details_html = gr.HTML("", elem_id="details", apply_default_css=False)
        with gr.Accordion(texts.LEARN_QUANTIZE_TITLE, open=False):
            gr.Markdown(texts.LEARN_QUANTIZE)
    return Quantize(
        tab,
        variant,
        weights,
        keep,
        attention,
        grid,
        ternary,
        folds,
        tokens,
        measure,
        bits,
        clusters,
        segments,
        start,
        stop,
        summary,
        numbers,
        sqnr,
        sites,
        details_html,
        forward,
    )


def _folds() -> tuple[gr.Row, dict[str, gr.Dropdown], dict[str, gr.Number], gr.Dropdown]:
    """Bits of every tensor, clusters of every reordering and what integers make of them, in place."""
    names = [entry.name for entry in fields(Bits)]
    with gr.Row(elem_classes="qs-folds") as folds:
        with gr.Accordion(texts.BITS_PANEL, open=False):
            gr.Markdown(texts.BITS_INFO, elem_classes="qs-caption")
            with gr.Row():
                bits = {
                    name: gr.Dropdown(
                        BIT_CHOICES,
                        value=getattr(SCHEMES["W4A4"], name),
                        label=texts.BIT_LABELS[name],
                        min_width=90,
                        filterable=False,
                        elem_id=f"bits-{name}",
                    )
                    for name in names
                }
        with gr.Accordion(texts.CLUSTER_PANEL, open=False):
            with gr.Row():
                defaults = Clusters.uniform(32)
                clusters = {
                    name: gr.Number(
                        getattr(defaults, name),
                        label=texts.CLUSTER_LABELS[name],
                        precision=0,
                        min_width=110,
                        elem_id=f"clusters-{name}",
                    )
                    for name in REORDERS
                }
            segments = gr.Dropdown(
                [(label, name) for name, label in texts.SEGMENTS.items()],
                value="exact",
                label=texts.SEGMENTS_LABEL,
                info=texts.SEGMENTS_INFO,
                filterable=False,
                elem_id="segments",
            )
    return folds, bits, clusters, segments


def _ternary_options() -> tuple[gr.Slider, dict[str, gr.Dropdown]]:
    """Controls of the method bitnet, in place."""
    choices = [(texts.NOT_QUANTISED if bits == 16 else f"{bits} bits", bits) for bits in ATTENTION_BITS]
    with gr.Row():
        keep = gr.Slider(0.05, 1.0, 0.5, step=0.05, label=texts.KEEP, scale=2, min_width=170, elem_id="keep", buttons=[])
        defaults, labels = BitNetOptions(), {"kv_bits": texts.KV_BITS, "bos_bits": texts.BOS_BITS, "q_bits": texts.Q_BITS}
        attention = {
            name: gr.Dropdown(
                choices,
                value=getattr(defaults, name),
                label=label,
                min_width=105,
                filterable=False,
                elem_id=name.replace("_", "-"),
            )
            for name, label in labels.items()
        }
    return keep, attention


def wire(ctx: Context, view: Quantize, side: Sidebar, after: Any) -> None:
    """Connect the tab's events. `after(session)`: updates of other tabs once a run is there; `after.outputs` are its targets."""
    light = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    def scheme_chosen(values: dict) -> Updates:
        bits = SCHEMES.get(values[side.scheme])
        return {field: getattr(bits, name) for name, field in view.bits.items()} if bits else {}

    def method_chosen(values: dict) -> Updates:
        return {**side.show(values[side.method]), **view.show(values[side.method])}

    def own_bits() -> Updates:
        return {side.scheme: "custom"}

    def opened(values: dict) -> Updates:
        return view.render(ctx.session(values))

    async def run(values: dict) -> AsyncIterator[Updates]:
        session, recipe = ctx.session(values), view.recipe(side, values)
        async for updates in quantize(ctx, view, session, recipe, measure=bool(values[view.measure])):
            yield updates
        yield {**view.render(session), **after(session), **ctx.rest(session)}

    side.scheme.input(ctx.guard(scheme_chosen), {side.scheme}, [*view.bits.values(), ctx.status, ctx.stop], **light)
    parts = [side.grid, side.ternary, view.grid, view.ternary, view.folds]
    side.method.input(ctx.guard(method_chosen), {side.method}, [*parts, ctx.status, ctx.stop], **light)
    for field in view.bits.values():
        field.input(own_bits, None, [side.scheme], **light)
    view.tab.select(ctx.guard(opened), {ctx.key}, [*view.results, ctx.status, ctx.stop], **light)
    gr.on(
        [view.start.click, side.quantize.click],
        ctx.guard(run),
        {ctx.key, *side.source, *side.recipe, *view.inputs},
        [*view.results, *after.outputs, ctx.status, ctx.stop],
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="multiple",
        api_visibility="private",
    )


async def quantize(
    ctx: Context, view: Quantize, session: Session, recipe: QuantRecipe, *, measure: bool
) -> AsyncIterator[Updates]:
    """Follow one quantisation and its measurements; finished parts appear as they come."""
    load = Step("load", {"model": recipe.model, "revision": recipe.revision}, "Loading the model", 1.0)
    steps = [load, Step("quantize", {"recipe": recipe}, "Quantising", 8.0)]
    base_key = ("evaluation", recipe.model, recipe.revision, "sotu", QUICK_TOKENS, WINDOW)
    base = session.add_run(Run(recipe.model, recipe.model))
    base.evaluation = base.evaluation or ctx.shared.get(base_key)
    if measure:
        common = {"text": "sotu", "tokens": QUICK_TOKENS, "window": WINDOW}
        steps.append(
            Step("evaluate", {"key": recipe.hash, "reference": recipe.model, **common}, "Measuring the quantised model", 2.0)
        )
        if base.evaluation is None:
            steps.append(
                Step("evaluate", {"key": recipe.model, "revision": recipe.revision, **common}, "Measuring the original", 1.0)
            )
    run, seen = None, 0
    async for job in ctx.follow(session, "quantize", steps):
        while seen < len(job.results):
            report, seen = job.results[seen], seen + 1
            if seen == 1:
                session.models[recipe.model] = report
            elif seen == 2:
                run = session.add_run(Run(report.key, report.label, recipe))
                run.quantize = report
            elif seen == 3:
                run.evaluation = report
            else:
                base.evaluation = report
                if is_public(recipe.model.replace("/", "")):
                    ctx.shared.put(base_key, report)
            yield view.render(session)
        yield ctx.busy(job, recipe.label())
    if run is None:
        raise InputError("The run gave no result: try again.", code="E-PARAM-RECIPE")

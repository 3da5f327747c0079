"""The tab BitNet: a ternary model's zeros, weights, inputs and their codes; and training curves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

import gradio as gr

from app import engine
from app.context import LIGHT, Context, Updates
from app.session import Run, Session, TernaryReports
from app.view import cards, plots_bitnet, tables, texts
from app.view.chart import Chart
from app.view.figure import note
from app.worker.job import Step
from core.errors import InputError
from core.recipe import require_int

TOKENS = (512, 2048, 8192)


class BitNet:
    """The tab: its widgets, their contents for a run, and their events' handlers. `inputs`: one chart per projection input."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Tab(texts.BITNET, id="bitnet") as self.tab:
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True, visible=False) as self.controls:
                self.run = gr.Dropdown(
                    [], label=texts.TERNARY_RUN, elem_id="ternary-run", filterable=False, scale=8, min_width=260, interactive=True
                )
                self.layer = gr.Dropdown(
                    [0], value=0, label=texts.LAYER, elem_id="ternary-layer", filterable=False, min_width=80, interactive=True
                )
                self.tokens = gr.Dropdown(
                    list(TOKENS),
                    value=TOKENS[0],
                    label=texts.TERNARY_TOKENS,
                    elem_id="ternary-tokens",
                    filterable=False,
                    min_width=90,
                )
                with gr.Column(scale=1, min_width=180, elem_classes="qs-tight"):
                    self.read = gr.Button(texts.TERNARY_READ, elem_id="ternary-read")
            example = engine.ternary_model()
            self.facts = gr.HTML(cards.hint(texts.TERNARY_EMPTY), elem_id="ternary-facts", apply_default_css=False)
            self.example = gr.Button(
                texts.OPEN_TERNARY.format(example), visible=bool(example), variant="primary", size="md", elem_id="open-ternary"
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=300):
                    self.sparsity = Chart(None, label=texts.SPARSITY_LABEL, height=260, elem_id="zeros", visible=False)
                with gr.Column(scale=1, min_width=300):
                    self.weights = Chart(None, label=texts.WEIGHTS_LABEL, height=260, elem_id="ternary-weights", visible=False)
            with gr.Row(equal_height=False):
                self.inputs = {}
                for site, label in texts.PROJECTION_INPUTS.items():
                    with gr.Column(scale=1, min_width=230):
                        name = site.replace("_", "-")
                        self.inputs[site] = Chart(
                            None, label=texts.INPUT_LABEL.format(label), height=330, elem_id=f"input-{name}", visible=False
                        )
            with gr.Accordion(texts.SPARSITY_TABLE, open=False, visible=False) as self.fold:
                self.layers = gr.HTML("", elem_id="zeros-table", apply_default_css=False)
            with gr.Accordion(texts.CURVES_TITLE, open=True, elem_id="training"):
                _curves()
            with gr.Accordion(texts.LEARN_BITNET_TITLE, open=False):
                gr.Markdown(texts.LEARN_BITNET)

    @property
    def selectors(self) -> set:
        """Inputs that decide what is read of a model."""
        return {self.run, self.layer, self.tokens}

    @property
    def results(self) -> list:
        """Components that a reading changes."""
        parts = [self.controls, self.example, self.facts, self.fold, self.layers]
        return [*parts, self.sparsity, self.weights, *self.inputs.values()]

    def choices(self, session: Session, chosen: object = None, layer: int = 0) -> Updates:
        """List the ternary runs and the model's layers; `chosen` and `layer` if they exist, else the newest run."""
        runs = session.ternary_runs
        run = next((r for r in runs if r.key == chosen), runs[0] if runs else None)
        info = session.models.get(run.model) if run else None
        layers = info.layers if info else 1
        return {
            self.run: gr.update(choices=[(session.title(r), r.key) for r in runs], value=run.key if run else None),
            self.layer: gr.update(choices=list(range(layers)), value=min(layer, layers - 1)),
        }

    def render(self, session: Session, run: Run | None, layer: int) -> Updates:
        """Show everything that was read of a run."""
        if run is None or run.ternary.sparsity is None:
            facts = cards.hint(texts.TERNARY_WAIT if run else texts.TERNARY_EMPTY)
            charts = (self.sparsity, self.weights, *self.inputs.values())
            example = gr.update(visible=run is None and bool(engine.ternary_model()))
            return {
                self.controls: gr.update(visible=run is not None),
                self.fold: gr.update(visible=False),
                self.example: example,
                self.facts: facts,
                self.layers: "",
                **{chart: gr.update(visible=False) for chart in charts},
            }
        known = run.ternary
        drawn = {report.site: report for report in known.inputs.get(layer, [])}
        return {
            self.controls: gr.update(visible=True),
            self.fold: gr.update(visible=True),
            self.example: gr.update(visible=False),
            self.facts: facts_of(session, run),
            self.sparsity: gr.update(value=plots_bitnet.sparsity_map(known.sparsity), visible=True),
            self.weights: gr.update(value=plots_bitnet.weight_bars(known.weights), visible=True),
            self.layers: cards.table(texts.SPARSITY_LAYER_HEADERS, tables.sparsity_layer_rows(known.sparsity)),
            **{
                chart: gr.update(
                    value=plots_bitnet.input_distribution(drawn[site], f"{label}, layer {layer}") if site in drawn else note(""),
                    visible=True,
                )
                for (site, label), chart in zip(texts.PROJECTION_INPUTS.items(), self.inputs.values(), strict=True)
            },
        }

    def wire(
        self, open_ternary: Callable[[Session], AsyncIterator[Updates]], buttons: Sequence[gr.Button], targets: list
    ) -> None:
        """Connect the tab's events.

        Args:
            open_ternary: open_ternary(session): updates of `targets` that open the embedded BitNet model.
            buttons: of the page that open it too.
        """
        self.open_ternary = open_ternary
        guard, on, status = self.ctx.guard, self.ctx.on, [self.ctx.status, self.ctx.stop]
        inputs, chosen = {self.ctx.key, *self.selectors}, [self.run, self.layer, *self.results, *status]
        first = self.tab.select(guard(self.opened), inputs, chosen, **LIGHT)
        on(first.then, self.shown, inputs, [*self.results, *status])
        for control in (self.run, self.layer):
            changed = control.input(guard(self.opened), inputs, chosen, **LIGHT)
            on(changed.then, self.shown, inputs, [*self.results, *status])
        for button in (self.example, *buttons):
            on(button.click, self.example_opened, inputs, list(dict.fromkeys([*targets, *chosen])))
        on(self.read.click, self.again, inputs, [*self.results, *status])

    def opened(self, values: Updates) -> Updates:
        """Show what was already read of the chosen run."""
        session = self.ctx.session(values)
        choices = self.choices(session, values[self.run], layer_of(values[self.layer]))
        run, layer = (choices[field]["value"] for field in (self.run, self.layer))
        return {**choices, **self.render(session, session.run(run), layer)}

    async def shown(self, values: Updates) -> AsyncIterator[Updates]:
        """Read what is still missing of the chosen run."""
        session = self.ctx.session(values)
        run = session.run(values[self.run])
        if run is not None:
            async for updates in self.read_run(session, run, values):
                yield updates

    async def example_opened(self, values: Updates) -> AsyncIterator[Updates]:
        """Open the embedded BitNet model."""
        session = self.ctx.session(values)
        async for updates in self.open_ternary(session):
            yield updates
        run = session.run(session.info.name)
        yield {**self.choices(session, run.key), **self.render(session, run, 0)}
        async for updates in self.read_run(session, run, values | {self.layer: 0}):
            yield updates

    async def again(self, values: Updates) -> AsyncIterator[Updates]:
        """Read everything of the chosen run again."""
        session = self.ctx.session(values)
        run = session.run(values[self.run])
        if run is None:
            raise InputError(texts.TERNARY_EMPTY, code="E-PARAM-RUNS")
        async for updates in self.read_run(session, run, values, again=True):
            yield updates

    async def read_run(self, session: Session, run: Run, values: Updates, *, again: bool = False) -> AsyncIterator[Updates]:
        """Read what is still missing of a run, or everything if `again`."""
        tokens = require_int("tokens", values[self.tokens], TOKENS[0], TOKENS[-1], f"use {TOKENS[0]} to {TOKENS[-1]}")
        info, layer = session.models.get(run.model), layer_of(values[self.layer])
        layer = min(layer, info.layers - 1) if info else layer
        steps = steps_for(session, run, layer, tokens, again=again)
        if not steps:
            return
        async for job in self.ctx.follow(session, "bitnet", steps):
            yield self.ctx.busy(job, texts.TERNARY_JOB)
        *whole, qkv, out, up, down = job.results
        if whole:
            run.ternary = TernaryReports(tokens, *whole)
        run.ternary.inputs[layer] = [qkv, out, up, down]
        yield {**self.render(session, run, layer), **self.ctx.rest(session)}


def facts_of(session: Session, run: Run) -> str:
    """Write a run's name and fidelity, the table of zeros and how they were counted."""
    report = run.ternary.sparsity
    table = cards.table(
        texts.SPARSITY_HEADERS,
        tables.sparsity_rows(report, texts.SPARSITY_PAPER.get(report.mode)),
        caption=texts.SPARSITY_CAPTION,
    )
    protocol = cards.protocol(texts.SPARSITY_PROTOCOL.format(tokens=report.tokens, text=report.text_name))
    return cards.headed(session.title(run), session.runs.index(run), table + protocol)


def _curves() -> None:
    """Make the charts of training curves that are part of the installation."""
    trained, ablations = engine.training_runs(), engine.ablation_runs()
    figures = {name: plots_bitnet.ablation_curves(ablations, name) for name in texts.ABLATION_LABELS}
    if trained:
        Chart(plots_bitnet.training_curves(trained), label=texts.CURVES_LABEL, height=320, elem_id="curves")
    with gr.Row(equal_height=False):
        for name, figure in figures.items():
            if figure is not None:
                with gr.Column(scale=1, min_width=300):
                    Chart(figure, label=texts.ABLATION_LABELS[name], height=320, elem_id=name)
    if not trained and not any(figures.values()):
        gr.HTML(cards.hint(texts.CURVES_EMPTY), apply_default_css=False)


def layer_of(value: object) -> int:
    """Return the chosen layer. Raises: InputError if it is not a layer."""
    return require_int("layer", value, 0, 10_000, "use a layer of the model")


def steps_for(session: Session, run: Run, layer: int, tokens: int, *, again: bool = False) -> list[Step]:
    """Return the job that reads what is missing of a run: the whole model once, the inputs of a layer when it is chosen."""
    known, steps = run.ternary, []
    common = {"key": run.key, "text": session.calibration.text if session.calibration else "sotu"}
    if again or known.sparsity is None:
        steps.append(Step("weight_histogram", {"key": run.key}, "Counting weights", 1.0))
        steps.append(Step("sparsity", {**common, "tokens": tokens}, "Counting zeros", 4.0))
    if steps or layer not in known.inputs:
        where = {**common, "layer": layer, "tokens": tokens if steps else known.tokens}
        steps += [
            Step("input_histogram", {**where, "site": site}, f"Sampling the input of {label}", 1.0)
            for site, label in texts.PROJECTION_INPUTS.items()
        ]
    return steps

"""The tab Quantise: the whole recipe, the run with its progress, and its errors layer by layer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import fields, replace

import gradio as gr

from app.context import LIGHT, Context, Updates
from app.session import Protocol, Run, Session
from app.tabs.autopilot import Autopilot
from app.tabs.calibrations import Calibrations
from app.tabs.cost import Cost
from app.tabs.distill import DistillFields
from app.tabs.measured import MEASURED_TEXT, QUICK_TOKENS, WINDOW, details, numbers_table, verdict, window_of
from app.tabs.overrides import LayerField
from app.tabs.plus import PlusFields
from app.tabs.reorder import require_count
from app.tabs.rotation import RotationFields
from app.tabs.sidebar import DEFAULT_TOKENS, TOKEN_RANGE, Sidebar, variant_choices
from app.view import cards, plots_runs, texts
from app.view.chart import Chart, Table
from app.view.names import full_name
from app.worker.job import Step
from core.errors import InputError
from core.folders import state_of
from core.recipe import REORDERS, SCHEMES, SITES, BitNetOptions, Bits, Clusters, QuantRecipe, require_int

CURVES = 5
"""Largest number of runs in one chart, one for each colour."""
LOADING_SECONDS = 1.0
"""Guess of what loading a run takes that was made before."""
BIT_CHOICES = [2, 3, 4, 5, 6, 7, 8, 16]
ATTENTION_BITS = (16, 8, 4, 3)


class Quantize:
    """The tab: its widgets, their contents for a session, and the handlers of their events.

    `window` and `seed` are never shown: they keep these fields of a link's recipe.
    """

    def __init__(self, ctx: Context, side: Sidebar) -> None:
        self.ctx, self.side = ctx, side
        with gr.Tab(texts.QUANTIZE_TAB, id="quantize") as self.tab:
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                with gr.Column(scale=6, min_width=240) as self.grid, gr.Row():
                    self.variant = gr.Dropdown(
                        variant_choices("rptq"), value="default", label=texts.VARIANT,
                        min_width=220, filterable=False, elem_id="variant",
                    )  # fmt: skip
                    self.weights = gr.Dropdown(
                        [(label, name) for name, label in texts.WEIGHT_METHODS.items()],
                        value="gptq", label=texts.WEIGHTS,
                        min_width=200, filterable=False, elem_id="weights",
                    )  # fmt: skip
                with gr.Column(scale=6, min_width=240, visible=False) as self.ternary:
                    self._ternary_options()
                self.tokens = gr.Slider(
                    *TOKEN_RANGE, DEFAULT_TOKENS, step=512, label=texts.CALIBRATION_TOKENS,
                    scale=3, min_width=200, elem_id="quantize-tokens", buttons=[],
                )  # fmt: skip
                with gr.Column(scale=2, min_width=170, elem_classes="qs-tight"):
                    self.start = gr.Button(texts.QUANTIZE, variant="primary", elem_id="quantize")
                self.window = gr.Number(WINDOW, precision=0, visible=False)
                self.seed = gr.Number(0, precision=0, visible=False, elem_id="seed")
            self._folds()
            self.cost = Cost(ctx)
            self.autopilot = Autopilot(ctx)
            self.calibrations = Calibrations(ctx)
            self.measure = gr.Checkbox(
                True,
                label=f"{texts.MEASURE}: the run and the original, on {QUICK_TOKENS:,} tokens",
                container=False,
                elem_id="measure",
            )
            self.summary = gr.HTML(cards.hint(texts.RUN_EMPTY), elem_id="summary", apply_default_css=False)
            self.numbers = Table(label=texts.NUMBERS, elem_id="quick-numbers", elem_classes="qs-card", visible=False)
            with gr.Row(equal_height=False, elem_classes="qs-charts"):
                with gr.Column(scale=5, min_width=320):
                    self.sqnr = Chart(None, label=texts.SQNR_LABEL, height=300, elem_id="sqnr", visible=False)
                with gr.Column(scale=4, min_width=300):
                    self.sites = Chart(None, label=texts.SITES_LABEL, height=300, elem_id="sites", visible=False)
            self.forward = gr.Button(texts.TO_COMPARE, elem_classes="qs-next", elem_id="to-compare")
            with gr.Accordion(texts.DETAILS, open=False):
                self.details = gr.HTML("", elem_id="details", apply_default_css=False)
            with gr.Accordion(texts.LEARN_QUANTIZE_TITLE, open=False):
                gr.Markdown(texts.LEARN_QUANTIZE)

    def _folds(self) -> None:
        """Make the folded controls here: bits of every tensor, clusters of every reordering, segments for integers."""
        with gr.Row(elem_classes="qs-folds") as self.folds:
            with gr.Accordion(texts.BITS_PANEL, open=False):
                gr.Markdown(texts.BITS_INFO, elem_classes="qs-caption")
                with gr.Row():
                    self.bits = {
                        name: gr.Dropdown(
                            BIT_CHOICES,
                            value=getattr(SCHEMES["W4A4"], name),
                            label=texts.BIT_LABELS[name],
                            min_width=90,
                            filterable=False,
                            elem_id=f"bits-{name}",
                        )
                        for name in (entry.name for entry in fields(Bits))
                    }
            with gr.Accordion(texts.CLUSTER_PANEL, open=False) as self.cluster_fold:
                with gr.Row():
                    defaults = Clusters.uniform(32)
                    self.clusters = {
                        name: gr.Number(
                            getattr(defaults, name),
                            label=texts.CLUSTER_LABELS[name],
                            precision=0,
                            min_width=110,
                            elem_id=f"clusters-{name}",
                        )
                        for name in REORDERS
                    }
                self.order, self.segments = (
                    gr.Dropdown(
                        [(words, name) for name, words in choices.items()],
                        value=next(iter(choices)),
                        label=label,
                        info=info,
                        filterable=False,
                        elem_id=place,
                    )
                    for place, choices, label, info in (
                        ("residual-order", texts.ORDERS, texts.ORDER_LABEL, texts.ORDER_INFO),
                        ("segments", texts.SEGMENTS, texts.SEGMENTS_LABEL, texts.SEGMENTS_INFO),
                    )
                )
            self.plus = PlusFields()
            self.rotation = RotationFields()
            self.distill = DistillFields()
            self.layers = LayerField(self.ctx)

    def _ternary_options(self) -> None:
        """Make the controls of the method bitnet here."""
        choices = [(texts.NOT_QUANTISED if bits == 16 else f"{bits} bits", bits) for bits in ATTENTION_BITS]
        with gr.Row():
            self.keep = gr.Slider(
                0.05, 1.0, 0.5, step=0.05, label=texts.TOPK, scale=2, min_width=170, elem_id="topk-keeps", buttons=[]
            )
            defaults, labels = BitNetOptions(), {"kv_bits": texts.KV_BITS, "bos_bits": texts.BOS_BITS, "q_bits": texts.Q_BITS}
            self.attention = {
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

    @property
    def inputs(self) -> set:
        """All fields of the recipe on this tab."""
        fields = (self.bits, self.clusters, self.attention, self.plus.fields, self.rotation.fields, self.distill.fields)
        return {
            self.variant,
            self.weights,
            self.segments,
            self.order,
            self.keep,
            self.tokens,
            self.window,
            self.seed,
            self.measure,
            self.layers.text,
            *(f for group in fields for f in group.values()),
        }

    @property
    def results(self) -> list:
        """Components that a run changes."""
        return [self.summary, self.numbers, self.sqnr, self.sites, self.details]

    def recipe(self, values: Updates) -> QuantRecipe:
        """Return the recipe of the page's fields. Raises: InputError naming a field out of range."""
        side = self.side
        model, revision = side.chosen_model(values)
        calibration = replace(side.calibration(values), window=values[self.window])
        if values[side.method] == "bitnet":
            attention = {name: _whole(values[field]) for name, field in self.attention.items()}
            options = BitNetOptions(values[side.mode], values[self.keep], **attention)
            return QuantRecipe(model, revision, "bitnet", calibration=calibration, seed=values[self.seed], bitnet=options)
        custom = values[side.scheme] == "custom"
        bits = Bits(**{name: _whole(values[field]) for name, field in self.bits.items()}) if custom else None
        counts = {name: require_count(name, values[field]) for name, field in self.clusters.items()}
        rptq = values[side.method] == "rptq"
        own = {"segments": values[self.segments], "order": values[self.order], "plus": self.plus.read(values)} if rptq else {}
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
            values[self.seed],
            overrides=self.layers.read(values),
            **own,
            rotation=self.rotation.read(values) if values[side.method] == "rotation" else None,
            distill=self.distill.read(values),
        )

    def fill(self, recipe: QuantRecipe) -> Updates:
        """Set the widgets to a recipe."""
        options = recipe.bitnet or BitNetOptions()
        return {
            self.keep: options.keep,
            **{field: getattr(options, name) for name, field in self.attention.items()},
            **self.plus.fill(recipe.plus),
            **self.rotation.fill(recipe.rotation),
            **self.distill.fill(recipe.distill),
            **self.show(recipe.method, recipe.variant),
            self.variant: gr.update(choices=variant_choices(recipe.method), value=recipe.variant),
            self.weights: recipe.weights,
            self.segments: recipe.segments,
            self.order: recipe.order,
            self.tokens: gr.update(value=recipe.calibration.tokens, visible=recipe.method != "bitnet"),
            self.window: recipe.calibration.window,
            self.seed: recipe.seed,
            **{field: getattr(recipe.tensor_bits, name) for name, field in self.bits.items()},
            **{field: getattr(recipe.clusters, name) for name, field in self.clusters.items()},
            **self.layers.fill(recipe.overrides),
        }

    def fill_all(self, recipe: QuantRecipe) -> Updates:
        """Set the widgets here and at the side to a recipe."""
        return {**self.side.fill(recipe), **self.fill(recipe)}

    def show(self, method: object, variant: object = "default") -> Updates:
        """Show only the controls that a method and its variant use."""
        grid = method != "bitnet"
        shown = {
            self.grid: grid,
            self.ternary: not grid,
            self.folds: grid,
            self.tokens: grid,
            self.plus.fold: method == "rptq",
            self.rotation.fold: method == "rotation",
            self.cluster_fold: method == "rptq" or (method == "rtn" and variant == "matched"),
        }
        return {part: gr.update(visible=visible) for part, visible in shown.items()}

    def render(self, session: Session) -> Updates:
        """Show the results of the session's last run, with those of the others."""
        runs = [(place, run) for place, run in enumerate(session.runs) if run.quantize is not None]
        if not runs:
            return {
                self.summary: cards.hint(texts.RUN_EMPTY),
                self.numbers: gr.update(visible=False),
                self.sqnr: gr.update(visible=False),
                self.sites: gr.update(visible=False),
                self.details: "",
            }
        place, last = runs[-1]
        lines = [(p, session.title(run), run.quantize) for p, run in runs[-CURVES:]]
        kinds = [(kind, texts.SITE_LABELS[kind]) for kind in SITES]
        curve = any(plots_runs.drawable(entry.output_sqnr_db) is not None for _, _, report in lines for entry in report.layers)
        numbers = numbers_table(session, session.runs)
        return {
            self.summary: cards.run_summary(last.quantize, full_name(last), place, verdict(last)),
            self.numbers: gr.update(value=numbers, visible=bool(numbers)),
            self.sqnr: gr.update(value=plots_runs.layer_sqnr(lines, revision=last.key), visible=curve),
            self.sites: gr.update(
                value=plots_runs.site_sqnr(last.quantize, kinds), visible=any(entry.sites for entry in last.quantize.layers)
            ),
            self.details: details(last.quantize),
        }

    def wire(self, before: Callable, after: Callable[[Session], Updates], targets: list) -> None:
        """Connect the tab's events.

        Args:
            before: before(session, recipe): a stream of updates that opens the recipe's model.
            after: after(session): updates of other tabs when a run was added.
            targets: the components that both of them change.
        """
        guard, side, status = self.ctx.guard, self.side, [self.ctx.status, self.ctx.stop]
        self.before, self.after = before, after
        scheme = side.scheme.input(guard(self.scheme_chosen), {side.scheme}, [*self.bits.values(), *status], **LIGHT)
        parts = [*side.show("rptq"), *self.show("rptq"), self.variant, self.weights]
        method = side.method.input(guard(self.method_chosen), {side.method}, [*parts, *status], **LIGHT)
        variant = self.variant.input(
            guard(self.variant_chosen), {side.method, self.variant}, [self.cluster_fold, *status], **LIGHT
        )
        own = [field.input(self.own_bits, None, [side.scheme], **LIGHT) for field in self.bits.values()]
        layers = [
            event(guard(self.layers.checked), {self.ctx.key, self.layers.text}, [self.layers.note, *status], **LIGHT)
            for event in (self.layers.text.blur, self.layers.text.submit)
        ]
        chosen = [event.then for event in (scheme, method, variant, *own, *layers)]
        for slider, other in ((side.tokens, self.tokens), (self.tokens, side.tokens)):  # both show the recipe's tokens
            slider.input(None, slider, other, js="(tokens) => tokens", api_visibility="private")
        self.tab.select(guard(self.opened), {self.ctx.key}, [*self.results, *status], **LIGHT)
        inputs = {self.ctx.key, *side.source, *side.recipe, *self.inputs}
        *others, last = self.clusters.values()  # every g changes the last, after the others
        typed = [side.mode, side.tokens, self.tokens, self.weights, self.segments, self.order, self.keep]
        typed += [*self.attention.values(), *self.plus.fields.values(), *self.rotation.fields.values()]
        changes = [last.change, *(field.blur for field in others), *(field.input for field in typed), *chosen]
        filled = self.autopilot.wire(self.recipe, inputs, [self.tab.select, scheme.then, method.then], self.fill_all)
        self.cost.wire(self.recipe, inputs, self.tab.select, [*changes, filled])
        self.calibrations.wire(self.recipe, inputs)
        for button in (self.start, side.quantize):
            shown = [*self.results, *self.cost.outputs, *self.autopilot.outputs, *targets]
            self.ctx.on(button.click, self.run, inputs, [*shown, *status])

    def scheme_chosen(self, values: Updates) -> Updates:
        """Set every tensor's bits to the scheme's."""
        bits = SCHEMES.get(values[self.side.scheme])
        return {field: getattr(bits, name) for name, field in self.bits.items()} if bits else {}

    def method_chosen(self, values: Updates) -> Updates:
        """Show the controls of the method."""
        method = values[self.side.method]
        variant = gr.update(choices=variant_choices(method), value="default")
        weights = "rtn" if method == "rtn" else "gptq"
        return {**self.side.show(method), **self.show(method), self.variant: variant, self.weights: weights}

    def variant_chosen(self, values: Updates) -> Updates:
        """Show the cluster counts where the variant has groups."""
        return {self.cluster_fold: self.show(values[self.side.method], values[self.variant])[self.cluster_fold]}

    def own_bits(self) -> Updates:
        """Switch to the scheme "custom" after a tensor's bits were changed."""
        return {self.side.scheme: "custom"}

    def opened(self, values: Updates) -> Updates:
        """Show the session's last run."""
        return self.render(self.ctx.session(values))

    async def run(self, values: Updates) -> AsyncIterator[Updates]:
        """Quantise by the recipe of the fields. The charts follow if it names another model than the one they show."""
        session, recipe = self.ctx.session(values), self.recipe(values)
        async for updates in self.before(session, recipe):
            yield updates
        async for updates in self.quantize(session, recipe, bool(values[self.measure])):
            yield updates
        known = self.cost.render(session) if session.costs.predicted is not None else {}
        yield {**self.render(session), **known, **self.autopilot.render(session), **self.after(session), **self.ctx.rest(session)}

    async def quantize(self, session: Session, recipe: QuantRecipe, measure: bool) -> AsyncIterator[Updates]:
        """Follow one quantisation and its measurements; finished parts appear as they come.

        Both models are measured by one protocol; the original is measured again if it has only been measured by others.
        """
        state = state_of(recipe.model)
        base, model = session.base_run(recipe.model, state), {"model": recipe.model, "revision": recipe.revision}
        info = session.models.get(recipe.model)
        protocol = Protocol(MEASURED_TEXT, QUICK_TOKENS, window_of(info))
        base_key = ("evaluation", recipe.model, recipe.revision, state, protocol)
        if (known := self.ctx.shared.get(base_key)) and protocol not in base.measured:
            base.measure(protocol, known)
        told = session.costs.estimate if session.costs.recipe == recipe else None
        timed, weights = told is not None, (1.0, 8.0, 4.0, 1.5)
        if timed:
            weights = (0.1, LOADING_SECONDS if told.saved else told.seconds, told.compare_seconds, told.original_seconds)
        steps = [
            Step("load", model, "Loading the model", weights[0], timed),
            Step("quantize", {"recipe": recipe}, "Quantising", weights[1], timed),
        ]
        if measure:
            common = vars(protocol)
            both = {"key": recipe.hash, "reference": recipe.model, "reference_revision": recipe.revision, **common}
            steps.append(Step("evaluate", both, "Measuring the quantised model", weights[2], timed))
            if protocol not in base.measured:
                alone = {"key": recipe.model, "revision": recipe.revision, **common}
                steps.append(Step("evaluate", alone, "Measuring the original", weights[3], timed))
        run, seen = None, 0
        async for job in self.ctx.follow(session, "quantize", steps):
            while seen < len(job.results):
                report, seen = job.results[seen], seen + 1
                if seen == 1:
                    session.models[recipe.model] = report
                elif seen == 2:
                    run = session.add_run(Run(report.key, report.label, recipe))
                    run.quantize = report
                elif seen == 3:
                    session.protocol = protocol
                    run.measure(protocol, report)
                else:
                    base.measure(protocol, report)
                    self.ctx.shared.put(base_key, report)
                yield self.render(session)
            yield self.ctx.busy(job, recipe.label())
        if run is None:
            raise InputError("The run gave no result: try again.", code="E-PARAM-RECIPE")


def _whole(value: object) -> int:
    return require_int("bits", value, 2, 16, "use 2 to 8, or 16 for not quantised")

"""The tab Reorder: drag g; clusters, strips before and after, and predicted error follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from app import engine
from app.context import LIGHT, Context, Updates, ranges_key
from app.session import Session
from app.tabs.bases import Bases, basis_of, is_waiting, noise_of, panels_of, shown_ranges
from app.tabs.explore import SITE_CHOICES, last_layer, layer_slider, no_ranges, revision, scatter, site_of
from app.tabs.fused import Fused
from app.view import cards, groups, plots_bases, plots_clusters, tables, texts, texts_bases, texts_groups
from app.view import plots_ranges as plots
from app.view.chart import Chart, written
from app.view.figure import note
from app.worker.job import Step
from core.checks import require_choice, require_int
from core.errors import QuantscopeError
from core.recipe import PER_CHANNEL, REORDER_OF, REORDERS, SITES, Clusters, QuantRecipe

MAX_CLUSTERS = 64


class Reorder:
    """The tab: its widgets, their contents for a session, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Tab(texts.REORDER, id="reorder") as self.tab:
            with gr.Row(elem_classes="qs-controls qs-card"):
                self.layer = gr.Slider(
                    0, 1, 0, step=1, label=texts.LAYER, scale=2, min_width=180, elem_id="reorder-layer", buttons=[]
                )
                self.kind = gr.Radio(
                    SITE_CHOICES,
                    value="down_in",
                    label=texts.SITE,
                    scale=6,
                    min_width=300,
                    elem_id="reorder-site",
                    elem_classes="qs-pills",
                )
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                self.clusters = gr.Slider(
                    1, MAX_CLUSTERS, 32, step=1, label=texts.CLUSTERS, scale=6, min_width=180, elem_id="g", buttons=[]
                )
                self.bits = gr.Dropdown(
                    [("2 bits", 2), ("3 bits", 3), ("4 bits", 4), ("8 bits", 8)],
                    value=4,
                    label=texts.BITS_PREVIEW,
                    scale=1,
                    min_width=100,
                    elem_id="preview-bits",
                    filterable=False,
                )
                with gr.Column(scale=6, min_width=280, elem_classes="qs-tight"):
                    self.headline = gr.HTML("", elem_id="headline", apply_default_css=False)
            with gr.Row(elem_classes="qs-controls qs-card"):
                self.bases = Bases(ctx, "reorder")
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=300):
                    self.scatter = Chart(None, label=texts.CLUSTER_SCATTER_LABEL, height=330, elem_id="cluster-scatter")
                    self.curve = Chart(None, label=texts.CURVE_LABEL, height=240, elem_id="curve")
                with gr.Column(scale=7, min_width=320):
                    self.strips = Chart(None, label=texts.STRIPS_LABEL, height=582, turn=0, elem_id="strips")
            self.bases.card.render()
            self.knee = gr.HTML("", elem_id="knee", apply_default_css=False)
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=300):
                    self.nats = Chart(None, label=texts_groups.NATS_LABEL, height=300, elem_id="nats")
                    self.everywhere = gr.Checkbox(False, label=texts_groups.EVERYWHERE, container=False, elem_id="everywhere")
                    gr.Markdown(texts_groups.CURVE_NOTE, elem_classes="qs-caption")
                with gr.Column(scale=7, min_width=320):
                    self.errors = gr.HTML("", elem_id="errors", elem_classes="qs-card", apply_default_css=False)
            self.fused = Fused(ctx)
            self.forward = gr.Button(texts.TO_QUANTIZE, elem_classes="qs-next", elem_id="to-quantize")
            with gr.Accordion(texts.CLUSTER_TABLE, open=False):
                self.table = gr.HTML("", elem_id="clusters", apply_default_css=False)
            with gr.Accordion(texts.LEARN_REORDER_TITLE, open=False):
                gr.Markdown(texts.LEARN_REORDER)

    @property
    def charts(self) -> list:
        """Components that follow the slider."""
        return [self.scatter, self.curve, self.strips, self.headline, self.table, *self.bases.outputs]

    @property
    def outputs(self) -> list:
        """Components that another model changes."""
        return [self.layer, self.kind, self.clusters, self.bits, *self.charts, *self.costs]

    @property
    def costs(self) -> list:
        """Components that show errors by cluster count, for any g."""
        return [self.knee, self.nats, self.errors]

    def take(self, session: Session, values: Updates) -> None:
        """Store the chosen layer, site and bits in the session. Raises: InputError if the model has none such, or for bits."""
        chosen = session.selection
        chosen.bits = require_int("bits", values[self.bits], 2, 8, "use 2 to 8")
        chosen.everywhere = bool(values[self.everywhere])
        top = last_layer(session)
        kind = require_choice("site", values[self.kind], SITES)
        layer = require_int("layer", values[self.layer], 0, top, f"use 0 to {top}")
        if (layer, kind) != (chosen.layer, chosen.kind):
            chosen.channel = None
        chosen.layer, chosen.kind = layer, kind

    def controls(self, session: Session) -> Updates:
        """Set the selectors to the session's selection."""
        chosen = session.selection
        return {
            self.layer: gr.update(**layer_slider(session)),
            self.kind: gr.update(value=chosen.kind, label=site_title(chosen.kind)),
            self.clusters: gr.update(**slider_of(chosen.clusters)),
            self.bits: chosen.bits,
        }

    def render(self, session: Session) -> Updates:
        """Show the charts that follow the slider; they are drawn once for all sessions with the same ranges and selection."""
        if session.ranges is None:
            return {self.scatter: no_ranges(session), self.strips: note(""), self.curve: note("")}
        shown = self.bases.render(session, site_of(session).site)
        if is_waiting(session):
            empty = dict.fromkeys((self.strips, self.curve), note(""))
            return {**shown, **empty, self.scatter: note(texts_bases.WAIT), self.headline: "", self.table: ""}
        drawn = engine.derived.get(session.ranges, (self._draw, session.selection.key), lambda: written(self._draw(session)))
        return {**shown, **drawn}

    def _draw(self, session: Session) -> Updates:
        """Draw the charts: all but the curve's line cost a few milliseconds per thousand channels."""
        site, chosen, bits, report = site_of(session), session.selection, session.selection.bits, shown_ranges(session)
        view = engine.recluster(report, site.site, chosen.clusters, bits=bits)
        told = {
            self.headline: cards.cluster_figures(view, len(site.low) // site.block),
            self.table: cards.table(texts.CLUSTER_HEADERS, tables.cluster_rows(view)),
        }
        if chosen.basis == "all":
            return {**told, **self._draw_all(session, site)}
        scale = plots.scale_of([site], linear=chosen.linear)
        curve = engine.error_curve(report, site.site, bits=bits)
        return {
            **told,
            self.scatter: scatter(session, view),
            self.strips: plots_clusters.reorder_strips(view, scale=scale, revision=revision(session, "strips")),
            self.curve: plots_clusters.error_curve(
                curve,
                current=per_group(site.kind, chosen.clusters),
                error=view.predicted_error,
                revision=revision(session, f"curve{bits}"),
            ),
        }

    def _draw_all(self, session: Session, site: Any) -> Updates:
        """Draw the charts of all bases."""
        chosen, panels = session.selection, panels_of(session, site.site)
        curves = {name: engine.error_curve(report, site.site, bits=chosen.bits) for name, report in session.bases.items()}
        axes = {"linear": chosen.linear, "revision": revision(session, "all")}
        current = per_group(site.kind, chosen.clusters)
        return {
            self.scatter: plots_bases.scatters(panels, **axes),
            self.strips: plots_bases.strips(panels, **axes),
            self.curve: plots_bases.noise_curves(curves, noise_of(session, site.site), current=current),
        }

    def shown(self, session: Session) -> Updates:
        """Show everything of the tab."""
        if session.ranges is None:
            return self.render(session)
        return {**self.controls(session), **self.render(session), **self.priced(session)}

    def priced(self, session: Session) -> Updates:
        """Show squared error and, where it is known, predicted divergence by cluster count."""
        site, bits = site_of(session), session.selection.bits
        if is_waiting(session):
            return {}
        curve = engine.error_curve(shown_ranges(session), site.site, bits=bits)
        other = basis_of(session) != "original"
        costs = session.curve[1] if session.curve[0] == self.place(session) and not other else None
        drawn = plots_clusters.cost_curve(costs, revision=revision(session, f"nats{bits}")) if costs else None
        rows = groups.curve_rows(curve, costs)
        return {
            self.knee: f'<p class="qs-verdict">{groups.knee_words(curve, costs)}</p>',
            self.nats: drawn or note(texts_bases.NATS_ORIGINAL if other else texts_groups.NATS_WAIT),
            self.errors: cards.table(texts_groups.CURVE_HEADERS, rows, caption=texts_groups.CURVE_TABLE),
        }

    def place(self, session: Session) -> tuple:
        """Return all that the cost of the selected site by cluster count depends on."""
        ranges, chosen = session.ranges, session.selection
        own = (site_of(session).kind, None if chosen.everywhere else chosen.layer, chosen.bits)
        return (ranges.model, ranges.revision, session.calibration, *own)

    async def price(self, session: Session) -> AsyncIterator[Updates]:
        """Predict by a job what the selected site costs in nats, by cluster count. Nothing if it is known.

        If the chosen view needs the ranges of other bases, they are observed before.
        """
        async for updates in self.bases.observe(session, self.shown):
            yield updates
        place = self.place(session) if session.ranges is not None and basis_of(session) == "original" else None
        if place in (None, session.curve[0]):
            return
        model, revision, calibration, site, layer, bits = place
        recipe = QuantRecipe(model, revision, calibration=calibration).with_bits({site: bits})
        step = Step("curve", {"recipe": recipe, "site": site, "layer": layer}, texts_groups.NATS_JOB, 2.0)
        ranges = ranges_key(model, revision, calibration)
        key = ("curve", ranges, site, layer, bits) if ranges else None
        try:
            async for job in self.ctx.follow(session, "curve", [step], key=key):
                yield {} if job.finished else {self.nats: note(job.stage or texts_groups.NATS_JOB)}
        except QuantscopeError:
            yield {self.nats: note(texts_groups.NATS_WAIT)}
            raise
        session.curve = place, job.results[0]
        if self.place(session) == place:
            yield self.priced(session)

    def redrawn(self, session: Session) -> Updates:
        """Draw the charts after a change at the side or on another tab; a hidden tab is drawn when it is opened."""
        return self.render(session) if session.tab == "reorder" else {}

    def wire(self, mirrored: list) -> None:
        """Connect the tab's events. `mirrored`: the side's slider and the fields R1 to R5, which follow g."""
        guard, key = self.ctx.guard, self.ctx.key
        self.side, *self.fields = mirrored
        drawn = [*self.charts, self.ctx.status, self.ctx.stop]
        dragged = {**LIGHT, "trigger_mode": "always_last"}
        chosen, priced = {key, self.layer, self.kind, self.bits, self.everywhere}, [*self.costs, self.ctx.status, self.ctx.stop]
        for control in (self.layer, self.kind, self.bits, self.everywhere):
            control.input(guard(self.redraw), chosen, [self.kind, *drawn, *self.costs], **dragged)
        for event in (self.layer.release, self.kind.input, self.bits.input, self.everywhere.input):
            self.ctx.on(event, self.rested, chosen, priced)
        self.ctx.on(self.tab.select, self.looked, {key}, [*self.outputs, *priced])
        self.ctx.on(self.bases.view.input, self.switched, {key, self.bases.view}, [*self.outputs, *priced])
        every_g = [self.clusters, *mirrored]
        for slider, handler in ((self.clusters, self.moved), (self.side, self.moved_at_side)):
            slider.input(guard(handler), {key, slider}, [*drawn, *every_g], **dragged)
        for entry in self.fields:
            entry.input(guard(self.typed), {key, *self.fields}, [*drawn, *every_g], **dragged)
        everything = [*self.outputs, self.ctx.status, self.ctx.stop]
        self.tab.select(guard(self.opened), {key}, everything, **dragged)

    def redraw(self, values: Updates) -> Updates:
        """Draw another layer or site, or the errors at other bits."""
        session = self.ctx.session(values)
        self.take(session, values)
        label = {self.kind: gr.update(label=site_title(session.selection.kind))}
        return {**self.render(session), **(self.priced(session) if session.ranges is not None else {}), **label}

    async def rested(self, values: Updates) -> AsyncIterator[Updates]:
        """Predict the cost of another layer, site or number of bits once its control rests."""
        session = self.ctx.session(values)
        self.take(session, values)
        async for updates in self.price(session):
            yield updates

    async def switched(self, values: Updates) -> AsyncIterator[Updates]:
        """Show the channels in another basis."""
        session = self.ctx.session(values)
        self.bases.take(session, values[self.bases.view])
        if session.ranges is not None:
            yield await asyncio.to_thread(self.shown, session)
            async for updates in self.price(session):
                yield updates

    async def looked(self, values: Updates) -> AsyncIterator[Updates]:
        """Predict the cost of the selected site when the tab is opened."""
        async for updates in self.price(self.ctx.session(values)):
            yield updates

    def moved(self, values: Updates) -> Updates:
        """Set g from the slider of this tab; the side's slider and the fields follow."""
        return {**self._spread(values, self.clusters, self.side), **self.render(self.ctx.session(values))}

    def moved_at_side(self, values: Updates) -> Updates:
        """Set g from the side's slider; the slider of this tab and the fields follow."""
        return {**self._spread(values, self.side, self.clusters), **self.redrawn(self.ctx.session(values))}

    def _spread(self, values: Updates, slider: gr.Slider, other: gr.Slider) -> Updates:
        session = self.ctx.session(values)
        g = require_clusters(values[slider])
        session.selection.clusters = Clusters.uniform(g)
        words = slider_of(session.selection.clusters)
        return {
            **spread(g, self.fields),
            slider: gr.update(label=words["label"]),  # the label only: the slider may be moving
            other: gr.update(**words),
        }

    def typed(self, values: Updates) -> Updates:
        """Set the five counts from their fields; both sliders follow, and their labels say if no single g gives these counts."""
        session = self.ctx.session(values)
        counts = {name: require_count(name, values[entry]) for name, entry in zip(REORDERS, self.fields, strict=True)}
        session.selection.clusters = Clusters(**counts)
        words = gr.update(**slider_of(session.selection.clusters))
        return {**self.redrawn(session), self.clusters: words, self.side: words}

    def opened(self, values: Updates) -> Updates:
        """Draw what was observed or selected while another tab was open."""
        return self.shown(self.ctx.session(values))


def per_group(kind: str, clusters: Clusters) -> int:
    """Return the cluster count of a site by a recipe's clusters, within a head for queries, keys and values."""
    return getattr(clusters, REORDER_OF[kind])


def site_title(kind: str) -> str:
    """Return the label of the sites' buttons, which describes the chosen one."""
    return f"{texts.SITE}: {texts.SITE_HELP[kind]}"


def spread(g: int, fields: list) -> Updates:
    """Set the fields R1 to R5 to the counts that one g gives."""
    clusters = Clusters.uniform(g)
    return {field: getattr(clusters, name) for name, field in zip(REORDERS, fields, strict=True)}


def slider_of(clusters: Clusters) -> dict[str, object]:
    """Return value and label of a slider of g; the label says when no single g gives the five counts."""
    own = clusters != Clusters.uniform(clusters.R1)
    label = f"{texts.CLUSTERS}: {texts.OWN_CLUSTERS}" if own else texts.CLUSTERS
    return {"value": min(clusters.R1, MAX_CLUSTERS), "label": label}


def require_count(name: str, value: object) -> int:
    """Return a cluster count of one reordering. Raises: InputError for anything else."""
    return require_int(f"clusters of {name}", value, 1, PER_CHANNEL, f"use 1 to {PER_CHANNEL}")


def require_clusters(value: object) -> int:
    """Return a cluster count of the sliders. Raises: InputError for anything else."""
    return require_int("clusters g", value, 1, MAX_CLUSTERS, f"use 1 to {MAX_CLUSTERS}")

"""Reorder: drag g and watch the clusters, the strips before and after, and the predicted error."""

from __future__ import annotations

import json
from dataclasses import dataclass

import gradio as gr

from app import engine
from app.context import LIGHT, Context, Updates
from app.session import Session
from app.tabs.explore import SITE_CHOICES, no_ranges, revision, scatter, site_of
from app.view import cards, plots_clusters, tables, texts
from app.view import plots_ranges as plots
from app.view.chart import Chart
from app.view.figure import note
from core.errors import InputError
from core.recipe import SITES, Clusters, require_int

MAX_CLUSTERS = 64


@dataclass
class Reorder:
    """The tab's widgets."""

    tab: gr.Tab
    layer: gr.Slider
    kind: gr.Radio
    clusters: gr.Slider
    bits: gr.Dropdown
    headline: gr.HTML
    scatter: Chart
    curve: Chart
    strips: Chart
    table: gr.HTML
    forward: gr.Button

    def take(self, session: Session, values: Updates) -> None:
        """Read the selectors into the session."""
        chosen = session.selection
        chosen.clusters = require_clusters(values[self.clusters])
        if values[self.kind] not in SITES:
            raise InputError("This site is not known: choose one of the list.", code="E-PARAM-SITE")
        layer = require_int("layer", values[self.layer], 0, 10_000, "use a layer of the model")
        if (layer, values[self.kind]) != (chosen.layer, chosen.kind):
            chosen.channel = None
        chosen.layer, chosen.kind = layer, values[self.kind]

    def controls(self, session: Session) -> Updates:
        """The selectors, set to the session's selection."""
        chosen = session.selection
        top = max(s.layer for s in session.ranges.sites.values())
        return {
            self.layer: gr.update(value=chosen.layer, maximum=top),
            self.kind: gr.update(value=chosen.kind, label=f"{texts.SITE}: {texts.SITE_HELP[chosen.kind]}"),
            self.clusters: chosen.clusters,
        }

    def render(self, session: Session, bits: int) -> Updates:
        """The charts that follow the slider: all but the curve's line cost a few milliseconds per thousand channels."""
        if session.ranges is None:
            return {self.scatter: no_ranges(session), self.strips: note(""), self.curve: note("")}
        site, chosen = site_of(session), session.selection
        view = engine.recluster(session.ranges, site.site, Clusters.uniform(chosen.clusters), bits=bits)
        scale = plots.scale_of([site], linear=chosen.linear)
        curve = engine.error_curve(session.ranges, site.site, bits=bits)
        return {
            self.scatter: scatter(session, view),
            self.strips: plots_clusters.reorder_strips(view, scale=scale, revision=revision(session, "strips")),
            self.curve: plots_clusters.error_curve(
                curve,
                current=per_group(site.kind, chosen.clusters),
                error=view.predicted_error,
                revision=revision(session, f"curve{bits}"),
            ),
            self.headline: cards.cluster_figures(view, len(site.low) // site.block),
            self.table: cards.table(texts.CLUSTER_HEADERS, tables.cluster_rows(view)),
        }


def per_group(kind: str, clusters: int) -> int:
    """The cluster count the recipe gives a site: g over the whole width, an eighth of it within a head."""
    chosen = Clusters.uniform(clusters)
    return getattr(chosen, texts.SITE_REORDER[kind])


def spread() -> str:
    """Write a JavaScript function g => [g, R1, R2, R3, R4, R5]: a look-up in a table made by `Clusters.uniform`.

    The browser fills the fields while the slider moves; the rule itself is in Python alone.
    """
    rows = [[g, *vars(Clusters.uniform(g)).values()] for g in range(1, MAX_CLUSTERS + 1)]
    table = json.dumps(rows, separators=(",", ":"))
    return f"(g) => {table}[Math.min(Math.max(g, 1), {MAX_CLUSTERS}) - 1]"


def require_clusters(value: object) -> int:
    """A cluster count of the sliders. Raises InputError otherwise."""
    return require_int("clusters g", value, 1, MAX_CLUSTERS, f"use 1 to {MAX_CLUSTERS}")


def build() -> Reorder:
    """The tab's widgets, in place."""
    with gr.Tab(texts.REORDER, id="reorder") as tab:
        with gr.Row(elem_classes="qs-controls qs-card"):
            layer = gr.Slider(0, 1, 0, step=1, label=texts.LAYER, scale=2, min_width=180, elem_id="reorder-layer", buttons=[])
            kind = gr.Radio(
                SITE_CHOICES,
                value="down_in",
                label=texts.SITE,
                scale=6,
                min_width=300,
                elem_id="reorder-site",
                elem_classes="qs-pills",
            )
        with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
            clusters = gr.Slider(
                1, MAX_CLUSTERS, 32, step=1, label=texts.CLUSTER_SLIDER, scale=6, min_width=240, elem_id="g", buttons=[]
            )
            bits = gr.Dropdown(
                [("2 bits", 2), ("3 bits", 3), ("4 bits", 4), ("8 bits", 8)],
                value=4,
                label=texts.BITS_PREVIEW,
                scale=1,
                min_width=100,
                elem_id="preview-bits",
                filterable=False,
            )
            with gr.Column(scale=6, min_width=280, elem_classes="qs-tight"):
                headline_html = gr.HTML("", elem_id="headline", apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                scatter_chart = Chart(None, label=texts.CLUSTER_SCATTER_LABEL, height=330, elem_id="cluster-scatter")
                curve = Chart(None, label=texts.CURVE_LABEL, height=240, elem_id="curve")
            with gr.Column(scale=7, min_width=320):
                strips = Chart(None, label=texts.STRIPS_LABEL, height=582, elem_id="strips")
        forward = gr.Button(texts.TO_QUANTIZE, elem_classes="qs-next", elem_id="to-quantize")
        with gr.Accordion(texts.CLUSTER_TABLE, open=False):
            table = gr.HTML("", elem_id="clusters", apply_default_css=False)
        with gr.Accordion(texts.LEARN_REORDER_TITLE, open=False):
            gr.Markdown(texts.LEARN_REORDER)
    return Reorder(
        tab=tab,
        layer=layer,
        kind=kind,
        clusters=clusters,
        bits=bits,
        headline=headline_html,
        scatter=scatter_chart,
        curve=curve,
        strips=strips,
        table=table,
        forward=forward,
    )


def wire(ctx: Context, view: Reorder, mirrored: list, renewed: list) -> None:
    """Connect the tab's events.

    Args:
        mirrored: the side's slider and the fields R1 to R5, which follow g.
        renewed: events after which other ranges are there.
    """
    charts = [view.scatter, view.curve, view.strips, view.headline, view.table, ctx.status, ctx.stop]
    inputs = {ctx.key, view.layer, view.kind, view.clusters, view.bits}
    side, *fields = mirrored

    def redraw(values: dict) -> Updates:
        session = ctx.session(values)
        view.take(session, values)
        return view.render(session, require_int("bits", values[view.bits], 2, 8, "use 2 to 8"))

    def opened(values: dict) -> Updates:
        session = ctx.session(values)
        selectors = view.controls(session) if session.ranges is not None else {}
        return {**selectors, **view.render(session, values[view.bits])}

    def from_side(values: dict) -> Updates:
        session = ctx.session(values)
        session.selection.clusters = require_clusters(values[side])
        return view.render(session, values[view.bits])

    for control in (view.clusters, view.layer, view.kind, view.bits):
        control.input(ctx.guard(redraw), inputs, charts, trigger_mode="always_last", **LIGHT)
    everything = [view.layer, view.kind, view.clusters, *charts]
    view.tab.select(ctx.guard(opened), {ctx.key, view.bits}, everything, trigger_mode="always_last", **LIGHT)
    for event in renewed:
        event.then(ctx.guard(opened), {ctx.key, view.bits}, everything, **LIGHT)
    for slider, other in ((view.clusters, side), (side, view.clusters)):
        slider.input(None, slider, [other, *fields], js=spread(), show_progress="hidden", api_visibility="private")
    side.input(ctx.guard(from_side), {ctx.key, side, view.bits}, charts, trigger_mode="always_last", **LIGHT)

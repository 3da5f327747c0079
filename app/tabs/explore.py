"""The tab Explore: channels as points, a heat map of layers, a list of outliers, one channel closely."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import gradio as gr

from app import engine
from app.context import LIGHT, Context, Updates, ranges_key
from app.session import Session
from app.tabs.bases import Bases, basis_of, channel_at, heatmaps_of, is_waiting, panels_of, shown_ranges
from app.tabs.grids import GridChoice
from app.view import cards, plots_bases, plots_clusters, tables, texts, texts_bases
from app.view import plots_ranges as plots
from app.view.chart import Chart, Table, picked_row, sent, written
from app.view.figure import note
from app.worker.job import Step
from core.checks import require_choice, require_float, require_int
from core.errors import InputError, QuantscopeError
from core.recipe import PER_CHANNEL, SITES

MARKED = 60
LISTED = 8
SITE_CHOICES = [(texts.site_label(kind), kind) for kind in SITES]


class Explore:
    """The tab: its widgets, their contents for a session, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Tab(texts.EXPLORE, id="explore") as self.tab:
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                self.layer = gr.Slider(
                    0, 1, 0, step=1, label=texts.LAYER, scale=1, min_width=155, elem_id="layer", buttons=[]
                )
                self.kind = gr.Radio(
                    SITE_CHOICES,
                    value="down_in",
                    label=texts.SITE,
                    scale=12,
                    min_width=300,
                    elem_id="site",
                    elem_classes="qs-pills",
                )
                with gr.Column(scale=1, min_width=170, elem_classes="qs-tight"):
                    self.linear = gr.Checkbox(False, label=texts.LINEAR, container=False, elem_id="linear")
                    self.same_axes = gr.Checkbox(False, label=texts.SAME_AXES, container=False, elem_id="same-axes")
                    self.averaged = gr.Checkbox(False, label=texts.AVERAGED, container=False, elem_id="averaged")
            with gr.Row(elem_classes="qs-controls qs-card"):
                self.bases = Bases(ctx, "explore")
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=300):
                    self.scatter = Chart(note(texts.STARTING), label=texts.SCATTER_LABEL, height=400, elem_id="scatter")
                    self.heatmap = Chart(None, label=texts.HEATMAP_LABEL, height=380, elem_id="heatmap")
                with gr.Column(scale=3, min_width=340):
                    with gr.Column(elem_classes="qs-card"):
                        self.channel = gr.Number(None, label=texts.CHANNEL, precision=0, elem_id="channel")
                        self.facts = gr.HTML(cards.hint(texts.CHANNEL_EMPTY), elem_id="facts", apply_default_css=False)
                        self.grid = GridChoice()
                        self.histogram = Chart(None, label=texts.HISTOGRAM_LABEL, height=200, elem_id="histogram")
                        self.tokens = gr.HTML("", elem_id="tokens", apply_default_css=False)
                    self.outliers = Table(label=texts.OUTLIERS, elem_id="outliers", elem_classes="qs-card")
            self.bases.card.render()
            self.forward = gr.Button(texts.TO_REORDER, elem_classes="qs-next", elem_id="to-reorder")
            with gr.Accordion(texts.LEARN_EXPLORE_TITLE, open=False):
                gr.Markdown(texts.LEARN_EXPLORE)
            with gr.Accordion(texts_bases.LEARN_TITLE, open=False):
                gr.Markdown(texts_bases.LEARN)

    @property
    def selectors(self) -> set:
        """Inputs that decide which part of the model is shown."""
        return {self.layer, self.kind, self.linear, self.same_axes, self.averaged}

    @property
    def outputs(self) -> list:
        """Components that a new selection changes."""
        charts = [self.scatter, self.heatmap, self.histogram]
        read = [self.outliers, self.channel, self.facts, self.tokens]
        return [*self.selectors, *charts, *read, *self.bases.outputs]

    def take(self, session: Session, values: Updates) -> None:
        """Store the selectors' values in the session. Raises: InputError if one is out of range."""
        chosen = session.selection
        if session.ranges is not None:
            top = last_layer(session)
            chosen.layer = require_int("layer", values[self.layer], 0, top, f"use 0 to {top}")
        kind = require_choice("site", values[self.kind], SITES)
        if kind != chosen.kind:
            chosen.channel = None
        chosen.kind = kind
        chosen.linear, chosen.same_axes = bool(values[self.linear]), bool(values[self.same_axes])
        chosen.averaged = bool(values[self.averaged])

    def render(self, session: Session) -> Updates:
        """Show everything but the channel's detail, for the session's selection."""
        report, chosen = session.ranges, session.selection
        if report is None:
            return {self.scatter: no_ranges(session), self.heatmap: note(""), self.outliers: ""}
        shown = {**self.controls(session), **self.bases.render(session, site_of(session).site)}
        if is_waiting(session):
            return {**shown, self.scatter: note(texts_bases.WAIT), self.heatmap: note(""), self.outliers: ""}
        return {
            **shown,
            **engine.derived.get(report, (self._draw, chosen.key), lambda: written(self._draw(session))),
        }

    def _draw(self, session: Session) -> Updates:
        """Draw the charts and the list; everybody with the same ranges and selection sees the same."""
        report, chosen = shown_ranges(session), session.selection
        maps, named = heatmaps_of(session), f"{report.model}/{chosen.kind}/{chosen.basis}"
        outliers = cards.table(
            texts.OUTLIER_HEADERS, tables.outlier_rows(report.outliers(LISTED)), pick=True, caption=texts.OUTLIERS
        )
        if chosen.basis == "all":
            panels = panels_of(session, site_of(session).site)
            return {
                self.scatter: plots_bases.scatters(panels, linear=chosen.linear, revision=revision(session, "scatter")),
                self.heatmap: plots_bases.heatmaps(maps, layer=chosen.layer, revision=named),
                self.outliers: outliers,
            }
        reordered = chosen.basis == "reordered"
        view = engine.recluster(report, site_of(session).site, chosen.clusters, bits=chosen.bits) if reordered else None
        return {
            self.scatter: scatter(session, view),
            self.heatmap: plots.heatmap(
                maps[chosen.basis],
                kind_label=texts.SITE_LABELS[chosen.kind],
                layer=chosen.layer,
                channel=None if reordered else chosen.channel,
                revision=named,
            ),
            self.outliers: outliers,
        }

    def controls(self, session: Session) -> Updates:
        """Set the selectors and the channel's field to the session's selection."""
        last, chosen = len(site_of(session).low) - 1, session.selection
        return {
            self.layer: gr.update(**layer_slider(session)),
            self.kind: gr.update(value=chosen.kind, label=f"{texts.SITE}: {texts.SITE_HELP[chosen.kind]}"),
            self.linear: chosen.linear,
            self.same_axes: chosen.same_axes,
            self.averaged: chosen.averaged,
            self.channel: gr.update(value=chosen.channel, label=f"{texts.CHANNEL}: click a point, or type 0 to {last}"),
        }

    def glance(self, session: Session, unread: str = texts.CHANNEL_LATER) -> Updates:
        """Show the known facts of the chosen channel. `unread`: what stands there until its values are read."""
        number, read = session.selection.channel, read_channel(session)
        if number is None or number >= len(site_of(session).low):
            return {self.facts: cards.hint(texts.CHANNEL_EMPTY), self.histogram: note(""), self.tokens: ""}
        if read is None:
            return {self.facts: channel_facts(session, number), self.histogram: note(""), self.tokens: cards.hint(unread)}
        cluster = cluster_of(session, number)
        return {
            self.facts: channel_facts(session, number, cluster),
            self.histogram: self.grid.draw(session, read, site_of(session), cluster),
            self.tokens: cards.extremes(read),
        }

    def shown(self, session: Session) -> Updates:
        """Show everything of the tab."""
        return {**self.render(session), **self.glance(session)}

    def wire(self) -> None:
        """Connect the tab's events."""
        ctx, outputs = self.ctx, [*self.outputs, self.ctx.status, self.ctx.stop]
        inputs = {ctx.key, *self.selectors}
        self.layer.input(ctx.guard(self.moved), inputs, outputs, trigger_mode="always_last", **LIGHT)
        for control in (self.kind, self.linear, self.same_axes, self.averaged):
            control.input(ctx.guard(self.moved), inputs, outputs, **LIGHT)
        self.grid.kind.input(ctx.guard(self.gridded), {ctx.key, self.grid.kind}, outputs, **LIGHT)
        ctx.on(self.tab.select, self.opened, {ctx.key}, outputs)
        ctx.on(self.layer.release, self.released, {ctx.key}, outputs)
        ctx.on(self.scatter.select, self.clicked_point, {ctx.key}, outputs)
        ctx.on(self.heatmap.select, self.clicked_cell, {ctx.key}, outputs)
        ctx.on(self.outliers.select, self.clicked_row, {ctx.key}, outputs)
        for event in (self.channel.submit, self.channel.blur):
            ctx.on(event, self.typed, {ctx.key, self.channel}, outputs)
        ctx.on(self.bases.view.input, self.switched, {ctx.key, self.bases.view}, outputs)

    def moved(self, values: Updates) -> Updates:
        """Draw another layer, site or kind of axes. The sliders are not set, as one of them may be moving."""
        session = self.ctx.session(values)
        self.take(session, values)
        if session.ranges is None:
            return self.render(session)
        kept = dict.fromkeys((self.layer, self.linear, self.same_axes, self.averaged), gr.skip())
        return {**self.shown(session), **kept}

    def gridded(self, values: Updates) -> Updates:
        """Draw another grid over the chosen channel."""
        session = self.ctx.session(values)
        self.grid.take(session, values[self.grid.kind])
        return self.glance(session) if session.ranges is not None else {}

    async def opened(self, values: Updates) -> AsyncIterator[Updates]:
        """Draw what was observed or selected while another tab was open, and read the chosen channel."""
        session = self.ctx.session(values)
        if session.ranges is not None:
            yield self.shown(session)
            async for updates in self.read(session):
                yield updates

    async def released(self, values: Updates) -> AsyncIterator[Updates]:
        """Read the chosen channel after the layer's slider was released."""
        async for updates in self.read(self.ctx.session(values)):
            yield updates

    async def switched(self, values: Updates) -> AsyncIterator[Updates]:
        """Show the channels in another basis."""
        session = self.ctx.session(values)
        self.bases.take(session, values[self.bases.view])
        if session.ranges is not None:
            yield await asyncio.to_thread(self.shown, session)
            async for updates in self.read(session):
                yield updates

    async def clicked_point(self, values: Updates, event: gr.EventData) -> AsyncIterator[Updates]:
        """Read the channel whose point was clicked."""
        session, custom = self.ctx.session(values), sent(event, "custom")
        if isinstance(custom, list) and custom:
            self.bases.choose(session, custom[-1])
            async for updates in self.show_channel(session, custom[0]):
                yield updates

    async def clicked_cell(self, values: Updates, event: gr.EventData) -> AsyncIterator[Updates]:
        """Show the layer and channel of a cell of the heat map."""
        session = self.ctx.session(values)
        layer = require_int("layer", sent(event, "y"), 0, last_layer(session), "click inside the map")
        column = require_float("channel", sent(event, "x"), -0.5, PER_CHANNEL, "click inside the map")
        session.selection.layer = layer
        self.bases.choose(session, sent(event, "curve"))
        async for updates in self.show_channel(session, channel_at(session, round(column))):
            yield updates

    async def clicked_row(self, values: Updates, event: gr.EventData) -> AsyncIterator[Updates]:
        """Show the channel of a row of the outliers."""
        session = self.ctx.session(values)
        found = shown_ranges(session).outliers(LISTED) if session.ranges is not None else []
        row = picked_row(event)
        if 0 <= row < len(found):
            session.selection.layer, session.selection.kind = found[row].layer, found[row].kind
            async for updates in self.show_channel(session, found[row].channel):
                yield updates

    async def typed(self, values: Updates) -> AsyncIterator[Updates]:
        """Read the channel whose number was typed."""
        if values[self.channel] is not None:
            async for updates in self.show_channel(self.ctx.session(values), values[self.channel]):
                yield updates

    async def show_channel(self, session: Session, channel: object) -> AsyncIterator[Updates]:
        """Choose a channel: show what is known of it at once, then read its values."""
        if session.ranges is None:
            raise InputError(texts.NO_RANGES, code="E-PARAM-CHANNEL")
        site = site_of(session)
        number = require_int("channel", channel, 0, len(site.low) - 1, f"this site has channels 0 to {len(site.low) - 1}")
        if session.selection.channel == number and read_channel(session) is not None:
            return
        session.selection.channel = number
        yield {**self.render(session), **self.glance(session, texts.CHANNEL_WAIT)}
        async for updates in self.read(session):
            yield updates

    async def read(self, session: Session) -> AsyncIterator[Updates]:
        """Read the chosen channel by a job: its histogram and the tokens behind its extremes. Nothing if they are known.

        If the chosen view needs the ranges of other bases, they are observed before.
        """
        async for updates in self.bases.observe(session, self.shown):
            yield updates
        number, basis = session.selection.channel, basis_of(session)
        if session.ranges is None or number is None or read_channel(session) is not None:
            return
        site = site_of(session).site
        ranges = ranges_key(session.ranges.model, session.ranges.revision, session.calibration)
        key = ("channel", ranges, site, number, basis) if ranges else None
        yield {self.tokens: cards.hint(texts.CHANNEL_WAIT)}
        try:
            async for job in self.ctx.follow(session, "channel", channel_steps(session, site, number, basis), key=key):
                yield {} if job.finished else {self.tokens: cards.progress(job, texts.CHANNEL_JOB)}
        except QuantscopeError:
            yield {self.tokens: cards.hint(texts.CHANNEL_LATER)}
            raise
        if (session.selection.channel, site_of(session).site, basis_of(session)) == (number, site, basis):
            (session.channel,) = job.results
            yield await asyncio.to_thread(self.glance, session)


def no_ranges(session: Session) -> dict:
    """Draw an empty chart that says that ranges are coming, or what to do."""
    return note(texts.STARTING if session.opening else texts.NO_RANGES)


def median_width(site: object) -> float:
    """Compute the width of the site's median channel."""
    widths = sorted((site.high - site.low).tolist())
    return widths[len(widths) // 2]


def site_of(session: Session) -> object:
    """Return the selected site's ranges; if it does not exist, select the first site."""
    sites, chosen = shown_ranges(session).sites, session.selection
    name = f"layers.{chosen.layer}.{chosen.kind}"
    if name not in sites:
        first = next(iter(sites.values()))
        chosen.layer, chosen.kind, name = first.layer, first.kind, first.site
    return sites[name]


def select_widest(session: Session, site: object) -> None:
    """Select a site (SiteRanges) and its channel of the widest range."""
    chosen = session.selection
    chosen.layer, chosen.kind, chosen.channel = site.layer, site.kind, int((site.high - site.low).argmax())


def last_layer(session: Session) -> int:
    """Return the number of the model's last layer, 0 while there are no ranges."""
    return 0 if session.ranges is None else max(site.layer for site in session.ranges.sites.values())


def layer_slider(session: Session) -> dict[str, object]:
    """Set value, end and visibility of a slider of layers: with a single layer there is nothing to choose."""
    top = last_layer(session)
    return {"value": session.selection.layer, "maximum": max(top, 1), "visible": top > 0}


def shown_site(session: Session) -> object:
    """Return the selected site with the chosen bounds: exact ones, or moving averages."""
    site = site_of(session)
    return site.averaged() if session.selection.averaged else site


def channel_facts(session: Session, channel: int, cluster: object = None) -> str:
    """Write the known facts of a channel, by the bounds that its point shows; its cluster only with exact ranges."""
    site = shown_site(session)
    return cards.channel_facts(site, channel, median_width(site), None if site.is_average else cluster)


def read_channel(session: Session) -> object | None:
    """Return the chosen channel's values and tokens, None until they are read."""
    known, site = session.channel, site_of(session).site
    return known if known is not None and (known.site, known.channel) == (site, session.selection.channel) else None


def cluster_of(session: Session, channel: int) -> object:
    """Find the cluster of a channel of the chosen site."""
    view = engine.recluster(shown_ranges(session), site_of(session).site, session.selection.clusters)
    return next(cluster for _, cluster, members in plots_clusters.groups_of(view) if channel in members)


def peers(session: Session) -> list:
    """List the sites that share the axes: all layers of this kind, or this layer alone."""
    site = site_of(session)
    return [s for s in shown_ranges(session).sites.values() if s.kind == site.kind] if session.selection.same_axes else [site]


def revision(session: Session, name: str) -> str:
    """Return a text that is the same as long as zoom is to be kept: across layers only if they share axes."""
    chosen = session.selection
    layer = "all" if chosen.same_axes else chosen.layer
    return f"{name}/{session.ranges.model}/{session.ranges.tokens}/{chosen.kind}/{layer}/{chosen.linear}/{chosen.basis}"


def scatter(session: Session, view: object = None) -> dict:
    """Draw the scatter of the selected site, with clusters if `view` is given."""
    site, shared = site_of(session), peers(session)
    if session.selection.averaged and view is None:
        site, shared = shown_site(session), [peer.averaged() for peer in shared]
    marked = [o.channel for o in shown_ranges(session).outliers(MARKED) if o.site == site.site] if view is None else []
    return plots.range_scatter(
        site,
        scale=plots.scale_of(shared, linear=session.selection.linear),
        limits=plots.limits_of(shared),
        view=view,
        outliers=marked,
        selected=session.selection.channel,
        revision=revision(session, "scatter"),
    )


def channel_steps(session: Session, site: str, channel: int, basis: str) -> list[Step]:
    """Return the job that reads one channel's values and tokens."""
    ranges = session.ranges
    where = {"model": ranges.model, "calibration": session.calibration, "site": site, "channel": channel, "basis": basis}
    return [Step("channel", {**where, "revision": ranges.revision}, texts.CHANNEL_JOB)]

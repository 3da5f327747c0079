"""The switch of bases on the tabs Explore and Reorder: reordered, scaled, rotated channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from app import engine
from app.context import Context, Updates, ranges_key
from app.session import Session
from app.view import bases, cards
from app.view import texts_bases as words
from app.view.plots_bases import PANELS, Panel
from app.worker.job import Step
from core.checks import require_choice, require_int
from core.errors import QuantscopeError
from core.options import BASES

SEEN = ("scaled", "rotated", "all")
"""Views that need the ranges of other bases."""


class Bases:
    """The switch, the card below the charts, and the job that observes the model in all bases."""

    def __init__(self, ctx: Context, tab: str) -> None:
        self.ctx = ctx
        choices = [(label, name) for name, label in words.VIEWS.items()]
        self.view = gr.Radio(choices, value="original", label=words.SHOWN, elem_id=f"{tab}-basis", elem_classes="qs-pills")
        hidden = {"visible": False, "render": False, "apply_default_css": False}
        self.card = gr.HTML("", elem_id=f"{tab}-bases", elem_classes="qs-card", **hidden)

    @property
    def outputs(self) -> list:
        """Components that another view or site changes."""
        return [self.view, self.card]

    def take(self, session: Session, value: object) -> None:
        """Store the chosen view in the session. Raises: InputError for one that is not offered."""
        view = require_choice("basis", value, tuple(words.VIEWS))
        if view != session.selection.basis:
            session.selection.basis, session.channel = view, None

    def choose(self, session: Session, place: object) -> None:
        """Show the basis of a clicked plot alone, if several are shown. Args: place: of the plot among `PANELS`."""
        if session.selection.basis == "all":
            self.take(session, PANELS[require_int("panel", place, 0, len(PANELS) - 1, "click a plot")])

    def render(self, session: Session, site: str) -> Updates:
        """Set the switch, and say below the charts what the bases do to a site."""
        view = session.selection.basis
        info = words.INFO[view]
        shown = {self.view: gr.update(value=view, label=f"{words.SHOWN}: {info}" if info else words.SHOWN)}
        if view not in SEEN:
            return shown | {self.card: gr.update(value="", visible=False)}
        if session.bases is None:
            return shown | {self.card: gr.update(value=cards.hint(words.WAIT), visible=True)}
        return shown | {self.card: gr.update(value=compared(session, site), visible=True)}

    async def observe(self, session: Session, shown: Callable[[Session], Updates]) -> AsyncIterator[Updates]:
        """Observe the model in all bases by a job, if the chosen view needs it and it was not done, and yield `shown(session)`.

        Raises: the job's error, after which the channels are shown as they are.
        """
        ranges = session.ranges
        if ranges is None or not is_waiting(session):
            return
        where = {"model": ranges.model, "revision": ranges.revision, "calibration": session.calibration}
        known = ranges_key(*where.values())
        key = ("bases", known) if known else None
        try:
            async for job in self.ctx.follow(session, "bases", [Step("bases", where, words.JOB)], key=key):
                yield {} if job.finished else {self.card: gr.update(value=cards.progress(job, words.JOB), visible=True)}
        except QuantscopeError:
            session.selection.basis = "original"
            yield await asyncio.to_thread(shown, session)
            raise
        if session.ranges is ranges:
            (session.bases,) = job.results
            yield await asyncio.to_thread(shown, session)


def shown_ranges(session: Session) -> Any:
    """Return the ranges in the chosen basis; those of the channels as they are where no other basis is chosen, or known yet."""
    return (session.bases or {}).get(session.selection.basis, session.ranges)


def basis_of(session: Session) -> str:
    """Return the basis of the channels that can be chosen, a name of `BASES`."""
    return session.selection.basis if session.selection.basis in BASES else "original"


def is_waiting(session: Session) -> bool:
    """Say whether the chosen view needs ranges that are not observed yet."""
    return session.selection.basis in SEEN and session.bases is None


def views_of(session: Session, site: str) -> dict[str, Any]:
    """Cluster a site in every basis: ClusterView by basis."""
    chosen = session.selection
    return {name: engine.recluster(report, site, chosen.clusters, bits=chosen.bits) for name, report in session.bases.items()}


def panels_of(session: Session, site: str) -> list[Panel]:
    """Return the four plots of a site beside each other."""
    views = views_of(session, site)
    shown = [(name, name if name in BASES else "original") for name in PANELS]
    return [Panel(name, session.bases[basis].sites[site], views[basis]) for name, basis in shown]


def channel_at(session: Session, column: int) -> int:
    """Return the channel of a column of the heat map of the chosen layer, where the chosen view may have reordered them."""
    chosen = session.selection
    site = f"layers.{chosen.layer}.{chosen.kind}"
    if chosen.basis != "reordered" or site not in session.ranges.sites:
        return column
    order = engine.recluster(session.ranges, site, chosen.clusters, bits=chosen.bits).order
    return int(order[min(max(column, 0), len(order) - 1)])


def heatmaps_of(session: Session) -> dict[str, Any]:
    """Return the heat maps of the chosen site, [L, C] each, of the chosen view, or of all by the panels' names."""
    report, chosen = shown_ranges(session), session.selection
    if chosen.basis not in ("reordered", "all"):
        return {chosen.basis: report.heatmap(chosen.kind)}
    names = [site.site for site in report.sites.values() if site.kind == chosen.kind]
    orders = [engine.recluster(report, name, chosen.clusters, bits=chosen.bits).order for name in names]
    reordered = {"reordered": report.heatmap(chosen.kind, orders)}
    if chosen.basis == "reordered":
        return reordered
    known = {name: found.heatmap(chosen.kind) for name, found in session.bases.items()}
    return {name: (known | reordered)[name] for name in PANELS}


def noise_of(session: Session, site: str) -> dict[str, Any]:
    """Predict a site's rounding noise in every basis: GridNoise by basis."""
    views = views_of(session, site)
    return {name: engine.grid_noise(report, views[name]) for name, report in session.bases.items()}


def compared(session: Session, site: str) -> str:
    """Write what scaling and rotating do to a site."""
    chosen = session.selection
    listed = "rotated" if chosen.basis == "all" else chosen.basis
    views = views_of(session, site)
    clusters = 1 + int(views["original"].labels.max())
    return bases.card(session.bases, site, noise_of(session, site), bits=chosen.bits, clusters=clusters, listed=listed)

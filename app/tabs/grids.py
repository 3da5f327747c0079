"""The choice of a grid whose levels are drawn over the values of the chosen channel."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import engine
from app.session import Session
from app.view import plots_ranges
from app.view import texts_guide as texts
from app.view.figure import Figure
from core.checks import require_choice


class GridChoice:
    """The buttons, and the histogram with the chosen grid."""

    def __init__(self) -> None:
        choices = [(label, name) for name, label in texts.GRIDS.items()]
        self.kind = gr.Radio(choices, value="tensor", label=texts.GRID, elem_id="grid", elem_classes="qs-pills")

    def take(self, session: Session, value: object) -> None:
        """Store the chosen grid in the session. Raises: InputError for one that is not offered."""
        session.grid = require_choice("grid", value, tuple(texts.GRIDS))

    def draw(self, session: Session, detail: Any, site: Any, cluster: Any) -> Figure:
        """Draw the histogram of a channel (ChannelDetail) with the chosen grid. `site`, `cluster`: those of the channel."""
        if session.grid == "none":
            return plots_ranges.channel_histogram(detail)
        ranges = {"tensor": (float(site.low.min()), float(site.high.max())), "cluster": (cluster.low, cluster.high)}
        grid = engine.channel_grid(session.grid, detail, ranges)
        said = texts.GRID_INFO[session.grid].format(used=grid.used, count=len(grid.levels))
        return plots_ranges.channel_histogram(detail, grid.levels, said)

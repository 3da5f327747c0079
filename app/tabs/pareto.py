"""The part of the tab Compare that sets bytes against divergence and offers the numbers as files."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from app.context import LIGHT, Context, Updates
from app.session import Session
from app.tabs.measured import row_of
from app.tabs.share import SAVE_JS
from app.view import plots_pareto, tables, texts
from app.view import texts_divergence as own
from app.view.chart import Chart
from core.checks import require_choice
from core.errors import InputError


class Pareto:
    """The chart and the buttons, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Row(elem_classes="qs-controls qs-card", visible=False) as self.row:
            choices = [(label, size) for size, label in own.PARETO_SIZES.items()]
            self.size = gr.Radio(
                choices, value="weight_bytes", label=own.PARETO_SIZE, elem_id="pareto-size", scale=4, min_width=240
            )
            self.csv = gr.Button(own.SAVE_CSV, size="sm", elem_id="numbers-csv", min_width=130)
            self.json = gr.Button(own.SAVE_JSON, size="sm", elem_id="numbers-json", min_width=130)
        self.chart = Chart(None, label=own.PARETO_LABEL, height=340, elem_id="pareto", visible=False)
        self.saved = gr.JSON(None, visible=False)

    @property
    def outputs(self) -> list:
        """Components that another measurement changes."""
        return [self.row, self.size, self.chart]

    def render(self, session: Session) -> Updates:
        """Show all runs that were measured like the newest ones; a single point is not drawn."""
        runs = [row_of(session, run, session.protocol) for run in session.runs if session.protocol in run.measured]
        drawn = [run for run in runs if run.report.kld_mean is not None]
        return {
            self.row: gr.update(visible=bool(runs)),
            self.size: session.size,
            self.chart: gr.update(value=plots_pareto.pareto(drawn, session.size), visible=len(drawn) > 1),
        }

    def wire(self) -> None:
        """Connect the events."""
        guard, key, status = self.ctx.guard, self.ctx.key, [self.ctx.status, self.ctx.stop]
        self.size.input(guard(self.turned), {key, self.size}, [*self.outputs, *status], **LIGHT)
        for button, handler in ((self.csv, self.csv_file), (self.json, self.json_file)):
            written = button.click(guard(handler), {key}, [self.saved, *status], **LIGHT)
            written.then(None, self.saved, None, js=SAVE_JS, api_visibility="private")

    def turned(self, values: Updates) -> Updates:
        """Draw the chart by other bytes."""
        session = self.ctx.session(values)
        session.size = require_choice("size", values[self.size], tuple(own.PARETO_SIZES))
        return self.render(session)

    def csv_file(self, values: Updates) -> Updates:
        """Make a file of all measurements as CSV."""
        return self.file(values, "numbers.csv", "text/csv", tables.numbers_csv)

    def json_file(self, values: Updates) -> Updates:
        """Make a file of all measurements as JSON."""
        return self.file(values, "numbers.json", "application/json", tables.numbers_json)

    def file(self, values: Updates, name: str, kind: str, write: Callable[[list[tables.Measured]], str]) -> Updates:
        """Make a file of every measurement of the session's runs. Raises: InputError if there is none."""
        session = self.ctx.session(values)
        rows = [row_of(session, run, protocol) for run in session.runs for protocol in run.measured]
        if not rows:
            raise InputError(texts.NUMBERS_EMPTY, code="E-PARAM-RUNS")
        return {self.saved: {"name": name, "type": kind, "text": write(rows)}}

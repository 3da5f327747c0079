"""The panel of the tab Compare that shows a text token by token, coloured by divergence."""

from __future__ import annotations

from collections.abc import AsyncIterator

import gradio as gr

from app.context import Context, Updates
from app.session import Run, Session
from app.tabs.moved import Moved, Reading
from app.tabs.quantize import MEASURED_TEXT
from app.view import cards, texts
from app.view import texts_divergence as words
from app.view.chart import Table
from app.view.tokens import table_by_confidence, text_of_tokens
from app.worker.job import Step
from core.checks import require_choice, require_int
from core.errors import InputError

COUNTS = (64, 128, 256)
MAX_COUNT = 512


class Tokens:
    """The panel: its widgets, and the handler that reads a text with two models."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Accordion(words.TOKENS, open=False, elem_id="token-panel"):
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                self.run = gr.Dropdown(
                    [], label=words.TOKENS_RUN, elem_id="token-run", filterable=False, scale=4, min_width=200, interactive=True
                )
                self.text = gr.Dropdown(
                    [(label, name) for name, label in texts.TEXT_NAMES.items()],
                    value=MEASURED_TEXT,
                    label=texts.EVAL_TEXT,
                    elem_id="token-text",
                    filterable=False,
                    min_width=180,
                )
                self.count = gr.Dropdown(
                    list(COUNTS), value=128, label=words.TOKENS_COUNT, elem_id="token-count", filterable=False, min_width=90
                )
                with gr.Column(scale=1, min_width=170, elem_classes="qs-tight"):
                    self.read = gr.Button(words.TOKENS_READ, elem_id="read-tokens")
            self.shown = Table(cards.hint(words.TOKENS_READY), label=words.TOKENS, elem_id="reading")
            self.moved = Moved(ctx)
            self.groups = gr.HTML("", apply_default_css=False)

    @property
    def outputs(self) -> list:
        """Components that another list of runs changes."""
        return [self.run]

    def render(self, session: Session) -> Updates:
        """List the quantised runs, the newest chosen."""
        runs = [run for run in reversed(session.runs) if run.recipe is not None]
        return {self.run: gr.update(choices=[(session.title(r), r.key) for r in runs], value=runs[0].key if runs else None)}

    def wire(self) -> None:
        """Connect the button and the tokens."""
        outputs = [self.shown, self.groups, self.ctx.status, self.ctx.stop]
        self.ctx.on(self.read.click, self.clicked, {self.ctx.key, self.run, self.text, self.count}, outputs)
        self.moved.wire(self.shown.select)

    async def clicked(self, values: Updates) -> AsyncIterator[Updates]:
        """Read the text with the chosen run and with its unquantised model."""
        session = self.ctx.session(values)
        run = chosen_run(session, values[self.run])
        count = require_int("tokens", values[self.count], 8, MAX_COUNT, f"use 8 to {MAX_COUNT}")
        text = require_choice("evaluation text", values[self.text], tuple(texts.TEXT_NAMES))
        step = Step(
            "tokens",
            {
                "key": run.key,
                "reference": run.recipe.model,
                "reference_revision": run.recipe.revision,
                "text": text,
                "tokens": count,
            },
            f"Reading with {session.title(run)}",
        )
        async for job in self.ctx.follow(session, "tokens", [step]):
            if job.finished:
                session.reading, report = Reading(run.key, run.recipe, text, count), job.results[0]
                shown = {self.shown: text_of_tokens(report), self.groups: table_by_confidence(report.groups)}
                yield {**shown, **self.moved.render(session), **self.ctx.rest(session)}
            else:
                yield self.ctx.busy(job, "Reading")


def chosen_run(session: Session, key: object) -> Run:
    """Return the quantised run of a key. Raises: InputError if this session has none such."""
    run = session.run(key)
    if run is None or run.recipe is None:
        raise InputError(words.TOKENS_NONE, code="E-PARAM-RUNS")
    return run

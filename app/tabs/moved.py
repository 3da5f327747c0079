"""The part of the token panel that shows, for a chosen token, which sites and channels moved most."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.context import LIGHT, Context, Updates
from app.session import Session
from app.tabs.share import SAVE_JS
from app.view import moved
from app.view import texts_divergence as words
from app.view.chart import Chart, picked_row
from app.worker.job import Step
from core.errors import InputError
from core.recipe import QuantRecipe


@dataclass
class Reading:
    """The text that the token panel shows, as a run and its original read it; `moved`: MovedReport of the token chosen last."""

    key: str
    recipe: QuantRecipe
    text: str
    tokens: int
    moved: Any = None


class Moved:
    """The widgets, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.said = gr.HTML("", elem_id="moved", apply_default_css=False)
        self.chart = Chart(None, label=words.MOVED_LABEL, height=380, elem_id="moved-chart", visible=False)
        self.json = gr.Button(words.MOVED_JSON, size="sm", elem_id="moved-json", visible=False)
        self.saved = gr.JSON(None, visible=False)

    def wire(self, chosen: Callable) -> None:
        """Connect the events. `chosen`: the event of a chosen token."""
        key, status = self.ctx.key, [self.ctx.status, self.ctx.stop]
        self.ctx.on(chosen, self.clicked, {key}, [self.said, self.chart, self.json, *status])
        written = self.json.click(self.ctx.guard(self.file), {key}, [self.saved, *status], **LIGHT)
        written.then(None, self.saved, None, js=SAVE_JS, api_visibility="private")

    def render(self, session: Session) -> Updates:
        """Show what moved at the token chosen last; nothing where none was chosen."""
        report = session.reading.moved
        figure = None if report is None else moved.bars(report.sites)
        return {
            self.said: "" if report is None else moved.account(report),
            self.chart: gr.update(value=figure, visible=report is not None),
            self.json: gr.update(visible=report is not None),
        }

    async def clicked(self, values: Updates, event: gr.EventData) -> AsyncIterator[Updates]:
        """Look inside both models where the clicked token was predicted; a newer click, or another text, ends this one."""
        session, place = self.ctx.session(values), picked_row(event)
        reading = session.reading
        if reading is None:
            raise InputError(words.TOKENS_READY, code="E-PARAM-RUNS")
        asked = {"key": reading.key, "recipe": reading.recipe, "text": reading.text, "tokens": reading.tokens, "place": place}
        async for job in self.ctx.follow(session, "moved", [Step("moved", asked, words.MOVED_JOB)]):
            if session.reading is not reading:
                return
            if job.finished:
                reading.moved = job.results[0]
                yield {**self.render(session), **self.ctx.rest(session)}
            else:
                yield self.ctx.busy(job, words.MOVED_JOB)

    def file(self, values: Updates) -> Updates:
        """Make a file of all sites at the token chosen last. Raises: InputError if none was chosen."""
        reading = self.ctx.session(values).reading
        if reading is None or reading.moved is None:
            raise InputError(words.MOVED_NONE, code="E-PARAM-RUNS")
        text = json.dumps(reading.moved.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        return {self.saved: {"name": f"token-{reading.moved.place}.json", "type": "application/json", "text": text}}

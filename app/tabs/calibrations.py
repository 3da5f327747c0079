"""The section of the tab Quantise that compares the recipe's calibration text with another one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from app.context import LIGHT, Context, Updates
from app.session import Session
from app.tabs.sidebar import DEFAULT_TOKENS, MAX_TEXT, PASTE, TOKEN_RANGE, calibration_of, text_choices
from app.view import calibrations as view
from app.view import cards, texts
from app.view import texts_groups as words
from app.view.chart import Chart, Table, picked_row, sent
from app.view.names import short_name
from app.worker.job import Step
from core.checks import require_choice
from core.errors import InputError
from core.probe.report import PROBE_TEXT, ProbeText
from core.recipe import QuantRecipe


@dataclass
class Compared:
    """A comparison of two calibrations of a recipe (CalibrationPair), and the site whose channels are shown."""

    recipe: QuantRecipe
    pair: Any
    site: str


class Calibrations:
    """The section: its widgets, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        named = [(label, name) for name, label in texts.TEXT_NAMES.items()]
        with gr.Accordion(words.PAIR, open=False, elem_id="calibrations"):
            gr.Markdown(words.PAIR_INFO, elem_classes="qs-caption")
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                shown = {"filterable": False, "min_width": 180}
                self.text = gr.Dropdown(text_choices(), value=named[-1][1], label=words.PAIR_TEXT, elem_id="pair-text", **shown)
                self.tokens = gr.Slider(
                    *TOKEN_RANGE, DEFAULT_TOKENS, step=512, label=words.PAIR_TOKENS, elem_id="pair-tokens", buttons=[]
                )
                self.judge = gr.Dropdown(named, value=PROBE_TEXT.text, label=words.PAIR_JUDGE, elem_id="pair-judge", **shown)
                with gr.Column(scale=1, min_width=160, elem_classes="qs-tight"):
                    self.start = gr.Button(words.PAIR_START, elem_id="pair-start")
            self.pasted = gr.Textbox(
                "",
                label=texts.PASTE_LABEL,
                info=texts.PASTE_INFO,
                lines=4,
                max_lines=8,
                visible=False,
                max_length=MAX_TEXT,
                elem_id="pair-pasted",
            )
            self.card = gr.HTML("", elem_id="pair", apply_default_css=False)
            with gr.Row(equal_height=False, elem_classes="qs-charts"):
                with gr.Column(scale=5, min_width=300):
                    self.map = Chart(None, label=words.PAIR_MAP_LABEL, height=280, elem_id="pair-map", visible=False)
                with gr.Column(scale=4, min_width=300):
                    self.scatter = Chart(None, label=words.PAIR_SCATTER_LABEL, height=280, elem_id="pair-widths", visible=False)
            self.table = Table(label=words.PAIR_TABLE, elem_id="pair-table")

    @property
    def outputs(self) -> list:
        """Components that a comparison changes."""
        return [self.card, self.map, self.scatter, self.table]

    def wire(self, recipe: Callable[[Updates], QuantRecipe], inputs: set) -> None:
        """Connect the section. `recipe` returns the recipe of the fields' values; `inputs` are these fields."""
        self.recipe_of = recipe
        status = [self.ctx.status, self.ctx.stop]
        self.text.input(lambda choice: gr.update(visible=choice == PASTE), self.text, self.pasted, **LIGHT)
        own = {self.ctx.key, self.text, self.pasted, self.tokens, self.judge, *inputs}
        self.ctx.on(self.start.click, self.compare_texts, own, [*self.outputs, *status])
        for part in (self.map, self.table):
            part.select(self.ctx.guard(self.picked), {self.ctx.key}, [self.scatter, *status], **LIGHT)

    async def compare_texts(self, values: Updates) -> AsyncIterator[Updates]:
        """Compare the calibration of the recipe of the fields with that of the section's fields."""
        session, recipe = self.ctx.session(values), self.recipe_of(values)
        other = replace(
            calibration_of(values[self.text], values[self.pasted], values[self.tokens]), window=recipe.calibration.window
        )
        judge = ProbeText(require_choice("text", values[self.judge], tuple(texts.TEXT_NAMES)), PROBE_TEXT.tokens)
        step = Step("calibrations", {"recipe": recipe, "other": other, "text": judge}, words.PAIR, 5.0)
        async for job in self.ctx.follow(session, "calibrations", [step]):
            yield self.ctx.busy(job, words.PAIR)
        pair = job.results[0]
        session.compared = Compared(recipe, pair, view.ranked(pair)[0])
        yield {**self.render(session), **self.ctx.rest(session)}

    def render(self, session: Session) -> Updates:
        """Show the session's comparison."""
        found = session.compared
        drawn = view.shift_map(found.pair, revision=found.recipe.model)
        return {
            self.card: view.card(found.pair, short_name(found.recipe, found.recipe.label())),
            self.map: gr.update(value=drawn, visible=True),
            self.table: cards.table(words.PAIR_HEADERS, view.rows(found.pair), pick=True, caption=words.PAIR_TABLE),
            **self._channels(found),
        }

    def _channels(self, found: Compared) -> Updates:
        return {self.scatter: gr.update(value=view.width_scatter(found.pair, found.site), visible=True)}

    def picked(self, values: Updates, event: gr.EventData) -> Updates:
        """Show the channels of a site that was clicked in the map or the table."""
        found = self.ctx.session(values).compared
        if found is None:
            raise InputError(words.PAIR_NONE, code="E-PARAM-SITE")
        custom, row, names = sent(event, "custom"), picked_row(event), view.ranked(found.pair)
        name = names[row] if 0 <= row < len(names) else str(custom[0]) if isinstance(custom, list) and custom else ""
        if name not in found.pair.sites:
            raise InputError(words.PAIR_SITE, code="E-PARAM-SITE")
        found.site = name
        return self._channels(found)

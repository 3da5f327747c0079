"""The field of the tab Quantise for bits and clusters of single layers, in the syntax of recipes."""

from __future__ import annotations

import gradio as gr

from app.context import Context, Updates
from app.view import cards
from app.view import texts_layers as texts
from core.errors import InputError
from core.recipe import Overrides

MAX_LENGTH = 20_000


class LayerField:
    """A folded text field and a line under it: what the text means, or what is wrong with it."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Accordion(texts.PANEL, open=False, elem_id="layers-panel"):
            self.text = gr.Textbox(
                "", label=texts.LABEL, info=texts.INFO, placeholder=texts.EXAMPLE, lines=2, max_lines=8, elem_id="layers-own"
            )
            self.note = gr.HTML("", elem_id="layers-note", apply_default_css=False)

    def read(self, values: Updates) -> Overrides:
        """Return what the field says. Raises: InputError naming the part that does not fit."""
        text = values[self.text]
        if not isinstance(text, str) or len(text) > MAX_LENGTH:
            rule = f"The field of single layers takes a text of up to {MAX_LENGTH:,} letters: write less."
            raise InputError(rule, code="E-PARAM-OVERRIDES")
        return Overrides.parse(text)

    def fill(self, overrides: Overrides) -> Updates:
        """Set the field to the overrides of a recipe."""
        return {self.text: overrides.to_text(", "), self.note: ""}

    def checked(self, values: Updates) -> Updates:
        """Say under the field how many layers it concerns, or which part does not fit."""
        info = self.ctx.session(values).info
        try:
            overrides = self.read(values)
            if info is not None:
                overrides.require_layers(info.layers)
        except InputError as error:
            return {self.note: cards.caution(str(error))}
        count, layers = len(overrides.entries), len(overrides.layers)
        return {self.note: cards.caution(texts.MEANS.format(count=count, layers=layers)) if count else ""}

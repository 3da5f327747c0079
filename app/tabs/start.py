"""What the page is and why it matters, and the models that are one click away from the small embedded one."""

from __future__ import annotations

import gradio as gr

from app import engine
from app.context import Updates
from app.session import Session
from app.view import cards, texts
from app.view import texts_guide as words
from app.view.figure import bytes_text


class Start:
    """The sentences above the tabs, and two buttons under them that are there while an embedded model is shown."""

    def __init__(self) -> None:
        self.intro = gr.HTML(cards.intro(None, ""), elem_id="intro", apply_default_css=False)
        with gr.Row(elem_id="one-click", visible=False) as self.row:
            self.larger = gr.Button("", size="sm", elem_id="open-larger", scale=0, min_width=200)
            self.ternary = gr.Button(
                texts.OPEN_TERNARY.format(engine.ternary_model()), size="sm", elem_id="open-a4.8", scale=0, min_width=200
            )

    @property
    def outputs(self) -> list:
        """Components that another model changes."""
        return [self.intro, self.row, self.larger, self.ternary]

    def render(self, session: Session) -> Updates:
        """Show the sentences and buttons that fit the session's model."""
        info, larger = session.info, engine.larger_model(session.info.name)
        label = words.OPEN_LARGER.format(name=larger, size=bytes_text(engine.download_bytes(larger))) if larger else ""
        return {
            self.intro: cards.intro(info, larger),
            self.row: gr.update(visible=bool(larger)),
            self.larger: label,
            self.ternary: gr.update(visible=bool(engine.ternary_model()) and not info.fidelity),
        }

"""The guide of a first visit: five steps, each with the control to use and what to see."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

from app.tabs.link import TABS
from app.view import texts_guide as texts

_JS = (Path(texts.__file__).parent / "guide.js").read_text(encoding="utf-8")
PLACES = {
    "scatter": ("explore", "#scatter .qs-chart", "#facts"),
    "clusters": ("reorder", "#g", "#headline"),
    "quantize": ("quantize", "#quantize", "#summary"),
    "write": ("compare", "#write", "#streams"),
    "real": ("", "#open-larger, #model, #side .toggle-button", "#status"),
}
"""Of every step: its tab, the control (the first of the selectors that is visible), and what changes when it was used."""


class Guide(gr.HTML):
    """The guide, which runs in the browser alone: `guide.js` shows one step at a time."""

    def __init__(self) -> None:
        super().__init__(guide_html(), elem_id="guide", js_on_load=_JS, apply_default_css=False)


def guide_html() -> str:
    """Write the guide with all its steps; the script hides what is not to be seen yet."""
    steps = "".join(_step(place, name) for place, name in enumerate(texts.GUIDE_STEPS))
    offer = _button("start", texts.GUIDE_START) + _button("end", texts.GUIDE_LATER)
    moves = {"back": texts.GUIDE_BACK, "control": texts.GUIDE_GO, "next": texts.GUIDE_NEXT, "end": texts.GUIDE_END}
    return (
        f'<section class="qs-guide" aria-label="{escape(texts.GUIDE)}">'
        f'<p data-when="offer">{escape(texts.GUIDE_OFFER)} {offer}</p>'
        f'<div data-when="step" hidden><ol>{steps}</ol><p>{"".join(_button(*move) for move in moves.items())}</p></div>'
        f'<p data-when="ended" hidden>{_button("start", texts.GUIDE_AGAIN)}</p>'
        '<div class="qs-said" aria-live="polite"></div></section>'
    )


def _step(place: int, name: str) -> str:
    title, do, see = texts.GUIDE_STEPS[name]
    tab, control, seen = PLACES[name]
    head = texts.GUIDE_STEP.format(number=place + 1, count=len(texts.GUIDE_STEPS), title=title)
    where = f'data-tab="{TABS.index(tab) if tab else ""}" data-control="{escape(control)}" data-seen="{escape(seen)}"'
    return (
        f'<li hidden {where}><h2 tabindex="-1">{escape(head)}</h2>'
        f'<p id="guide-do-{place}"><b>{escape(texts.GUIDE_DO)}</b> {escape(do)}</p>'
        f'<p class="qs-see"><b>{escape(texts.GUIDE_SEE)}</b> {escape(see)}</p></li>'
    )


def _button(go: str, words: str) -> str:
    return f'<button type="button" data-go="{go}">{escape(words)}</button>'

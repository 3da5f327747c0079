"""The choice of the page's language, which is followed from the browser at first and remembered in it."""

from __future__ import annotations

import gradio as gr

from app.view import language
from app.view import texts_guide as texts

NAMES = {"en": ("en", "English"), "zh": ("zh-CN", "中文")}
"""Code of each language for the browser, and its own name for itself."""


class Language(gr.HTML):
    """Two buttons; the script of `app.view.language` translates the page in the browser alone."""

    def __init__(self) -> None:
        buttons = "".join(
            f'<button type="button" data-language="{name}" lang="{code}" aria-pressed="false" translate="no">{own}</button>'
            for name, (code, own) in NAMES.items()
        )
        html = f'<div class="qs-language" role="group" aria-label="{texts.LANGUAGE}">{buttons}</div>'
        super().__init__(html, elem_id="language", js_on_load=language.script(), apply_default_css=False)

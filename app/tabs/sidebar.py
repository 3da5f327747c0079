"""The side of the page: model and text, recipe, the two buttons that start work, links and files."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import engine
from app.context import Context
from app.tabs.language import Language
from app.tabs.reorder import MAX_CLUSTERS, slider_of
from app.tabs.share import Share
from app.view import cards, texts
from core.errors import InputError, TextError
from core.privacy import PASTED
from core.recipe import SCHEMES, VARIANTS, BitNetOptions, Calibration, QuantRecipe, require_choice, require_int

PASTE = "paste"
MAX_TEXT = 2_000_000
MAX_TOKENS = 65_536
DEFAULT_TOKENS = 2048
TOKEN_RANGE = (512, 16_384)
"""Ends of the sliders of calibration tokens, at the side and on the tab Quantise."""


class Sidebar:
    """The side: its widgets, and the part of the recipe that is chosen there."""

    def __init__(self, ctx: Context) -> None:
        model, on_space = ctx.settings.model, ctx.settings.on_space
        names = list(dict.fromkeys([model, *engine.model_names()]))
        with gr.Sidebar(width=300, elem_id="side"):
            gr.HTML(f'<div class="qs-brand"><b>{texts.TITLE}</b><span>{texts.TAGLINE}</span></div>')
            Language()
            self.model = gr.Dropdown(
                names,
                value=model,
                label=texts.MODEL,
                allow_custom_value=True,
                elem_id="model",
                info=texts.MODEL_INFO_SPACE if on_space else texts.MODEL_INFO,
            )
            self.text = gr.Dropdown(text_choices(), value="sotu", label=texts.TEXT, elem_id="text", filterable=False)
            self.pasted = gr.Textbox(
                "",
                label=texts.PASTE_LABEL,
                info=texts.PASTE_INFO,
                lines=4,
                max_lines=8,
                visible=False,
                max_length=MAX_TEXT,
                elem_id="pasted",
            )
            self.tokens = gr.Slider(
                *TOKEN_RANGE, DEFAULT_TOKENS, step=512, label=texts.TOKENS, elem_id="observe-tokens", buttons=[]
            )
            self.observe = gr.Button(texts.OBSERVE, elem_id="observe", size="md")
            gr.HTML('<hr class="qs-rule">')
            self.method = gr.Dropdown(
                [(label, name) for name, label in texts.METHODS.items()],
                value="rptq",
                label=texts.METHOD,
                elem_id="method",
                filterable=False,
            )
            with gr.Column(elem_id="grid-recipe") as self.grid:
                self.scheme = gr.Dropdown(
                    scheme_choices(), value="W4A4", label=texts.SCHEME, info=texts.SCHEME_INFO, elem_id="scheme", filterable=False
                )
                self.clusters = gr.Slider(1, MAX_CLUSTERS, 32, step=1, label=texts.CLUSTERS, elem_id="side-g", buttons=[])
            with gr.Column(elem_id="ternary-recipe", visible=False) as self.ternary:
                self.mode = gr.Dropdown(
                    [(label, name) for name, label in texts.BITNET_MODES.items()],
                    value="a4.8",
                    label=texts.BITNET_MODE,
                    info=texts.BITNET_MODE_INFO,
                    elem_id="mode",
                    filterable=False,
                )
            self.quantize = gr.Button(texts.QUANTIZE, variant="primary", elem_id="side-quantize", size="lg")
            self.share = Share(ctx)
            gr.HTML(cards.links(texts.LINKS), apply_default_css=False)

    @property
    def source(self) -> set:
        """Inputs that decide model and text."""
        return {self.model, self.text, self.pasted, self.tokens}

    @property
    def recipe(self) -> set:
        """Inputs that decide how to quantise."""
        return {self.method, self.scheme, self.mode}

    def chosen_model(self, values: dict) -> tuple[str, str | None]:
        """Return (name, revision) of the model field. Raises: InputError if it is empty or far too long."""
        return parse_model(values[self.model])

    def calibration(self, values: dict) -> Calibration:
        """Return the text and tokens that ranges are observed on."""
        return calibration_of(values[self.text], values[self.pasted], values[self.tokens])

    def fill(self, recipe: QuantRecipe) -> dict[Any, Any]:
        """Set the widgets to a recipe."""
        revision = f"@{recipe.revision}" if recipe.revision else ""
        text = recipe.calibration.text
        pasted = text.removeprefix(PASTED) if text.startswith(PASTED) else ""
        return {
            self.model: recipe.model + revision,
            self.method: recipe.method,
            self.scheme: recipe.scheme,
            self.text: text if text in texts.TEXT_NAMES else PASTE,
            self.pasted: gr.update(value=pasted, visible=text not in texts.TEXT_NAMES),
            self.tokens: recipe.calibration.tokens,
            self.mode: (recipe.bitnet or BitNetOptions()).mode,
            **self.show(recipe.method),
            self.clusters: gr.update(**slider_of(recipe.clusters), visible=recipe.method == "rptq"),
        }

    def show(self, method: object) -> dict[Any, Any]:
        """Show only the controls that a method uses."""
        shown = {self.grid: method != "bitnet", self.ternary: method == "bitnet", self.clusters: method == "rptq"}
        return {part: gr.update(visible=visible) for part, visible in shown.items()}


def parse_model(name: object) -> tuple[str, str | None]:
    """Return (name, revision) of "name@revision". Raises: InputError if it is empty or far too long."""
    if not isinstance(name, str) or not name.strip():
        raise InputError("No model was named: choose one of the list, or type a Hub id such as owner/name.", code="E-PARAM-MODEL")
    if len(name) > 300:
        raise InputError(
            f"The model name has {len(name):,} characters: give a Hub id (owner/name) or a name of the list.",
            code="E-PARAM-MODEL",
        )
    name, _, revision = name.strip().partition("@")
    return name, revision or None


def require_pasted(text: str) -> str:
    """Check a visitor's own text. Raises: TextError if it is empty or far too long."""
    if not text.strip():
        raise TextError("No text was pasted: paste at least 512 tokens, or choose a named text.", code="E-TEXT-SHORT")
    if len(text) > MAX_TEXT:
        raise TextError(
            f"The text has {len(text):,} characters; the limit is {MAX_TEXT:,}. Paste a part of it.", code="E-TEXT-SIZE"
        )
    return text


def calibration_of(choice: object, pasted: object, tokens: object) -> Calibration:
    """Return the calibration that three fields describe: a choice of text, a pasted text, and tokens.

    Raises: TextError if nothing was pasted or far too much; InputError for another choice or number.
    """
    count = require_int("calibration tokens", tokens, 512, MAX_TOKENS, f"use 512 to {MAX_TOKENS}")
    if choice != PASTE:
        return Calibration(require_choice("calibration text", choice, tuple(texts.TEXT_NAMES)), count)
    return Calibration(PASTED + require_pasted(pasted or ""), count)


def text_choices() -> list[tuple[str, str]]:
    """List the named texts, and the choice to paste one, for a drop-down."""
    return [*((label, name) for name, label in texts.TEXT_NAMES.items()), (texts.TEXT_PASTE, PASTE)]


def scheme_choices() -> list[tuple[str, str]]:
    """List the schemes by name; a line under the field says which tensors have more bits than the name."""
    return [*((name, name) for name in SCHEMES), (texts.SCHEME_CUSTOM, "custom")]


def variant_choices(method: object) -> list[tuple[str, str]]:
    """List the variants of a method for the drop-down."""
    names = texts.VARIANTS | {"default": texts.RTN_PLAIN} if method == "rtn" else texts.VARIANTS
    return [(label, name) for name, label in names.items() if method in VARIANTS[name]]

"""The panel Share: a link to the page's state, and recipe, ranges and report as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import gradio as gr

from app.context import LIGHT, Context, Updates
from app.session import Session
from app.tabs.explore import last_layer
from app.view import cards, tables, texts
from core.errors import InputError
from core.privacy import PASTED
from core.recipe import SITES, QuantRecipe, require_choice, require_int

MAX_RECIPE_BYTES = 2**20
TABS = ("explore", "reorder", "quantize", "compare", "bitnet")
SAVE_JS = """(file) => {
  if (!file) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([file.text], { type: file.type }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
LINK_JS = """async (query, note) => {
  const url = `${location.origin}${location.pathname}?${query}`;
  let said = 'COPIED';
  try { await navigator.clipboard.writeText(url); } catch (error) { said = 'NOT_HERE'; }
  return [url, `<p class="qs-protocol" role="status"><b>${said}</b> ${note}</p>`];
}""".replace("COPIED", texts.LINK_COPIED).replace("NOT_HERE", texts.LINK_NOT_COPIED)


class Share:
    """The panel at the side: its widgets, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Accordion(texts.SAVE, open=False):
            self.link = gr.Button(texts.LINK, size="sm", elem_id="copy-link")
            self.link_text = gr.Textbox(
                "", label=texts.LINK_LABEL, visible=False, buttons=["copy"], interactive=False, elem_id="link", max_lines=3
            )
            self.link_note = gr.HTML("", visible=False, elem_id="link-note", apply_default_css=False)
            self.save_recipe = gr.Button(texts.SAVE_RECIPE, size="sm", elem_id="save-recipe")
            self.open_recipe = gr.UploadButton(
                texts.OPEN_RECIPE, file_types=[".json"], size="sm", elem_id="open-recipe", type="filepath"
            )
            self.save_ranges = gr.Button(texts.SAVE_RANGES, size="sm", elem_id="save-ranges")
            self.save_report = gr.Button(texts.SAVE_REPORT, size="sm", elem_id="save-report")
            self.saved = gr.JSON(None, visible=False)

    def wire(self, inputs: set, recipe: Callable[[Updates], QuantRecipe], fill: Callable[[QuantRecipe], Updates]) -> None:
        """Connect the events.

        Args:
            inputs: the fields of the recipe. recipe: function from their values to a recipe. fill: updates that set them to one.
        """
        self.recipe, self.fill = recipe, fill
        guard, key, status = self.ctx.guard, self.ctx.key, [self.ctx.status, self.ctx.stop]
        files = {self.save_recipe: self.recipe_file, self.save_ranges: self.ranges_file, self.save_report: self.report_file}
        for button, handler in files.items():
            written = button.click(guard(handler), {key, *inputs}, [self.saved, *status], **LIGHT)
            written.then(None, self.saved, None, js=SAVE_JS, api_visibility="private")
        linked = [self.link_text, self.link_note]
        self.link.click(guard(self.linked), {key, *inputs}, [*linked, *status], **LIGHT).success(
            None, linked, linked, js=LINK_JS, api_visibility="private"
        )
        self.open_recipe.upload(guard(self.opened), {key, self.open_recipe}, [*inputs_of(fill), *status], **LIGHT)

    def recipe_file(self, values: Updates) -> Updates:
        """Make a file of the recipe as JSON."""
        recipe = self.recipe(values)
        saved = {"name": f"recipe-{recipe.hash}.json", "type": "application/json", "text": recipe.to_json()}
        return {self.saved: saved}

    def ranges_file(self, values: Updates) -> Updates:
        """Make a file of every channel's range as CSV."""
        report = self.ctx.session(values).ranges
        if report is None:
            raise InputError(texts.NO_RANGES, code="E-PARAM-RANGES")
        return {
            self.saved: {
                "name": f"ranges-{report.tokens}-tokens.csv",
                "type": "text/csv",
                "text": tables.ranges_csv(report),
            }
        }

    def report_file(self, values: Updates) -> Updates:
        """Make a file of all runs of the session as JSON."""
        text = tables.report_json(self.ctx.session(values).runs)
        return {self.saved: {"name": "report.json", "type": "application/json", "text": text}}

    def linked(self, values: Updates) -> Updates:
        """Write the link to this recipe, tab, layer, site and channel, and say what it leaves out."""
        session, recipe = self.ctx.session(values), self.recipe(values)
        query = f"{recipe.to_query()}&{urlencode(place_of(session))}"
        note = texts.LINK_PASTED if recipe.calibration.text.startswith(PASTED) else ""
        return {self.link_text: gr.update(value=query, visible=True), self.link_note: gr.update(value=note, visible=True)}

    def opened(self, values: Updates) -> Updates:
        """Set the fields to the recipe of a file."""
        place = values[self.open_recipe]
        if not isinstance(place, str) or not place:
            raise InputError("No file came: choose a recipe as JSON.", code="E-PARAM-RECIPE")
        path = Path(place)
        try:
            if path.stat().st_size > MAX_RECIPE_BYTES:
                raise InputError("The file is larger than 1 MB: is it a recipe?", code="E-PARAM-RECIPE")
            recipe = QuantRecipe.from_json(path.read_text(encoding="utf-8-sig", errors="replace"))
        finally:
            path.unlink(missing_ok=True)
        said = texts.RECIPE_PASTED if is_unknown_text(recipe.calibration.text) else texts.RECIPE_OPENED
        return {**self.fill(recipe), self.ctx.status: cards.note(texts.RECIPE_TITLE, said)}


def place_of(session: Session) -> dict[str, object]:
    """Return the visitor's place in the model as keys of a link."""
    chosen = session.selection
    place: dict[str, object] = {"tab": session.tab}
    if session.ranges is not None:
        place |= {"layer": chosen.layer, "site": chosen.kind}
        if chosen.channel is not None:
            place["channel"] = chosen.channel
    return place


def go_to(session: Session, query: dict[str, str]) -> None:
    """Select the place of a link. Raises: InputError for a tab, layer, site or channel that does not exist."""
    chosen = session.selection
    if "tab" in query:
        session.tab = require_choice("tab", query["tab"], TABS)
    if session.ranges is None or not {"layer", "site", "channel"} & set(query):
        return
    kind = require_choice("site", query.get("site", chosen.kind), SITES)
    top = last_layer(session)
    layer = require_int("layer", _whole(query.get("layer", chosen.layer)), 0, top, f"use 0 to {top}")
    width = len(session.ranges.sites[f"layers.{layer}.{kind}"].low)
    channel = None
    if "channel" in query:
        channel = require_int("channel", _whole(query["channel"]), 0, width - 1, f"this site has channels 0 to {width - 1}")
    chosen.layer, chosen.kind, chosen.channel = layer, kind, channel


def _whole(text: object) -> object:
    """Convert a text of digits to its number; return anything else unchanged."""
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10 else text


def is_unknown_text(text: str) -> bool:
    """Say whether a recipe's calibration text is unknown to this page: pasted elsewhere, or a file."""
    return text not in texts.TEXT_NAMES and not text.startswith(PASTED)


def inputs_of(fill: Callable[[QuantRecipe], Updates]) -> list:
    """List the components that `fill` sets."""
    return list(fill(QuantRecipe("model")))

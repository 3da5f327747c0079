"""The panel Share: a link to the page's state, and recipe, ranges and reports as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from app.context import LIGHT, Context, Updates
from app.report import report_html
from app.tabs.link import Fields, query_of
from app.view import cards, tables, texts
from app.view import texts_report as words
from core.errors import InputError
from core.privacy import PASTED
from core.recipe import QuantRecipe

MAX_RECIPE_BYTES = 2**20
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

PROGRAMS_JS = "() => document.querySelector('footer button.show-api')?.click()"
"""Script that opens Gradio's description of the endpoints, as the button of Gradio's own footer does, which the style hides."""


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
            self.save_html = gr.Button(words.SAVE, size="sm", elem_id="save-html")
            self.own_text = gr.Checkbox(False, label=words.OWN_TEXT, container=False, elem_id="own-text")
            self.programs = gr.Button(texts.PROGRAMS, size="sm", elem_id="programs")
            self.saved = gr.JSON(None, visible=False)

    def wire(
        self,
        inputs: set,
        recipe: Callable[[Updates], QuantRecipe],
        fill: Callable[[QuantRecipe], Updates],
        fields: Fields,
        runs: Any,
    ) -> None:
        """Connect the events.

        Args:
            inputs: the fields of the recipe. recipe: function from their values to a recipe. fill: updates that set them to one.
            fields: settings of the other tabs that a link names. runs: the component that holds the compared runs.
        """
        self.recipe, self.fill, self.fields, self.runs = recipe, fill, fields, runs
        guard, key, status = self.ctx.guard, self.ctx.key, [self.ctx.status, self.ctx.stop]
        files = {self.save_recipe: self.recipe_file, self.save_ranges: self.ranges_file, self.save_report: self.report_file}
        files[self.save_html] = self.html_file
        for button, handler in files.items():
            written = button.click(guard(handler), {key, self.own_text, *inputs}, [self.saved, *status], **LIGHT)
            written.then(None, self.saved, None, js=SAVE_JS, api_visibility="private")
        self.programs.click(None, None, None, js=PROGRAMS_JS, show_progress="hidden", api_visibility="private")
        linked = [self.link_text, self.link_note]
        view = {key, runs, *inputs, *fields.values()}
        self.link.click(guard(self.linked), view, [*linked, *status], **LIGHT).success(
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

    def html_file(self, values: Updates) -> Updates:
        """Make one HTML file of all runs of the session."""
        session = self.ctx.session(values)
        if not session.runs:
            raise InputError(words.EMPTY, code="E-PARAM-RUNS")
        text = report_html(session, own_text=bool(values[self.own_text]))
        return {self.saved: {"name": "report.html", "type": "text/html", "text": text}}

    def linked(self, values: Updates) -> Updates:
        """Write the link to this view, and say what it leaves out."""
        recipe = self.recipe(values)
        query = query_of(self.ctx.session(values), recipe, self.fields, values, values[self.runs])
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


def is_unknown_text(text: str) -> bool:
    """Say whether a recipe's calibration text is unknown to this page: pasted elsewhere, or a file."""
    return text not in texts.TEXT_NAMES and not text.startswith(PASTED)


def inputs_of(fill: Callable[[QuantRecipe], Updates]) -> list:
    """List the components that `fill` sets."""
    return list(fill(QuantRecipe("model")))

"""The page's own components: a chart drawn by plotly's script, a table to choose from and to sort.

Gradio's own plot component is mounted anew at every update, which loses zoom, and reports no clicks. This one keeps its element:
zoom survives updates that keep `uirevision`, a click on a point arrives as a `select` event whose data hold x, y and the
point's customdata, and the chart's theme, light or dark, is the page's.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import component_meta

from app.view.figure import THEMES, Figure

component_meta.create_or_modify_pyi = lambda *_: None  # Gradio would write an interface file beside this one

SCRIPT = Path(find_spec("plotly").submodule_search_locations[0]) / "package_data" / "plotly.min.js"
ADDRESS = f"/gradio_api/file={SCRIPT}"
PRELOAD = f'<link rel="preload" as="script" href="{ADDRESS}">'
"""For the page's head: plotly is fetched while Gradio's own scripts are, not after them."""
_JS = (Path(__file__).parent / "chart.js").read_text(encoding="utf-8").replace("__THEMES__", json.dumps(THEMES))
FRAME = (
    '<div class="qs-chart" role="group" aria-roledescription="chart" aria-label="${{label}}" tabindex="0" '
    'data-turn="{turn}" style="height:{height}px"></div><div class="qs-said" aria-live="polite"></div>'
)
"""HTML of the frame: a group, not an image, as plotly's buttons are in it; a line for screen readers explains the arrow keys."""

_TABLE_JS = """
const pick = (event) => {
  const row = event.target.closest('[data-index]');
  if (!row) return;
  element.querySelector('[aria-current]')?.removeAttribute('aria-current');
  row.setAttribute('aria-current', 'true');
  trigger('select', { index: Number(row.dataset.index) });
};
element.addEventListener('click', pick);
element.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' && event.key !== ' ') return;
  if (!event.target.closest('[data-index]')) return;
  event.preventDefault();
  pick(event);
});

let column = -1;
let down = false;
function arrange() {
  const heads = [...element.querySelectorAll('th[aria-sort]')];
  if (!heads[column]) return;
  const key = (row) => row.cells[column].dataset.key;
  const body = element.querySelector('tbody');
  body.append(...[...body.rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (a === '' || b === '') return (a === '') - (b === '');  // what was not measured comes last in both directions
    const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    return down ? -order : order;
  }));
  heads.forEach((head, place) => head.setAttribute('aria-sort', place !== column ? 'none' : down ? 'descending' : 'ascending'));
}
element.addEventListener('click', (event) => {
  const head = event.target.closest('th[aria-sort]');
  if (!head) return;
  down = column === head.cellIndex && !down;
  column = head.cellIndex;
  arrange();
});
watch('value', () => setTimeout(arrange));
"""


def serve_script() -> None:
    """Let the server send plotly's script, and nothing else of that folder."""
    gr.set_static_paths([SCRIPT])


class Chart(gr.HTML):
    """A component that draws a figure dict.

    Args:
        label: what the chart shows, read aloud by screen readers.
        height: in CSS pixels.
        turn: drawing order of the charts that one answer changes; the smallest number is drawn first.
        render: Gradio's; it makes a component anew, without placing it, for each update that sets more than the value.
    """

    def __init__(
        self,
        value: Figure | None = None,
        *,
        label: str,
        height: int = 380,
        turn: int = 1,
        elem_id: str | None = None,
        visible: bool = True,
        render: bool = True,
    ) -> None:
        super().__init__(
            value=value,
            label=label,
            elem_id=elem_id,
            apply_default_css=False,
            visible=visible,
            render=render,
            html_template=FRAME.format(height=int(height), turn=int(turn)),
            js_on_load=_JS,
            head=f'<script src="{ADDRESS}"></script>',
        )

    def postprocess(self, value: Figure | str | None) -> str | None:
        """Convert a figure dict to JSON text; return text and None unchanged."""
        if isinstance(value, dict):
            return json.dumps(value, separators=(",", ":"), allow_nan=False)
        return value

    def api_info(self) -> dict[str, Any]:
        """Return the type of the value for Gradio's schema."""
        return {"type": "string"}


def written(updates: dict[Any, Any]) -> dict[Any, Any]:
    """Return updates with their figures as JSON text."""
    return {block: block.postprocess(value) if isinstance(block, Chart) else value for block, value in updates.items()}


class Table(gr.HTML):
    """A component that shows `cards.table`: rows written with `pick` can be chosen, columns written with `keys` sorted."""

    def __init__(self, value: str = "", *, label: str, elem_id: str | None = None, **more: Any) -> None:
        super().__init__(value=value, label=label, elem_id=elem_id, js_on_load=_TABLE_JS, apply_default_css=False, **more)

    def api_info(self) -> dict[str, Any]:
        """Return the type of the value for Gradio's schema."""
        return {"type": "string"}


def sent(event: gr.EventData, name: str) -> Any:
    """Return what a component's script sent with an event under a name, None if nothing.

    Gradio's own attributes fail where a request holds anything but an object.
    """
    return event._data.get(name) if isinstance(event._data, dict) else None


def picked_row(event: gr.EventData) -> int:
    """Return the chosen row's index, -1 if the event has none."""
    index = sent(event, "index")
    return index if isinstance(index, int) and not isinstance(index, bool) else -1

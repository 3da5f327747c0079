"""The part of the tab Compare that projects memory and speed to any size: charts, tables, roofline."""

from __future__ import annotations

import gradio as gr

from app import engine
from app.context import LIGHT, Context, Updates
from app.view import cards, memory, plots_memory
from app.view import texts_memory as texts
from app.view.chart import Chart
from core.checks import require_choice, require_int
from core.errors import InputError
from core.evaluation.memory import ASSUMPTIONS, PROJECTED, memory_grid
from core.evaluation.roofline import GPUS, PHASES, operators

OFFERED = ("opt-125m", "opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "opt-175b", "llama-3-8b")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SEQUENCES = (1024, 2048, 4096, 8192, 16384, 32768, 131072)
"""Places of the heat map."""
USUAL = ((1, 8, 64), (2048, 4096, 8192))
"""Batches and sequence lengths of the table, those of the published comparison."""


class Memory:
    """The panel: its widgets, and the handler of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Accordion(texts.MEMORY, open=False, elem_id="memory-panel"):
            gr.Markdown(texts.MEMORY_INFO, elem_classes="qs-caption")
            with gr.Row(elem_classes="qs-controls qs-card"):
                self.size = gr.Dropdown(
                    [texts.THIS_MODEL, *OFFERED],
                    value="opt-13b",
                    label=texts.SIZE,
                    elem_id="shape",
                    allow_custom_value=True,
                    min_width=170,
                )
                self.scheme = self._choice(list(PROJECTED), "W4A4", texts.SCHEME, "memory-scheme", 110)
                self.batch = self._slider(1, 128, 8, 1, texts.BATCH, "batch")
                self.sequence = self._slider(256, 131072, 2048, 256, texts.SEQUENCE, "sequence")
                self.unit = self._choice(list(texts.UNITS), "GB", texts.UNIT, "memory-unit", 80)
                self.gpu = self._choice(list(GPUS), "H100", texts.GPU, "memory-gpu", 130)
            with gr.Row(equal_height=False, elem_classes="qs-charts"):
                with gr.Column(min_width=310):
                    self.bars = Chart(None, label=texts.BARS_LABEL, height=330, elem_id="memory")
                with gr.Column(min_width=310):
                    self.map = Chart(None, label=texts.MAP_LABEL, height=330, elem_id="memory-map")
            self.note = gr.HTML("", elem_id="memory-note", apply_default_css=False)
            with gr.Accordion(texts.GRID, open=False):
                self.grid = gr.HTML("", elem_id="memory-grid", apply_default_css=False)
            with gr.Accordion(texts.FITS, open=True):
                self.fits = gr.HTML("", elem_id="memory-fits", apply_default_css=False)
            with gr.Accordion(texts.ROOF, open=True):
                self.roof = Chart(None, label=texts.ROOF_LABEL, height=380, elem_id="roofline")
                self.operators = gr.HTML("", elem_id="operators", apply_default_css=False)

    @staticmethod
    def _choice(names: list[str], value: str, label: str, place: str, width: int) -> gr.Dropdown:
        return gr.Dropdown(names, value=value, label=label, elem_id=place, filterable=False, min_width=width)

    @staticmethod
    def _slider(least: int, most: int, value: int, step: int, label: str, place: str) -> gr.Slider:
        return gr.Slider(least, most, value, step=step, label=label, elem_id=place, buttons=[], scale=2, min_width=190)

    @property
    def inputs(self) -> set:
        """Components that a projection depends on."""
        return {self.ctx.key, self.size, self.scheme, self.batch, self.sequence, self.unit, self.gpu}

    @property
    def outputs(self) -> list:
        """Components that show a projection."""
        return [self.bars, self.map, self.note, self.grid, self.fits, self.roof, self.operators]

    def wire(self) -> None:
        """Connect the panel's events."""
        shown = [*self.outputs, self.ctx.status, self.ctx.stop]
        for control in (self.size, self.scheme, self.batch, self.sequence, self.unit, self.gpu):
            control.input(self.ctx.guard(self.project), self.inputs, shown, trigger_mode="always_last", **LIGHT)

    def project(self, values: Updates) -> Updates:
        """Project memory and the least time to the chosen model, scheme and place."""
        session, name = self.ctx.session(values), str(values[self.size] or "").strip()
        scheme = require_choice("scheme", values[self.scheme], tuple(PROJECTED))
        unit = require_choice("unit", values[self.unit], tuple(texts.UNITS))
        gpu = GPUS[require_choice("GPU", values[self.gpu], tuple(GPUS))]
        batch = require_int("batch", values[self.batch], 1, 1024, "use 1 to 1024")
        sequence = require_int("sequence length", values[self.sequence], 1, 1_048_576, "use 1 to 1048576")
        if name == texts.THIS_MODEL and session.info is None:
            raise InputError(texts.NO_MODEL, code="E-PARAM-SIZE")
        if name == texts.THIS_MODEL:
            shape = engine.shape_of_loaded(session.info)
        else:
            shape = engine.shape_of(name, allow_local=not self.ctx.settings.on_space)
        (chosen,) = memory_grid(shape, (scheme,), (batch,), (sequence,))
        around = memory_grid(shape, (scheme,), sorted({*BATCHES, batch}), sorted({*SEQUENCES, sequence}))
        place = {"batch": batch, "sequence": sequence}
        phases = {phase: operators(shape, PROJECTED[scheme], **place, phase=phase) for phase in PHASES}
        headers, rows = memory.grid_rows(memory_grid(shape, tuple(PROJECTED), *USUAL), unit)
        return {
            self.bars: plots_memory.memory_bars(memory_grid(shape, tuple(PROJECTED), (batch,), (sequence,))),
            self.map: plots_memory.memory_map(around, chosen, unit),
            self.note: "".join(map(cards.caution, [ASSUMPTIONS, *memory.claims_of(shape)])),
            self.grid: cards.table(headers, rows, caption=texts.GRID_CAPTION.format(unit=unit)),
            self.fits: cards.table(texts.FIT_HEADERS, memory.fit_rows(shape, chosen), caption=memory.fits_caption(chosen)),
            self.roof: plots_memory.roofline(phases, gpu, scheme),
            self.operators: "".join(
                cards.table(
                    texts.ROOF_HEADERS,
                    memory.operator_rows(found, gpu),
                    caption=f"{texts.PHASES[phase]}: {memory.speed_text(found, gpu, phase=phase, **place)}",
                )
                for phase, found in phases.items()
            )
            + cards.caution(texts.ROOF_NOTE.format(source=gpu.source)),
        }

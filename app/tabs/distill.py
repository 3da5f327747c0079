"""The fold on the tab Quantise with the options of the distillation that may follow a method."""

from __future__ import annotations

import gradio as gr

from app.context import Updates
from app.view import texts_distill as texts
from core.options import DISTILL_TEXTS, DistillOptions


class DistillFields:
    """The fold. Attributes: fields: all of its controls, by name: on, texts, and the numbers of `DistillOptions`."""

    def __init__(self) -> None:
        defaults = DistillOptions()
        with gr.Accordion(texts.PANEL, open=False):
            on = gr.Checkbox(False, label=texts.ON, info=texts.INFO, elem_id="distill")
            with gr.Row():
                self.numbers = {
                    name: gr.Number(
                        getattr(defaults, name),
                        label=label,
                        precision=None if name == "lr" else 0,
                        min_width=110,
                        elem_id=f"distill-{name}",
                    )
                    for name, label in texts.NUMBERS.items()
                }
            chosen = gr.CheckboxGroup(
                [(texts.TEXTS[name], name) for name in DISTILL_TEXTS],
                value=defaults.texts.split("+"),
                label=texts.TEXTS_LABEL,
                info=texts.TEXTS_INFO,
                elem_id="distill-texts",
            )
        self.fields = {"on": on, "texts": chosen, **self.numbers}

    def read(self, values: Updates) -> DistillOptions | None:
        """Return the options of the fields, None where no distillation is wanted. Raises: InputError naming one out of range."""
        if not values[self.fields["on"]]:
            return None
        numbers = {name: values[field] for name, field in self.numbers.items()}
        return DistillOptions(texts="+".join(values[self.fields["texts"]] or ()), **numbers)

    def fill(self, options: DistillOptions | None) -> Updates:
        """Set the fields to options, None for the defaults and no distillation."""
        own = options or DistillOptions()
        numbers = {field: getattr(own, name) for name, field in self.numbers.items()}
        return numbers | {self.fields["on"]: options is not None, self.fields["texts"]: own.texts.split("+")}

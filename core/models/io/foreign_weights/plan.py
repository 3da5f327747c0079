"""Open checkpoints that other tools have quantised: their weights become float32, one tensor at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from core.errors import ModelError
from core.models.io.foreign_weights.formats import LAYOUTS
from core.models.io.foreign_weights.layout import Layout, Shape
from core.models.io.preflight.folder import FolderReport, TensorInfo
from core.models.io.preflight.other_tools import FLOAT_TYPES, checkpoint_of, no_weight

_REMEDY = "Download the model again, or use the original float model."
_PART = re.compile(r"(.+)\.(qweight|qzeros|scales|biases|g_idx|SCB|weight_format|weight(?:[._][A-Za-z0-9_.]+)?)")
_ACTIVATIONS = re.compile(r"\.(?:(?:input|output|activation|[qkv])_(?:scale|zero_point)|input_scale_ub)$")
"""Scales of activations and of keys and values, which are no part of a weight."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a checkpoint: its layout, and the name in the file of each of its parts."""

    layout: Layout
    names: Mapping[str, str]


def plan_weights(
    report: FolderReport, shapes_of: Callable[[Iterable[str]], Mapping[str, Shape]]
) -> tuple[FolderReport, dict[str, PackedWeight]]:
    """Find how every quantised weight of a checked folder is stored; nothing is read beside the headers.

    Args: report: of `check_folder`. shapes_of: gives the shapes of named tensors in the model that config.json describes.
    Returns: (the report with weights in the place of their parts, `TensorInfo.dtype` naming the format; weights by name).
    Raises: ModelError E-MODEL-BAD for settings that are not read, or a weight whose parts are missing or have other shapes.
    """
    method, settings = report.quantised
    if report.config.get("model_type") == "gpt2":
        raise ModelError(f"{checkpoint_of(method)} of GPT-2, whose layers are stored transposed: that is not read. Use the "
                         "original float model.", code="E-MODEL-BAD")
    tensors = {name: info for name, info in report.tensors.items() if not _ACTIVATIONS.search(name)}
    own: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        if match := _PART.fullmatch(name):
            own[match[1]][match[2]] = name
    weights, shapes = {}, shapes_of([*tensors, *(f"{base}.weight" for base in own)])
    for base, names in own.items():
        weight = tensors.get(f"{base}.weight")
        if weight and weight.dtype in FLOAT_TYPES and len(names) == 1:
            continue
        shape = shapes.get(f"{base}.weight", ())
        if len(shape) != 2:
            continue
        layout = _choose(base, list(LAYOUTS[method](settings, base, shape)), {part: tensors[n] for part, n in names.items()})
        for stored in names.values():
            del tensors[stored]
        first = report.tensors[next(iter(names.values()))]
        tensors[f"{base}.weight"] = replace(first, dtype=layout.title, shape=shape)
        weights[f"{base}.weight"] = PackedWeight(layout, names)
    for name in (tensors.keys() & shapes.keys()) - weights.keys():  # tensors that the model does not have: see `check_tensors`
        if tensors[name].dtype not in FLOAT_TYPES:
            raise no_weight(name, tensors[name].dtype)
    if not weights:
        raise ModelError(f"{checkpoint_of(method)} by its settings, but no weight is stored so. Use the original float model.",
                         code="E-MODEL-BAD")
    return replace(report, tensors=tensors), weights


def read_weights(
    folder: Path, stored: FolderReport, planned: FolderReport, weights: Mapping[str, PackedWeight]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of the tensors of a planned folder, one after the other: quantised weights as float32.

    Args: stored: of `check_folder`. planned, weights: of `plan_weights`; `stored` and no weights where none is quantised.
    Raises: ModelError E-MODEL-BAD for values that their format does not have.
    """
    handles = {file: safe_open(folder / file, framework="pt") for file in {info.file for info in stored.tensors.values()}}

    def take(name: str) -> Tensor:
        return handles[stored.tensors[name].file].get_tensor(stored.tensors[name].name)

    for name in planned.tensors:
        packed = weights.get(name)
        if packed is None:
            yield name, take(name)
            continue
        shapes = {part: [-1 if size is None else size for size in shape] for part, (_, shape) in packed.layout.parts.items()}
        try:
            yield name, packed.layout.unpack({part: take(n).reshape(shapes[part]) for part, n in packed.names.items()})
        except (ValueError, TypeError) as error:
            raise ModelError(f"{name[:80]}, {packed.layout.title}: {error}. {_REMEDY}", code="E-MODEL-BAD") from error


def _choose(base: str, layouts: list[Layout], found: Mapping[str, TensorInfo]) -> Layout:
    """Return the layout that the stored parts have. Raises: ModelError E-MODEL-BAD saying what is wrong in the nearest one."""
    faults = [layout.faults(found) for layout in layouts]
    best = min(range(len(layouts)), key=lambda index: len(faults[index]))
    if faults[best]:
        raise ModelError(f"{base[:80]} is no {layouts[best].title} weight: {faults[best][0]}. {_REMEDY}", code="E-MODEL-BAD")
    return layouts[best]

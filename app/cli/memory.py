"""The verb `memory`: bytes of a model by formula, the GPUs that hold them, the roofline on one."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from app.cli.output import Console, table
from app.view import memory as rows
from app.view import texts_memory as texts
from core.checks import parse_int, require_choice
from core.evaluation.memory import ASSUMPTIONS, PROJECTED, MemoryEstimate, memory_grid
from core.evaluation.roofline import GPUS, PHASES, cards_needed, least_seconds, operators
from core.evaluation.shapes import Shape, model_shape

ALL = "all"


def memory(args: Namespace, console: Console) -> None:
    """Project and print the bytes of a model, by formula: one place in parts, several as a grid."""
    schemes = tuple(PROJECTED) if args.scheme == ALL else tuple(args.scheme.split(","))
    given = {"batch": args.batch, "sequence": args.seq}
    batches, sequences = ([parse_int(name, part) for part in text.split(",")] for name, text in given.items())
    if args.gpu is not None:
        require_choice("gpu", args.gpu, tuple(GPUS))
    shape = model_shape(args.model)
    cells = memory_grid(shape, schemes, batches, sequences)
    document: dict[str, Any] = {"model": args.model, "shape": vars(shape), "assumptions": ASSUMPTIONS}
    document |= {"parameters": shape.parameters, "cells": [cell.to_dict() for cell in cells], "claims": rows.claims_of(shape)}
    text = "".join(f"\n{claim}\n" for claim in document["claims"])
    text += f"\n{ASSUMPTIONS} 1 GB = 10^9, 1 GiB = 2^30 bytes.\n"
    if len(cells) == 1:
        found, more = _place(args.model, shape, cells[0], args.gpu)
        console.finish(document | cells[0].to_dict() | found, more + text)
    else:
        console.finish(document, "\n".join(_grid(cells, unit) for unit in texts.UNITS) + text)


def _grid(cells: list[MemoryEstimate], unit: str) -> str:
    return f"{texts.GRID_CAPTION.format(unit=unit)}\n\n{table(*rows.grid_rows(cells, unit))}"


def _place(model: str, shape: Shape, cell: MemoryEstimate, name: str | None) -> tuple[dict[str, Any], str]:
    """Write one place of the grid: its parts, the GPUs that hold it, and the roofline of the GPU called `name`."""
    parts = {part: getattr(cell, part) for part in ("weights", "kv_cache", "activations", "total")}
    lines = [[part.replace("_", " "), f"{s:,}", f"{s / 1e9:,.2f}", f"{s / 2**30:,.2f}"] for part, s in parts.items()]
    text = f"{model}, {cell.scheme}, batch {cell.batch:,}, sequence {cell.sequence:,} (estimate)\n\n"
    text += f"{table(['part', 'bytes', 'GB', 'GiB'], lines)}\n{table(texts.FIT_HEADERS, rows.fit_rows(shape, cell))}"
    document: dict[str, Any] = {"cards": {gpu.name: cards_needed(cell.total, gpu) for gpu in GPUS.values()}}
    if name is None:
        return document, text
    gpu, place = GPUS[name], {"batch": cell.batch, "sequence": cell.sequence}
    document["gpu"], document["roofline"] = vars(gpu), {}
    for phase in PHASES:
        found = operators(shape, PROJECTED[cell.scheme], **place, phase=phase)
        seconds = least_seconds(found, gpu)
        document["roofline"][phase] = {"seconds": seconds, "operators": [op.to_dict(gpu) for op in found]}
        said = rows.speed_text(found, gpu, phase=phase, **place)
        text += f"\n{texts.PHASES[phase]} on one {name}: {said}\n\n{table(texts.ROOF_HEADERS, rows.operator_rows(found, gpu))}"
    return document, text + "\n" + texts.ROOF_NOTE.format(source=gpu.source) + "\n"

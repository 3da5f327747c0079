"""Write the HTML report of `evaluate` and `compare`, the same one that the page offers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.report import report_html
from app.session import Protocol, Run, Session
from core.baselines.registry import BASELINES
from core.errors import ArtifactError
from core.recipe import QuantRecipe
from core.storage import write_file


def write_html(target: str, bench: Any, protocol: dict[str, Any], measured: Sequence[tuple[str, Any]]) -> None:
    """Write a report on measured models.

    Args:
        bench: the Workbench that measured them. protocol: text, tokens and window. measured: (name, EvalReport) of each.
    Raises: ResourceError E-DISK if the file cannot be written; an earlier one is then as it was.
    """
    session = Session(protocol=Protocol(protocol["text"], protocol["tokens"], protocol["window"]))
    for name, report in measured:
        run = Run(name, report.label)
        run.label = BASELINES[run.baseline].label if run.baseline else run.label
        try:
            run.quantize = bench.open_saved(folder=name)
            run.recipe = QuantRecipe.from_dict(run.quantize.recipe)
        except ArtifactError:  # a model that is not quantised has no description to read
            session.models[name] = bench.load(name)
        run.measure(session.protocol, report)
        session.runs.append(run)
    write_file(Path(target), report_html(session).encode("utf-8"))

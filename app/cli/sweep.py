"""The verb `sweep`: many recipes by several processes, a row each; run again, it goes on where it stopped."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from app.cli.output import Console, check_target, facts, table
from app.report import report_html
from app.session import Protocol, Run, Session
from app.view.figure import bytes_text, number
from app.view.plots_pareto import frontier
from app.view.tables import with_error
from core.checks import parse_int, require_int
from core.errors import InputError, TextError
from core.recipe import QuantRecipe
from core.storage import write_file
from core.sweep.grid import Grid
from core.sweep.pool import failures, run_grid
from core.sweep.rows import ROWS, open_rows

MAX_BYTES = 2**20
MAX_WORKERS = 64


def sweep(args: Namespace, console: Console) -> None:
    """Run every recipe of a grid that has no row yet, and print all rows with the best ones marked."""
    grid = read_grid(args.grid)
    workers = require_int("workers", parse_int("workers", args.workers), 1, MAX_WORKERS, f"use 1 to {MAX_WORKERS}")
    if args.html is not None:
        check_target(args.html, code="E-PARAM-HTML")
    folder = Path(args.out)
    with open_rows(folder, grid.measure) as rows:
        found = run_grid(grid, rows, workers=workers, retry=args.retry, device=args.device, progress=console.progress)
    done, failed = [row for row in found if row not in failures(found)], failures(found)
    if args.html is not None:
        write_file(Path(args.html), _report(grid, done).encode("utf-8"))
    document = {"rows": found, "done": len(done), "failed": len(failed), "file": str(folder / ROWS)}
    console.finish(document, _text(done, failed) + f"\n{len(done)} of {len(found)} recipes measured; rows in {folder / ROWS}\n")


def read_grid(name: str) -> Grid:
    """Read a grid from a YAML or JSON file. Raises: InputError, TextError."""
    path = Path(name)
    if not path.is_file():
        rule = f"No grid file {name[-60:]!r}: write one, for example with the lines model and scheme."
        raise TextError(rule, code="E-TEXT-NOTFOUND")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"The grid file is larger than {MAX_BYTES // 2**20} MiB: give fewer values.", code="E-PARAM-GRID")
    try:
        data = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise InputError(f"The grid file is no YAML{where}: correct it, or write JSON.", code="E-PARAM-GRID") from None
    return Grid.from_dict(data)


def _text(done: list[dict[str, Any]], failed: list[dict[str, Any]]) -> str:
    """Write rows as a table, by model and growing divergence, and failures below it."""
    headers = ["recipe", "perplexity", "ln ratio", "KLD", "weights", "KV / token", "best by"]
    lines: list[list[str]] = []
    best = {"weights": _best(done, "weight_bytes"), "cache": _best(done, "kv_bytes_per_token")}
    for row in sorted(done, key=lambda row: (row["recipe"]["model"], row["report"]["kld_mean"])):
        report = row["report"]
        lines.append(
            [
                report["label"],
                f"{number(report['perplexity'], 4)} ± {number(report['perplexity_stderr'], 2)}",
                with_error(report["ln_ratio"], report["ln_ratio_stderr"]),
                with_error(report["kld_mean"], report["kld_stderr"]),
                bytes_text(report["weight_bytes"]),
                bytes_text(report["kv_bytes_per_token"]),
                ", ".join(name for name, hashes in best.items() if row["hash"] in hashes),
            ]
        )
    text = table(headers, lines) if lines else ""
    text += "best by: no other recipe of the model has both fewer of these bytes and a smaller KLD.\n" if lines else ""
    return text + ("\nFailed\n" + facts([(row["hash"], f"{row['code']}: {row['error']}") for row in failed]) if failed else "")


def _best(done: list[dict[str, Any]], size: str) -> set[str]:
    """Find the hashes of the rows on the frontier of bytes and divergence, model by model."""
    found = set()
    for model in {row["recipe"]["model"] for row in done}:
        own = [row for row in done if row["recipe"]["model"] == model]
        points = {(row["report"][size], row["report"]["kld_mean"]): row["hash"] for row in own}
        found |= {points[point] for point in frontier(list(points))}
    return found


def _report(grid: Grid, done: list[dict[str, Any]]) -> str:
    """Write the HTML report of the rows that are done, as for `compare`."""
    from core.evaluation.describe import report_from_dict
    from core.report import EvalReport

    protocol = Protocol(grid.measure.text, grid.measure.tokens, grid.measure.window)
    session = Session(protocol=protocol)
    for row in done:
        run = Run(row["hash"], row["report"]["label"], QuantRecipe.from_dict(row["recipe"]), report_from_dict(row["quantize"]))
        run.measure(protocol, EvalReport(**row["report"]))
        session.runs.append(run)
    return report_html(session)

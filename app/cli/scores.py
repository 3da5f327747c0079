"""The verb `scores`: accuracies on standard tasks, several models side by side, by lm-evaluation-harness."""

from __future__ import annotations

from argparse import Namespace

from app.cli.output import Console, table
from app.view.tables import share
from core.checks import parse_int, require_int
from core.errors import InputError

MAX_LIMIT = 1_000_000


def scores(args: Namespace, console: Console) -> None:
    """Score models on tasks, and print one row per task and one column per model."""
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise InputError("No task is named: give names such as arc_easy,piqa.", code="E-PARAM-TASKS")
    limit = None if args.limit is None else require_int("limit", parse_int("limit", args.limit), 1, MAX_LIMIT, "use 1 or more")
    from core import Workbench
    from core.evaluation.scores import score_tasks
    from core.provenance import provenance

    bench = Workbench(device=args.device)
    reports = []
    for name in args.models:
        loaded = bench.model(name, progress=console.progress)
        reports.append(score_tasks(loaded, tasks, limit=limit, backend=args.backend, progress=console.progress))
    rows = []
    for found in zip(*(report.scores for report in reports), strict=True):
        first = found[0]
        rows.append([first.task, first.metric, f"{first.questions:,}", *(share(one.value, one.stderr) for one in found)])
    sources = dict.fromkeys(f"{score.task}: {score.source}" for score in reports[0].scores)
    text = table(["task", "metric", "questions", *args.models], rows, left=2) + f"\nData of {'; '.join(sources)}\n"
    measured = [{"model": name} | report.to_dict() for name, report in zip(args.models, reports, strict=True)]
    console.finish({"models": measured, "provenance": provenance()}, text)

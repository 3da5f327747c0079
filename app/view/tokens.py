"""Write a text as coloured tokens: where two models differ and what both find likeliest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from html import escape
from typing import Any

from app.view import cards
from app.view import texts_divergence as texts
from app.view.figure import number

LEVELS = (0.01, 0.05, 0.2, 0.5, 1.0)
"""Lower limits of the colours, in nats; the first colour is for smaller divergences."""


def level(kld: float) -> int:
    """Return the colour of a divergence: 0 to len(LEVELS)."""
    return bisect_right(LEVELS, kld)


def text_of_tokens(report: Any) -> str:
    """Write the tokens of a report and the legend of their colours; those that were predicted can be chosen by their place."""
    shown = "".join(_token(entry, place) for place, entry in enumerate(report.tokens))
    predicted = [t for t in report.tokens if t.kld is not None]
    flips = sum(t.flips for t in predicted)
    summary = (
        f"{len(predicted)} predictions of {report.text_name}: mean KLD {number(report.kld)} nats, "
        f"{cards.counted(flips, 'flip')} ({number(100 * flips / len(predicted))} %)"
    )
    return (
        f'<p class="qs-verdict">{escape(summary)}</p>{_legend()}'
        f'<div class="qs-reading" role="group" aria-label="{escape(texts.TOKENS)}">{shown}</div>'
        f"{cards.caution(texts.TOKENS_NOTE)}"
    )


def table_by_confidence(groups: Sequence[Any]) -> str:
    """Write the table of the divergence by the original's confidence."""
    return cards.table(texts.CONFIDENCE_HEADERS, confidence_rows(groups), caption=texts.CONFIDENCE_CAPTION)


def confidence_rows(groups: Sequence[Any]) -> list[list[str]]:
    """Make rows of the table by confidence: interval, tokens, mean divergence, share of flips."""
    return [
        [f"{g.low:g} to {g.high:g}", f"{g.tokens:,}", number(g.kld), f"{number(100 * g.flips)} %"] for g in groups
    ]


def _legend() -> str:
    parts = "".join(f'<span class="qs-tok qs-k{i}">{escape(label)}</span>' for i, label in enumerate(texts.TOKENS_LEGEND))
    return f'<p class="qs-legend">KLD, nats: {parts}</p>'


def _token(entry: Any, place: int) -> str:
    text = escape(entry.text.replace("\n", "⏎\n")) or "∅"
    if entry.kld is None:
        return f'<span class="qs-tok" title="{escape(texts.TOKENS_FIRST)}">{text}</span>'
    flip = " qs-flip" if entry.flips else ""
    said = f"{entry.text.strip()!r}: {number(entry.kld)} nats{', flip' if entry.flips else ''}"
    columns = "".join(
        f"<span><b>{escape(name[:28])}</b>{_likeliest(top)}<i>this token {percent(own)}</i></span>"
        for name, top, own in (
            ("unquantised", entry.reference_likeliest, entry.reference_probability),
            ("quantised", entry.likeliest, entry.probability),
        )
    )
    return (
        f'<span class="qs-tok qs-k{level(entry.kld)}{flip}" data-index="{place}" tabindex="0" role="button" '
        f'aria-label="{escape(said)}">{text}'
        f'<span class="qs-tip"><b>{number(entry.kld)} nats</b><span class="qs-both">{columns}</span></span></span>'
    )


def _likeliest(top: Sequence[tuple[str, float]]) -> str:
    rows = "".join(f"<span><code>{escape(repr(text)[1:-1])}</code> {percent(p)}</span>" for text, p in top)
    return f"<span>{rows}</span>"


def percent(share: float) -> str:
    """Format a probability as a percentage."""
    return f"{number(100 * share)} %"

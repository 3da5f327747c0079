"""Write what moved at one token: a sentence, a table and bars of the sites that moved farthest."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from app.view import cards, texts
from app.view import texts_divergence as words
from app.view.figure import ABOVE, Figure, layout, number

MOST = 10
"""Sites in the table and in the chart."""
NAMED = 3
"""Channels of a site in the table."""
COLOURS = {"moved": "@ink", "came": "@run1", "rounded": "@run2"}
"""Colour of each figure's bars."""


def account(report: Any) -> str:
    """Write the token, what moved most there, how to read it, and the table. `report`: MovedReport."""
    token, after = (f"<code>{escape(repr(text)[1:-1])}</code>" for text in (report.token, report.after))
    said = "".join(f'<p class="qs-verdict">{escape(sentence)}</p>' for sentence in verdicts(report.sites))
    where = f"<span>{escape(words.MOVED_AT)}</span> {token} <span>{escape(words.MOVED_AFTER)}</span> {after}"
    notes = [words.MOVED_NOTE, *([words.MOVED_MIXED] if any(site.moved is None for site in report.sites) else [])]
    table = cards.table(words.MOVED_HEADERS, rows(report.sites), caption=words.MOVED_TABLE)
    return f'<p class="qs-legend">{where}</p>{said}{table}{"".join(map(cards.caution, notes))}'


def verdicts(sites: Sequence[Any]) -> list[str]:
    """Say which site moved most, by which channel, and which one rounding changes most. `sites`: farthest moved first."""
    first, noisy = sites[0], max(sites, key=lambda site: site.rounded)
    if not first.size:
        return [words.MOVED_NOTHING]
    channel, before, after = first.channels[0]
    said = words.MOVED_MOST.format(
        site=texts.SITE_LABELS[first.site], layer=first.layer, share=number(100 * first.size),
        channel=channel, before=number(before), after=number(after),
    )
    share = number(100 * noisy.rounded)
    rounded = words.MOVED_ROUNDED.format(site=texts.SITE_LABELS[noisy.site], layer=noisy.layer, share=share)
    return [said, *([rounded] if noisy.rounded else [])]


def rows(sites: Sequence[Any]) -> list[list[str]]:
    """Make rows of the table: layer, site, moved, came in, rounded here, channels with both values."""
    return [
        [
            str(site.layer),
            texts.SITE_LABELS[site.site],
            *("–" if share is None else number(100 * share) for share in (site.moved, site.came, site.rounded)),
            "; ".join(f"{channel}: {number(before)} → {number(after)}" for channel, before, after in site.channels[:NAMED]),
        ]
        for site in sites[:MOST]
    ]


def bars(sites: Sequence[Any]) -> Figure:
    """Draw the three figures of the sites that moved farthest as bars, the farthest on top."""
    shown = sites[:MOST]
    names = [f"Layer {site.layer} · {texts.SITE_LABELS[site.site]}" for site in shown]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": [None if getattr(site, figure) is None else 100 * getattr(site, figure) for site in shown],
            "marker": {"color": COLOURS[figure]},
            "hovertemplate": "%{y}: %{x:.3g} %<extra>%{fullData.name}</extra>",
        }
        for figure, name in words.MOVED_FIGURES.items()
        if any(getattr(site, figure) is not None for site in shown)
    ]
    return {
        "data": traces,
        "layout": layout(
            uirevision="moved",
            caption=words.MOVED_CAPTION,
            margin=(12, 14, 34, 44),
            legend=ABOVE,
            showlegend=True,
            barmode="group",
            bargap=0.25,
            xaxis={"title": {"text": "%"}, "rangemode": "tozero"},
            yaxis={"automargin": True, "autorange": "reversed"},
        ),
    }

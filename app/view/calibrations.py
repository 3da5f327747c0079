"""Write how two calibrations of a recipe differ: a sentence, bars, a map of sites, channels of a site."""

from __future__ import annotations

from html import escape
from typing import Any

from app.view import cards
from app.view import texts_groups as texts
from app.view.cost import gauge
from app.view.figure import Figure, layer_map, layout, number, pack
from app.view.plots_ranges import WEBGL_FROM
from app.view.tables import with_error
from app.view.texts import SITE_LABELS

NAMES = ("A", "B")
LISTED = 10
"""Sites of the table."""


def words(pair: Any, recipe: str) -> str:
    """Say in two sentences how the calibrations differ. `pair`: CalibrationPair; `recipe`: its short name."""
    shares = {name: f"{100 * pair.share(name):.0f}" for name in ("wider", "narrower", "moved")}
    a, b = (with_error(found.kld, found.stderr) for found in pair.measured)
    cost = texts.PAIR_COST.format(recipe=recipe, a=a, b=b, tokens=pair.judged, judge=pair.judge)
    return f"{texts.PAIR_WIDER.format(**shares)} {cost}"


def card(pair: Any, recipe: str) -> str:
    """Write the comparison in words, with bars of what was predicted and measured with each calibration."""
    bars = ""
    for name, predicted, measured in zip(NAMES, pair.predicted, pair.measured, strict=True):
        for kind, found in (("predicted", (predicted.total, None)), ("measured", (measured.kld, measured.stderr))):
            bars += gauge(kind, texts.PAIR_BARS[kind].format(name), "", found, measured.noise_floor)
    told = cards.caution(texts.PAIR_TOLD.format(tokens=pair.tokens, texts=pair.texts))
    return f'<div class="qs-summary qs-cost"><p class="qs-verdict">{escape(words(pair, recipe))}</p>{bars}{told}</div>'


def ranked(pair: Any) -> list[str]:
    """List sites by the share of their channels that change cluster, then by the share whose range is another."""

    def key(name: str) -> tuple[float, float]:
        site = pair.sites[name]
        return -site.moved / site.channels, -(site.wider + site.narrower) / site.channels

    return sorted(pair.sites, key=key)


def rows(pair: Any) -> list[list[str]]:
    """Make the rows of the sites that differ most."""
    found = []
    for name in ranked(pair)[:LISTED]:
        site, (_, layer, kind) = pair.sites[name], name.split(".")
        shares = [f"{number(100 * count / site.channels)} %" for count in (site.moved, site.wider, site.narrower)]
        found.append([layer, SITE_LABELS[kind], shares[0], number(site.rand), *shares[1:]])
    return found


def shift_map(pair: Any, *, revision: str) -> Figure:
    """Draw the share of channels that change cluster, by layer and site."""
    kinds = [kind for kind in SITE_LABELS if f"layers.0.{kind}" in pair.sites]
    names = [[name for name in pair.sites if name.endswith(f".{kind}")] for kind in kinds]
    sites = [[pair.sites[name] for name in row] for row in names]
    return layer_map(
        {SITE_LABELS[kind]: [100 * s.moved / s.channels for s in row] for kind, row in zip(kinds, sites, strict=True)},
        unit="%",
        hover="%{text}",
        caption=texts.PAIR_MAP,
        revision=revision,
        left=96,
        text=[[_told(site) for site in row] for row in sites],
        customdata=names,
        zmin=0,
        zmax=100,
    )


def _told(site: Any) -> str:
    moved, wider, narrower = (f"{number(100 * count / site.channels)} %" for count in (site.moved, site.wider, site.narrower))
    return f"{moved} change cluster, adjusted Rand index {number(site.rand)}<br>{wider} wider with B, {narrower} narrower"


def width_scatter(pair: Any, name: str) -> Figure:
    """Draw each channel of a site: the width of its range with A against that with B; channels without a range are left out."""
    _, layer, kind = name.split(".")
    widths = pair.sites[name].widths
    channels = [c for c, (a, b) in enumerate(widths.T.tolist()) if a > 0 and b > 0]
    a, b = (widths[:, channels].tolist() if channels else [[1.0], [1.0]])
    ends = [min(*a, *b), max(*a, *b)]
    points = {
        "type": "scattergl" if len(channels) > WEBGL_FROM else "scatter",
        "mode": "markers",
        "x": pack(a),
        "y": pack(b),
        "customdata": pack(channels, kind="i4"),
        "marker": {"color": "@points", "size": 6, "opacity": 0.6},
        "showlegend": False,
        "hovertemplate": "<b>channel %{customdata}</b><br>A %{x:.4~g}<br>B %{y:.4~g}<extra></extra>",
    }
    same = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "name": texts.PAIR_SAME, "hoverinfo": "skip"}
    axis = {"type": "log", "exponentformat": "power", "dtick": 1}
    return {
        "data": [same | {"line": {"color": "@muted", "dash": "dot", "width": 1.5}}, points],
        "layout": layout(
            uirevision=name,
            caption=texts.PAIR_SCATTER.format(layer=layer, site=SITE_LABELS[kind]),
            margin=(60, 12, 34, 44),
            showlegend=True,
            xaxis=axis | {"title": {"text": "A"}},
            yaxis=axis | {"title": {"text": "B"}},
        ),
    }

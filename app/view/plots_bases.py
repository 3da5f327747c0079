"""Charts of several bases beside each other: scatters, heat maps, strips, noise by cluster count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.view import texts
from app.view import texts_bases as words
from app.view.figure import Figure, Scale, cluster_colour, layout, log_axis, number, pack
from app.view.plots_clusters import caption, label_count, strip
from app.view.plots_ranges import HOVER, WEBGL_FROM, binned, limits_of, percentile

PANELS = ("original", "reordered", "scaled", "rotated")
"""Plots of one chart, by names of `texts_bases.VIEWS`."""
COLUMNS = 256
"""Columns of one heat map among several."""
LEFT, RIGHT = [0, 0.47], [0.53, 1]
LOWER, UPPER = [0, 0.42], [0.53, 0.95]
QUARTERS = ((LEFT, UPPER), (RIGHT, UPPER), (LEFT, LOWER), (RIGHT, LOWER))
COLOURS = ("@run1", "@run2", "@run3")


@dataclass(frozen=True)
class Panel:
    """One of several plots: `name`: one of `PANELS`, SiteRanges, and the ClusterView of the site in this basis."""

    name: str
    site: Any
    view: Any


def _quarters(x: Figure, y: Figure) -> Figure:
    """Lay four plots out with the same axes: titles stand outside alone."""
    axes: Figure = {}
    for index, (across, up) in enumerate(QUARTERS):
        own, name = "" if not index else str(index + 1), f"y{index + 1}" if index else "y"
        linked = {"matches": "x"} if index else {}
        inner_x = {"domain": across, "anchor": name} | linked | ({} if up is LOWER else {"title": None, "showticklabels": False})
        linked = {"matches": "y"} if index else {}
        inner_y = {"domain": up, "anchor": f"x{own}"} | linked
        inner_y |= {} if across is LEFT else {"title": None, "showticklabels": False}
        axes |= {f"xaxis{own}": x | inner_x, f"yaxis{own}": y | inner_y}
    return axes


def _captions(names: Sequence[str]) -> list[Figure]:
    return [caption(words.VIEWS[n], across[0], up[1]) for n, (across, up) in zip(names, QUARTERS, strict=True)]


def _axes_of(index: int) -> Figure:
    return {"xaxis": f"x{index + 1}", "yaxis": f"y{index + 1}"} if index else {"xaxis": "x", "yaxis": "y"}


def scatters(panels: Sequence[Panel], *, linear: bool, revision: str = "") -> Figure:
    """Draw the channels of four panels as points, x = minimum and y = maximum; reordered ones coloured by cluster.

    A point's `customdata` are its channel, minimum, maximum, and the panel's place among them.
    """
    sites = [panel.site for panel in panels]
    scale = Scale.fit([v for s in sites for v in (*s.low.tolist(), *s.high.tolist())], linear=linear)
    low, high, least, most = limits_of(sites)
    traces = []
    for index, panel in enumerate(panels):
        lows, highs = panel.site.low.tolist(), panel.site.high.tolist()
        marker: Figure = {"color": "@points", "size": 4, "opacity": 0.6}
        if panel.name == "reordered":
            count = label_count(panel.view)
            marker["color"] = [cluster_colour(label, count) for label in panel.view.labels.tolist()]
        rows = [v for channel, ends in enumerate(zip(lows, highs, strict=True)) for v in (channel, *ends, index)]
        traces.append(
            {
                "type": "scattergl" if len(lows) > WEBGL_FROM else "scatter",
                "mode": "markers",
                "x": pack(scale.map(lows)),
                "y": pack(scale.map(highs)),
                "customdata": pack(rows, columns=4),
                "hovertemplate": HOVER,
                "marker": marker,
                **_axes_of(index),
            }
        )
    axes = _quarters(scale.axis(low, high, title="channel minimum"), scale.axis(least, most, title="channel maximum"))
    notes = _captions([panel.name for panel in panels])
    frame = layout(uirevision=revision, caption=words.SCATTERS, margin=(62, 10, 34, 44), annotations=notes, **axes)
    return {"data": traces, "layout": frame}


def heatmaps(matrices: Mapping[str, Any], *, layer: int, revision: str = "") -> Figure:
    """Draw the largest absolute value by layer and channel, one heat map for each panel, in the same colours.

    Args: matrices: [L, C] float32 by panel, log10 of the absolute maximum.
    """
    cells = {name: binned(matrix, COLUMNS) for name, matrix in matrices.items()}
    every = [v for rows, _, _ in cells.values() for row in rows for v in row]
    floor, top = percentile(every, 0.02), max(every)
    ticks = list(range(math.floor(floor), math.ceil(top) + 1))
    traces, shapes = [], []
    for index, (rows, width, step) in enumerate(cells.values()):
        flat, columns = [v for row in rows for v in row], len(rows[0])
        traces.append(
            {
                "type": "heatmap",
                "z": pack(flat, columns=columns),
                "x0": (step - 1) / 2,
                "dx": step,
                "y0": 0,
                "dy": 1,
                "customdata": pack([10.0**v for v in flat], columns=columns),
                "colorscale": "@heat",
                "zmin": floor,
                "zmax": top,
                "showscale": index == 0,
                "hovertemplate": "<b>layer %{y}, channel %{x:.0f}</b><br>|value| up to %{customdata:.4~g}<extra></extra>",
                "colorbar": {
                    "tickvals": ticks,
                    "ticktext": [number(10.0**t, 1) for t in ticks],
                    "thickness": 8,
                    "outlinewidth": 0,
                },
                **_axes_of(index),
            }
        )
        refs = {f"{axis[0]}ref": name for axis, name in _axes_of(index).items()}
        ends = {"x0": -0.5, "x1": width - 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
        shapes.append({"type": "rect", "line": {"color": "@alert", "width": 1}} | ends | refs)
    layers, plain = len(rows), {"showgrid": False, "zeroline": False}
    x = plain | {"title": {"text": texts.CHANNEL.lower()}, "range": [-0.5, width - 0.5]}
    y = plain | {"title": {"text": texts.LAYER.lower()}, "range": [-0.5, layers - 0.5], "dtick": 5 if layers > 12 else 1}
    notes = _captions(list(matrices))
    frame = layout(uirevision=revision, caption=words.HEATMAPS, margin=(48, 10, 34, 42), annotations=notes, shapes=shapes)
    return {"data": traces, "layout": frame | _quarters(x, y)}


def strips(panels: Sequence[Panel], *, linear: bool, revision: str = "") -> Figure:
    """Draw a strip of bars from minimum to maximum for each panel, one above the other; colours are clusters."""
    sites = [panel.site for panel in panels]
    scale = Scale.fit([v for s in sites for v in (*s.low.tolist(), *s.high.tolist())], linear=linear)
    y = scale.axis(*limits_of(sites)[::3], title="")
    width, part = len(sites[0].low), 1 / len(panels)
    traces, axes, notes = [], {}, []
    for index, panel in enumerate(panels):
        view, own = panel.view, "" if not index else str(index + 1)
        order = view.order.tolist() if panel.name == "reordered" else range(width)
        lows, highs, labels = panel.site.low.tolist(), panel.site.high.tolist(), view.labels.tolist()
        traces.append(strip(order, lows, highs, labels, label_count(view), scale, axis=f"y{own}"))
        bottom = (len(panels) - 1 - index) * part
        axes[f"yaxis{own}"] = y | {"domain": [bottom, bottom + 0.8 * part]} | ({"matches": "y", "anchor": "x"} if index else {})
        notes.append(caption(words.VIEWS[panel.name], 0, bottom + 0.8 * part))
    x = {"title": {"text": "position of the channel"}, "range": [-0.5, width - 0.5], "showgrid": False}
    x |= {"anchor": f"y{len(panels)}"}
    frame = layout(
        uirevision=revision, margin=(56, 10, 8, 42), barmode="overlay", bargap=0, annotations=notes, xaxis=x, **axes
    )
    return {"data": traces, "layout": frame}


def noise_curves(curves: Mapping[str, Any], noise: Mapping[str, Any], *, current: int, revision: str = "") -> Figure:
    """Draw the rounding noise of a site by its number of clusters, a line for each basis; a dotted line at the current count.

    Args: curves: ErrorCurve by basis. noise: GridNoise by basis, whose `tensor` is the noise of one grid.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(curve.g),
            "y": [noise[name].tensor * error for error in curve.kmeans],
            "name": words.VIEWS[name],
            "line": {"color": colour, "width": 2},
            "marker": {"size": 6},
            "hovertemplate": "g = %{x}: %{y:.3~g}<extra></extra>",
        }
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=True)
    ]
    here = {"type": "line", "x0": current, "x1": current, "y0": 0, "y1": 1, "yref": "paper"}
    x = {"type": "log", "title": {"text": "clusters g"}, "tickmode": "array"}
    counts = list(next(iter(curves.values())).g)
    return {
        "data": traces,
        "layout": layout(
            uirevision=revision,
            caption=words.NOISE_CAPTION,
            margin=(60, 12, 34, 44),
            showlegend=True,
            shapes=[here | {"line": {"color": "@alert", "width": 1, "dash": "dot"}}],
            xaxis=x | {"tickvals": counts, "ticktext": [str(g) for g in counts]},
            yaxis=log_axis([cost for trace in traces for cost in trace["y"]], words.NOISE_TITLE),
        ),
    }

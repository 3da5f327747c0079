"""Charts of observed ranges: pure functions from core's reports to figures (see `app.view.figure`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from app.view import texts
from app.view.figure import CLUSTER_COUNT, SYMBOLS, Figure, Scale, cluster_colour, layout, number, pack
from app.view.plots_clusters import groups_of, label_count

WEBGL_FROM = 1500
HEAT_COLUMNS = 768
HOVER = "<b>channel %{customdata[0]}</b><br>minimum %{customdata[1]:.4~g}<br>maximum %{customdata[2]:.4~g}<extra></extra>"
HOVER_CLUSTER = (
    "<b>channel %{customdata[0]}</b> · cluster %{customdata[3]}<br>minimum %{customdata[1]:.4~g}"
    "<br>maximum %{customdata[2]:.4~g}<br>scale %{customdata[4]:.4~g}<extra></extra>"
)
CURSOR = {"symbol": "circle-open", "size": 17, "color": "@ink", "line": {"width": 2.5}}


def scale_of(sites: Iterable[Any], *, linear: bool) -> Scale:
    """Fit one axis mapping for all the given sites, from their channel bounds."""
    return Scale.fit([v for s in sites for v in (*s.low.tolist(), *s.high.tolist())], linear=linear)


def limits_of(sites: Iterable[Any]) -> tuple[float, float, float, float]:
    """Return smallest and largest minimum, smallest and largest maximum over the given sites."""
    sites = list(sites)
    return (
        float(min(s.low.min() for s in sites)),
        float(max(s.low.max() for s in sites)),
        float(min(s.high.min() for s in sites)),
        float(max(s.high.max() for s in sites)),
    )


@dataclass(frozen=True)
class _Cloud:
    """One site's channels: bounds in activation units, and the same in chart coordinates."""

    low: list[float]
    high: list[float]
    x: list[float]
    y: list[float]

    def trace(self, channels: Iterable[int], extra: dict[int, tuple[float, float]] | None = None, **trace: Any) -> Figure:
        """Draw the points of some channels; `extra` adds (cluster, scale) to the pointer's text."""
        channels, rows = list(channels), []
        for c in channels:
            rows += (c, self.low[c], self.high[c]) if extra is None else (c, self.low[c], self.high[c], *extra[c])
        return {
            "type": "scattergl" if len(self.low) > WEBGL_FROM else "scatter",
            "mode": "markers",
            "x": pack([self.x[c] for c in channels]),
            "y": pack([self.y[c] for c in channels]),
            "customdata": pack(rows, columns=3 if extra is None else 5),
            "hovertemplate": HOVER if extra is None else HOVER_CLUSTER,
            **trace,
        }


def range_scatter(
    site: Any,
    *,
    scale: Scale,
    limits: tuple[float, float, float, float],
    view: Any = None,
    outliers: Sequence[int] = (),
    selected: int | None = None,
    revision: str = "",
) -> Figure:
    """Draw every channel of one site as a point, x = minimum and y = maximum; coloured by cluster when `view` is given.

    Args:
        site: low, high [C] float32 in activation units.
        limits: axis bounds in activation units, from `limits_of`.
        outliers: channels to mark; without clusters only.
        revision: zoom is kept while this stays the same.
    """
    low, high = site.low.tolist(), site.high.tolist()
    cloud = _Cloud(low, high, scale.map(low), scale.map(high))
    few = view is not None and label_count(view) <= CLUSTER_COUNT
    of = "average " if site.is_average else ""
    if view is None:
        traces = _plain_points(cloud, set(outliers))
    else:
        traces = _boxes(view, cloud) + (_few_clusters(view, cloud) if few else [_many_clusters(view, cloud)])
    chosen = [selected] if selected is not None and selected < len(low) else []
    traces.append(cloud.trace(chosen, marker=CURSOR, hoverinfo="skip", hovertemplate=None, showlegend=False))
    return {
        "data": traces,
        "layout": layout(
            uirevision=revision,
            caption=texts.POINTS_CLUSTERED if view is not None else texts.POINTS_AVERAGED if site.is_average else texts.POINTS,
            margin=(62, 14, 34, 48),
            xaxis=scale.axis(limits[0], limits[1], title=f"{of}channel minimum"),
            yaxis=scale.axis(limits[2], limits[3], title=f"{of}channel maximum"),
            showlegend=view is None or few,
        ),
    }


def _plain_points(cloud: _Cloud, outliers: set[int]) -> list[Figure]:
    ordinary = [c for c in range(len(cloud.low)) if c not in outliers]
    quiet = {"color": "@points", "size": 6, "opacity": 0.6}
    loud = {"color": "@alert", "size": 10, "symbol": "diamond", "line": {"color": "@panel", "width": 1}}
    traces = [cloud.trace(ordinary, name=f"{len(ordinary):,} channels", marker=quiet)]
    if outliers:
        name = f"{len(outliers)} of the model's widest"
        hover = HOVER.replace("</b>", "</b> · one of the widest")
        traces.append(cloud.trace(sorted(outliers), name=name, marker=loud, hovertemplate=hover))
    return traces


def _few_clusters(view: Any, cloud: _Cloud) -> list[Figure]:
    groups, count, traces = groups_of(view), label_count(view), []
    extra = {c: (label, cluster.scale) for label, cluster, channels in groups for c in channels}
    for index in range(count):
        channels = [c for label, _, members in groups if label == index for c in members]
        marker = {"color": cluster_colour(index, count), "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7, "opacity": 0.85}
        traces.append(cloud.trace(channels, extra, name=f"{index}", legendgroup=f"{index}", marker=marker))
    return traces


def _many_clusters(view: Any, cloud: _Cloud) -> Figure:
    extra = {c: (label, cluster.scale) for label, cluster, channels in groups_of(view) for c in channels}
    bar = {"title": {"text": "cluster, narrow → wide", "side": "right"}, "thickness": 8, "outlinewidth": 0}
    marker = {"color": pack(view.labels.tolist()), "colorscale": "@ordered", "cmin": 0, "cmax": label_count(view) - 1}
    return cloud.trace(
        range(len(cloud.low)), extra, name="channels", marker=marker | {"size": 6, "opacity": 0.9, "colorbar": bar}
    )


def _boxes(view: Any, cloud: _Cloud) -> list[Figure]:
    """Draw a rectangle around each cluster's points; those of one colour in one trace."""
    count = label_count(view)
    few = count <= CLUSTER_COUNT
    outlines: dict[int, tuple[list[float | None], list[float | None]]] = {}
    for label, _, channels in groups_of(view):
        x, y = [cloud.x[c] for c in channels], [cloud.y[c] for c in channels]
        left, right, bottom, top = min(x), max(x), min(y), max(y)
        xs, ys = outlines.setdefault(label if few else 0, ([], []))
        xs += [left, right, right, left, left, None]
        ys += [bottom, bottom, top, top, bottom, None]
    traces = []
    for label, (xs, ys) in sorted(outlines.items()):
        trace = {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "hoverinfo": "skip", "showlegend": False}
        if few:
            colour = cluster_colour(label, count)
            line = {"color": colour, "width": 1}
            trace |= {"fill": "toself", "fillcolor": colour, "opacity": 0.22, "line": line, "legendgroup": f"{label}"}
        else:
            trace |= {"line": {"color": "@muted", "width": 0.8}, "opacity": 0.6}
        traces.append(trace)
    return traces


def heatmap(matrix: Any, *, kind_label: str, layer: int | None = None, channel: int | None = None, revision: str = "") -> Figure:
    """Draw the largest absolute value by layer and channel, log10; for wide sites the maximum of neighbouring channels.

    Args:
        matrix: [L, C] float32, log10 of the absolute maximum.
    """
    rows, width, step = binned(matrix)
    flat = [v for row in rows for v in row]
    columns = len(rows[0])
    floor, top = percentile(flat, 0.02), max(flat)
    ticks = list(range(math.floor(floor), math.ceil(top) + 1))
    trace = {
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
        "hovertemplate": "<b>layer %{y}, channel %{x:.0f}</b><br>|value| up to %{customdata:.4~g}<extra></extra>",
        "colorbar": {
            "tickvals": ticks,
            "ticktext": [number(10.0**t, 1) for t in ticks],
            "thickness": 8,
            "outlinewidth": 0,
            "len": 1.0,
        },
    }
    shapes = []
    if layer is not None:
        shapes.append(
            {
                "type": "rect",
                "x0": -0.5,
                "x1": width - 0.5,
                "y0": layer - 0.5,
                "y1": layer + 0.5,
                "line": {"color": "@alert", "width": 1.5},
            }
        )
    if channel is not None and layer is not None:
        shapes.append(
            {
                "type": "line",
                "x0": channel,
                "x1": channel,
                "y0": -0.5,
                "y1": len(rows) - 0.5,
                "line": {"color": "@alert", "width": 1},
            }
        )
    every = 5 if len(rows) > 12 else 1
    title = "channel" + (f" ({step} per column, the largest shown)" if step > 1 else "")
    return {
        "data": [trace],
        "layout": layout(
            uirevision=revision,
            caption=f"largest |value| of every channel of {kind_label}, layer by layer",
            margin=(48, 10, 34, 42),
            shapes=shapes,
            xaxis={"title": {"text": title}, "showgrid": False, "range": [-0.5, width - 0.5]},
            yaxis={"title": {"text": "layer"}, "showgrid": False, "range": [-0.5, len(rows) - 0.5], "dtick": every},
        ),
    }


def binned(matrix: Any, most: int = HEAT_COLUMNS) -> tuple[list[list[float]], int, int]:
    """Replace neighbouring columns of [L, C] by their maximum, so that `most` are left. Returns: (rows, C, columns in one)."""
    width, rows = matrix.shape[1], matrix.tolist()
    step = -(-width // most)
    if step > 1:
        rows = [[max(row[i : i + step]) for i in range(0, width, step)] for row in rows]
    return rows, width, step


def percentile(values: list[float], share: float) -> float:
    """Return the value that a share of all values, 0 to 1, lies below."""
    return sorted(values)[int(share * (len(values) - 1))]


def channel_histogram(detail: Any, levels: Sequence[float] = (), caption: str = "") -> Figure:
    """Draw how often the channel has which value; counts on a logarithmic axis, so that rare extremes stay visible.

    Args:
        levels: of a grid, in units of the values: a line for each that is near them.
    """
    edges, counts = list(detail.edges), list(detail.counts)
    middle = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    bars = {
        "type": "bar",
        "x": pack(middle),
        "y": [c or None for c in counts],
        "width": pack(widths),
        "marker": {"color": "@points"},
        "hovertemplate": "%{y:,} values near %{x:.4~g}<extra></extra>",
    }
    lines = [
        {
            "type": "line",
            "x0": v,
            "x1": v,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": "@alert", "width": 1.5, "dash": "dot"},
        }
        for v in (detail.low, detail.high)
    ]
    top, room = max(counts, default=1), 0.04 * ((detail.high - detail.low) or 1.0)
    shown = [level for level in levels if detail.low - room <= level <= detail.high + room]
    grid = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for level in shown for x in (level, level, None)],
        "y": [y for _ in shown for y in (0.7, max(top, 1), None)],
        "line": {"color": "@run3", "width": 2},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return {
        "data": [bars, grid] if shown else [bars],
        "layout": layout(
            uirevision=f"{detail.site}/{detail.channel}",
            caption=caption,
            margin=(48, 10, 8, 40),
            bargap=0,
            shapes=lines,
            xaxis={"title": {"text": "value"}, "range": [detail.low - room, detail.high + room]},
            yaxis={"title": {"text": "count"}, "type": "log", "dtick": 1},
        ),
    }

"""Charts of clusterings: strips before and after reordering, error by cluster count; pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.view import texts_groups as texts
from app.view.figure import Figure, Scale, cluster_colour, layout, log_axis, pack

STRIP_COLUMNS = 512
CORNER = {"orientation": "v", "xref": "paper", "x": 1, "xanchor": "right", "yref": "paper", "y": 1}
"""Place of a legend over the corner that a falling curve leaves empty."""


def groups_of(view: Any) -> list[tuple[int, Any, list[int]]]:
    """List (label, cluster, its channels) of every cluster. Labels count inside a head, so several clusters may share one."""
    order, offsets, labels = view.order.tolist(), view.offsets.tolist(), view.labels.tolist()
    members = [order[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    return [(labels[channels[0]], cluster, channels) for cluster, channels in zip(view.clusters, members, strict=True)]


def label_count(view: Any) -> int:
    """Count the clusters of a head, or of the whole site: the number of colours."""
    return 1 + int(view.labels.max())


def reorder_strips(view: Any, *, scale: Scale, revision: str = "") -> Figure:
    """Draw two strips of bars from minimum to maximum: channels in the model's order, and in the order of their clusters.

    In the lower strip, the outline of each cluster is the one range by which all its channels are quantised.
    """
    low, high, labels, count = view.low.tolist(), view.high.tolist(), view.labels.tolist(), label_count(view)
    order, width = view.order.tolist(), len(view.low)
    before = strip(range(width), low, high, labels, count, scale, axis="y2")
    after = strip(order, low, high, labels, count, scale, axis="y")
    offsets = view.offsets.tolist()
    xs, tops, bottoms = [], [], []
    for cluster, start, end in zip(view.clusters, offsets, offsets[1:], strict=False):
        xs += [start - 0.5, end - 0.5]
        tops += [scale(cluster.high)] * 2
        bottoms += [scale(cluster.low)] * 2
    outline = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": pack(xs),
            "y": pack(ys),
            "line": {"color": "@ink", "width": 1.4},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        for ys in (tops, bottoms)
    ]
    y = scale.axis(float(view.low.min()), float(view.high.max()), title="")
    captions = [
        caption("before: in the model's order", 0, 1.0),
        caption("after: sorted by cluster; the line is a cluster's one range", 0, 0.46),
    ]
    frame = layout(
        uirevision=revision,
        margin=(56, 10, 26, 42),
        barmode="overlay",
        bargap=0,
        annotations=captions,
        xaxis={"title": {"text": "position of the channel"}, "range": [-0.5, width - 0.5], "anchor": "y", "showgrid": False},
        yaxis=y | {"domain": [0, 0.45]},
        yaxis2=y | {"domain": [0.55, 1.0], "anchor": "x", "matches": "y"},
    )
    return {"data": [before, after, *outline], "layout": frame}


def caption(text: str, x: float, y: float) -> Figure:
    """Write a line above one of several plots of a chart. Args: x, y: its lower left corner, 0 to 1 over all plots."""
    place = {"xref": "paper", "yref": "paper", "x": x, "xanchor": "left", "y": y, "yanchor": "bottom"}
    return {"name": "caption", "text": text, "showarrow": False, "font": {"size": 12, "color": "@muted"}} | place


def strip(
    order: Iterable[int], low: list[float], high: list[float], labels: list[int], count: int, scale: Scale, *, axis: str
) -> Figure:
    """Draw the bars of one strip; where channels outnumber pixels, neighbours share a bar, coloured by the widest."""
    order = list(order)
    step = -(-len(order) // STRIP_COLUMNS)
    x, base, length, colour, data = [], [], [], [], []
    for start in range(0, len(order), step):
        group = order[start : start + step]
        widest = max(group, key=lambda c: high[c] - low[c])
        a, b = scale(min(low[c] for c in group)), scale(max(high[c] for c in group))
        x.append(start + (len(group) - 1) / 2)
        base.append(a)
        length.append(b - a)
        colour.append(labels[widest])
        data += [widest, low[widest], high[widest], labels[widest]]
    tokens = [cluster_colour(label, count) for label in range(count)]  # plotly warns for each bar about numbers on a colour scale
    return {
        "type": "bar",
        "x": pack(x),
        "base": pack(base),
        "y": pack(length),
        "width": step,
        "marker": {"color": [tokens[label] for label in colour], "line": {"width": 0}},
        "yaxis": axis,
        "showlegend": False,
        "customdata": pack(data, columns=4),
        "hovertemplate": "<b>channel %{customdata[0]}</b> · cluster %{customdata[3]}"
        "<br>%{customdata[1]:.4~g} to %{customdata[2]:.4~g}<extra></extra>",
    }


def error_curve(curve: Any, *, current: int, error: float, revision: str = "") -> Figure:
    """Draw the squared error relative to one grid for the whole tensor, by cluster count; a marker at the current count."""
    here = {
        "type": "scatter",
        "mode": "markers",
        "x": [current],
        "y": [error],
        "name": texts.HERE.format(current),
        "marker": {"size": 14, "symbol": "diamond", "color": "@alert", "line": {"color": "@panel", "width": 1.5}},
        "hovertemplate": "now: g = %{x}, %{y:.3~g}<extra></extra>",
    }
    figure = _curves(curve, "of the error", texts.CURVE_CAPTION, "error, one grid = 1", revision)
    figure["data"].append(here)
    figure["layout"]["legend"] |= CORNER
    for trace in figure["data"]:  # the corner has room for three
        trace["showlegend"] = trace["name"] in (texts.KMEANS, texts.EQUAL, here["name"])
    return figure


def cost_curve(curve: Any, *, revision: str = "") -> Figure:
    """Draw the predicted divergence by cluster count, between that of one grid for the tensor and that of one per channel."""
    figure = _curves(curve, "nats", texts.NATS_CAPTION, "nats", revision)
    figure["data"].insert(0, _level(curve, curve.per_tensor, texts.PER_TENSOR, "dash"))
    return figure


def _curves(curve: Any, unit: str, caption: str, title: str, revision: str) -> Figure:
    """Draw the lines of both groupings, the level of one grid per channel, and the knee."""
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(curve.g),
            "y": list(errors),
            "line": {"color": colour, "width": 2, "dash": dash},
            "marker": {"size": 6, "symbol": symbol},
            "name": name,
            "hovertemplate": f"{name}<br>g = %{{x}}: %{{y:.3~g}} {unit}<extra></extra>",
        }
        for name, errors, colour, dash, symbol in (
            (texts.KMEANS, curve.kmeans, "@run1", "solid", "circle"),
            (texts.EQUAL, curve.equal, "@run2", "dot", "square-open"),
        )
    ]
    traces = [_level(curve, curve.per_channel, texts.PER_CHANNEL, "dot"), *lines]
    if curve.knee is not None:
        ring = {"size": 15, "symbol": "circle-open", "color": "@ink", "line": {"width": 2}}
        at = {"x": [curve.knee], "y": [curve.kmeans[curve.g.index(curve.knee)]], "name": texts.KNEE.format(curve.knee)}
        traces.append({"type": "scatter", "mode": "markers", "marker": ring, "hoverinfo": "skip"} | at)
    return {
        "data": traces,
        "layout": layout(
            uirevision=revision,
            caption=caption,
            margin=(60, 12, 34, 44),
            showlegend=True,
            xaxis={
                "type": "log",
                "title": {"text": "clusters g"},
                "tickmode": "array",
                "tickvals": list(curve.g),
                "ticktext": [str(g) for g in curve.g],
            },
            yaxis=log_axis((*curve.kmeans, *curve.equal, curve.per_channel), title),
        ),
    }


def _level(curve: Any, value: float, name: str, dash: str) -> Figure:
    """Draw a level that does not depend on the cluster count."""
    line = {"color": "@muted", "dash": dash, "width": 1.5}
    ends = {"x": [curve.g[0], curve.g[-1]], "y": [value] * 2}
    return {"type": "scatter", "mode": "lines", "name": name, "line": line, "hoverinfo": "skip"} | ends

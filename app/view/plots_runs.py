"""Charts of quantised runs: error per layer, bytes by part; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from app.view.figure import BELOW, RUN_COLOURS, Figure, axis_name, bytes_text, layer_map, layout, legend_name

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKS = ("circle", "square", "diamond", "triangle-up", "x")
PARTS = {
    "decoder weights (float)": ("@part0", ""),
    "packed weights": ("@part3", "x"),
    "scales and zero points": ("@part4", "\\"),
    "embeddings and head (float)": ("@part1", "/"),
    "norms, biases and orders": ("@part2", "."),
}
"""Colour and pattern of every part that `core.evaluation.memory` counts: the same in all charts."""


def run_colour(index: int) -> str:
    """Return the colour token of the run at that place: 0 is the base model, grey; then blue, orange, and so on."""
    return "@base" if index == 0 else f"@run{(index - 1) % RUN_COLOURS + 1}"


def drawable(decibels: float | None) -> float | None:
    """Return a finite number or None: a chart cannot show the infinite decibels of an exact result."""
    return decibels if decibels is not None and math.isfinite(decibels) else None


def layer_sqnr(reports: Sequence[tuple[int, str, Any]], *, revision: str = "") -> Figure:
    """Draw the signal-to-noise ratio of every layer's output, one line per run.

    Args:
        reports: (colour place, name, QuantizeReport) of each run. A long name is cut; the pointer shows the run's label in full.
    """
    traces, fallbacks = [], 0
    for place, name, report in reports:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": legend_name(name),
                "x": [entry.layer for entry in report.layers],
                "y": [drawable(entry.output_sqnr_db) for entry in report.layers],
                "line": {"color": run_colour(place), "width": 2, "dash": DASHES[(place - 1) % 5]},
                "marker": {"size": 6, "symbol": MARKS[(place - 1) % 5]},
                "meta": axis_name(report.label),
                "hovertemplate": "layer %{x}: %{y:.1f} dB<br>%{meta}<extra></extra>",
            }
        )
        fallen = [entry for entry in report.layers if any(w.fallback for w in entry.weights.values())]
        if fallen:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "fell back to round-to-nearest",
                    "legendgroup": "fallback",
                    "showlegend": not fallbacks,
                    "x": [e.layer for e in fallen],
                    "y": [drawable(e.output_sqnr_db) for e in fallen],
                    "marker": {"size": 14, "symbol": "x-open", "color": "@alert", "line": {"width": 2}},
                    "hoverinfo": "skip",
                }
            )
            fallbacks += 1
    return {
        "data": traces,
        "layout": layout(
            uirevision=revision,
            caption="output of each layer: signal to rounding noise",
            margin=(56, 12, 34, 44),
            legend=BELOW,
            showlegend=True,
            xaxis={"title": {"text": "layer"}, "dtick": 5 if traces and len(traces[0]["x"]) > 12 else 1},
            yaxis={"title": {"text": "SQNR (dB)"}},
        ),
    }


def site_sqnr(report: Any, kinds: Sequence[tuple[str, str]]) -> Figure:
    """Draw the signal-to-noise ratio by layer and activation site as a heat map of one run.

    Args:
        kinds: (site kind, label) in display order.
    """
    rows = {
        label: [drawable(entry.sites[k].sqnr_db) if k in entry.sites else None for entry in report.layers]
        for k, label in kinds
        if any(k in entry.sites for entry in report.layers)
    }
    return layer_map(
        rows,
        unit="dB",
        hover="%{z:.1f} dB",
        caption="activations of each layer: signal to rounding noise",
        revision="sites",
        left=110,
        reversescale=True,
    )


def bytes_bars(runs: Sequence[tuple[str, dict[str, int], float | None]]) -> Figure:
    """Draw the measured bytes of each run by part, stacked; a hollow diamond is the formula's estimate.

    Args:
        runs: (name, bytes by part, estimated bytes or None), in display order.
    """
    names = [name for name, _, _ in runs]
    given = dict.fromkeys(part for _, by_part, _ in runs for part in by_part)
    parts = sorted(given, key=lambda part: [*PARTS, part].index(part))
    most = max((sum(by_part.values()) for _, by_part, _ in runs), default=1)
    traces: list[Figure] = []
    for part in parts:
        colour, shape = PARTS.get(part, ("@part5", "-"))
        sizes = [by_part.get(part, 0) for _, by_part, _ in runs]
        pattern = {"shape": shape, "size": 5, "solidity": 0.2, "fillmode": "overlay"}
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": part,
                "y": names,
                "x": [s / 1e6 for s in sizes],
                "marker": {
                    "color": colour,
                    "line": {"color": "@panel", "width": 1},
                    "pattern": pattern,
                },
                "text": [bytes_text(s) if s > 0.07 * most else "" for s in sizes],
                "textposition": "inside",
                "insidetextanchor": "start",
                "textangle": 0,
                "customdata": [bytes_text(s) for s in sizes],
                "hovertemplate": "%{fullData.name}: %{customdata}, measured<extra>%{y}</extra>",
            }
        )
    estimates = [(name, value) for name, _, value in runs if value]
    if estimates:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "formula's estimate",
                "y": [n for n, _ in estimates],
                "x": [v / 1e6 for _, v in estimates],
                "customdata": [bytes_text(v) for _, v in estimates],
                "marker": {"symbol": "diamond-open", "size": 13, "color": "@ink", "line": {"width": 2}},
                "hovertemplate": "about %{customdata} by the formula<extra>%{y}</extra>",
            }
        )
    return {
        "data": traces,
        "layout": layout(
            uirevision="bytes",
            caption="bytes of each model, counted on its tensors",
            margin=(12, 14, 34, 44),
            legend=BELOW,
            barmode="stack",
            bargap=0.35,
            uniformtext={"minsize": 11, "mode": "hide"},
            showlegend=True,
            xaxis={"title": {"text": "MB"}, "rangemode": "tozero"},
            yaxis={"automargin": True, "autorange": "reversed"},
        ),
    }

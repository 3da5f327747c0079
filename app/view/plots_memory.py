"""Charts of projected memory and of the roofline: pure functions from projections to figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from app.view import texts_memory as texts
from app.view.figure import BELOW, Figure, bytes_text, layout, number, seconds_text
from app.view.memory import in_unit
from core.evaluation.memory import MemoryEstimate
from core.evaluation.roofline import GPU, Operator


def memory_bars(estimates: Sequence[MemoryEstimate]) -> Figure:
    """Draw projected memory by part for several schemes, with outlined bars, because nothing here is measured.

    Args:
        estimates: of one place, in display order.
    """
    names = [cell.scheme for cell in estimates]
    traces = []
    for part, label, colour, shape in (
        ("weights", "weights", "@part0", ""),
        ("kv_cache", "KV cache", "@part1", "/"),
        ("activations", "activations", "@part2", "."),
    ):
        sizes = [float(getattr(e, part)) for e in estimates]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label,
                "y": names,
                "x": [s / 1e9 for s in sizes],
                "opacity": 0.75,
                "marker": {
                    "color": colour,
                    "line": {"color": colour, "width": 1.5},
                    "pattern": {"shape": shape, "size": 6, "solidity": 0.3},
                },
                "customdata": [bytes_text(s) for s in sizes],
                "hovertemplate": "%{fullData.name}: about %{customdata}<extra>%{y}</extra>",
            }
        )
    totals = [float(e.total) for e in estimates]
    traces.append(
        {
            "type": "scatter",
            "mode": "text",
            "y": names,
            "x": [t / 1e9 for t in totals],
            "text": [f" ≈ {bytes_text(t)}" for t in totals],
            "textposition": "middle right",
            "showlegend": False,
            "hoverinfo": "skip",
            "cliponaxis": False,
        }
    )
    top = max(totals, default=1.0) / 1e9
    return {
        "data": traces,
        "layout": layout(
            uirevision="memory",
            caption=texts.BARS_CAPTION,
            margin=(12, 20, 34, 42),
            barmode="stack",
            bargap=0.3,
            showlegend=True,
            xaxis={"title": {"text": "GB, by formula"}, "range": [0, top * 1.35]},
            yaxis={"automargin": True, "autorange": "reversed"},
        ),
    }


def memory_map(cells: Sequence[MemoryEstimate], chosen: MemoryEstimate, unit: str) -> Figure:
    """Draw memory by batch and sequence length as a heat map in which the chosen place is marked.

    Args:
        cells: of one scheme, at every batch and sequence length. unit: of `texts.UNITS`.
    """
    columns = [_thousands(s) for s in dict.fromkeys(cell.sequence for cell in cells)]
    rows = [str(b) for b in dict.fromkeys(cell.batch for cell in cells)]
    width = len(columns)
    shown = [cells[start : start + width] for start in range(0, len(cells), width)]
    square = {"symbol": "square-open", "size": 24, "color": "@alert", "line": {"width": 2}}
    return {
        "data": [
            {
                "type": "heatmap",
                "x": columns,
                "y": rows,
                "z": [[math.log10(cell.total) for cell in row] for row in shown],
                "text": [[in_unit(cell.total, unit, 3) for cell in row] for row in shown],
                "texttemplate": "%{text}",
                "textfont": {"size": 10},
                "colorscale": "@heat",
                "showscale": False,
                "hovertemplate": f"batch %{{y}}, %{{x}} tokens: about %{{text}} {unit}<extra></extra>",
            },
            {
                "type": "scatter",
                "mode": "markers",
                "x": [_thousands(chosen.sequence)],
                "y": [str(chosen.batch)],
                "marker": square,
                "hoverinfo": "skip",
            },
        ],
        "layout": layout(
            uirevision="memory-map",
            caption=texts.MAP_CAPTION.format(scheme=chosen.scheme, unit=unit),
            margin=(44, 10, 34, 42),
            xaxis={"title": {"text": "tokens per sequence"}, "type": "category", "showgrid": False},
            yaxis={"title": {"text": "batch"}, "type": "category", "showgrid": False},
        ),
    }


def _thousands(sequence: int) -> str:
    return f"{sequence // 1024}k" if sequence % 1024 == 0 else f"{sequence:,}"


def _grouped(operators: Sequence[Operator]) -> list[str]:
    """Label points: where several lie close together, the first names all of them and the others none."""
    places = [round(8 * math.log10(op.intensity)) for op in operators]
    names = {place: ", ".join(op.name for op, own in zip(operators, places, strict=True) if own == place) for place in places}
    return [names.pop(place, "") for place in places]


def roofline(phases: dict[str, Sequence[Operator]], gpu: GPU, scheme: str) -> Figure:
    """Draw operators below the roofs of a GPU: the reachable rate over the arithmetic intensity, both on log axes.

    Args:
        phases: operators by phase.
    """
    found = [op for operators in phases.values() for op in operators]
    low, high = min(op.intensity for op in found) / 2, max(*(op.intensity for op in found), 2000.0) * 2
    traces: list[Figure] = []
    for dash, rate in zip(("solid", "dash", "dot"), sorted({gpu.rate(op.bits) for op in found}), strict=False):
        knee = rate / gpu.bandwidth
        line = {"color": "@muted", "width": 1.5, "dash": dash}
        xs, name = [low, max(low, knee), high], f"{number(rate / 1e12)} T/s"
        ys = [min(rate, x * gpu.bandwidth) / 1e12 for x in xs]
        traces.append({"type": "scatter", "mode": "lines", "name": name, "x": xs, "y": ys, "line": line, "hoverinfo": "skip"})
    marks = (("circle-open", "@run1", "bottom right"), ("diamond-open", "@run2", "top center"))
    for (phase, operators), (symbol, colour, side) in zip(phases.items(), marks, strict=True):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": texts.PHASES[phase],
                "x": [op.intensity for op in operators],
                "y": [op.flops / op.seconds(gpu) / 1e12 for op in operators],
                "text": _grouped(operators),
                "textposition": side,
                "textfont": {"size": 10},
                "marker": {"symbol": symbol, "size": 10, "color": colour, "line": {"width": 2}},
                "customdata": [[op.name, seconds_text(op.seconds(gpu)), op.bound(gpu)] for op in operators],
                "hovertemplate": "%{customdata[0]}: %{x:.3s} FLOPs per byte<br>%{customdata[1]} at the least, bound by "
                "%{customdata[2]}<extra>%{fullData.name}</extra>",
            }
        )
    return {
        "data": traces,
        "layout": layout(
            uirevision="roofline",
            caption=texts.ROOF_CAPTION.format(scheme=scheme, gpu=gpu.name),
            margin=(56, 12, 34, 44),
            legend=BELOW,
            showlegend=True,
            xaxis={"title": {"text": "FLOPs per byte"}, "type": "log"},
            yaxis={"title": {"text": "10¹² FLOPs per second"}, "type": "log"},
        ),
    }

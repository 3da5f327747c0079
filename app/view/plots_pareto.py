"""Chart of measured runs: bytes against divergence, with the frontier of the best; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from app.view import texts_divergence as texts
from app.view.figure import Figure, axis_name, bytes_text, layout, log_axis
from app.view.plots_runs import DASHES, MARKS, run_colour
from app.view.tables import Measured, with_error

AXES = {"weight_bytes": ("weights, MB measured", 1e6), "kv_bytes_per_token": ("KV cache, kB per token measured", 1e3)}
"""Title of the axis of each size, and the bytes of its unit."""


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """List the points (bytes, divergence) that no other point beats in both, by growing bytes."""
    best: list[tuple[float, float]] = []
    for size, kld in sorted(points):
        if not best or kld < best[-1][1]:
            best.append((size, kld))
    return best


def pareto(runs: Sequence[Measured], size: str) -> Figure:
    """Draw runs as points of bytes and divergence from their float model; each float model's runs have a frontier of their own.

    Args:
        runs: with divergences, measured by one protocol. size: a key of `AXES`.
    """
    title, unit = AXES[size]
    runs = sorted(runs, key=lambda run: run.report.kld_mean)
    sizes = [getattr(run.report, size) for run in runs]
    klds = [run.report.kld_mean for run in runs]
    traces: list[Figure] = []
    for index, reference in enumerate(dict.fromkeys(run.report.reference for run in runs)):
        group = [(s / unit, k) for run, s, k in zip(runs, sizes, klds, strict=True) if run.report.reference == reference]
        best = frontier(group)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for x, _ in best],
                "y": [y for _, y in best],
                "line": {"color": "@muted", "width": 1.5, "shape": "hv", "dash": DASHES[index % len(DASHES)]},
                "hoverinfo": "skip",
            }
        )
    told = [
        f"<b>{axis_name(run.name, 40)}</b><br>{with_error(run.report.kld_mean, run.report.kld_stderr)} nats<br>{bytes_text(s)}"
        for run, s in zip(runs, sizes, strict=True)
    ]
    errors = {"type": "data", "array": [run.report.kld_stderr or 0.0 for run in runs], "color": "@muted", "thickness": 1.2}
    marker = {
        "size": 11,
        "color": [run_colour(run.place) for run in runs],
        "symbol": [MARKS[(run.place - 1) % len(MARKS)] for run in runs],
    }
    points = {"type": "scatter", "mode": "markers", "x": [s / unit for s in sizes], "y": klds, "marker": marker}
    traces.append(points | {"error_y": errors, "text": told, "hovertemplate": "%{text}<extra></extra>"})
    nats = "KLD, nats"
    return {
        "data": traces,
        "layout": layout(
            uirevision=size,
            caption=texts.PARETO_CAPTION,
            xaxis={"title": {"text": title}},
            yaxis=log_axis(klds, nats) if min(klds, default=0.0) > 0 else {"type": "linear", "title": {"text": nats}},
        ),
    }

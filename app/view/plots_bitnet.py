"""Charts of ternary models: zeros, weights, inputs and their codes, training curves; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.view import texts
from app.view.figure import BELOW, Figure, layer_map, layout, number, pack
from app.view.plots_runs import DASHES

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
WEIGHTS = (("minus", "−1", "@part0", "/"), ("zero", "0", "@faint", ""), ("plus", "+1", "@part2", "\\"))
MODE_COLOURS = {"fp": "@base", "w1.58a8": "@run1", "a4.8": "@run2", "a4.8-fp4": "@run3", "int4": "@run4", "fp4": "@run5"}


def sparsity_map(report: Any) -> Figure:
    """Draw the share of zero codes by layer and projection."""
    return layer_map(
        {label: [100 * getattr(layer, name) for layer in report.layers] for name, label in texts.PROJECTION_LABELS.items()},
        unit="%",
        hover="%{z:.1f} % zeros",
        caption="zero codes at the input of every projection",
        revision=f"sparsity/{report.key}",
        left=50,
        zmin=0,
        zmax=100,
    )


def weight_bars(report: Any) -> Figure:
    """Draw the shares of the three weight values of each projection, mean over layers."""
    names = [name for name in PROJECTIONS if name in report.layers[0]]
    traces = []
    for value, label, colour, shape in WEIGHTS:
        by_layer = [[100 * getattr(layer[name], value) for layer in report.layers] for name in names]
        shares = [sum(row) / len(row) for row in by_layer]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label,
                "y": names,
                "x": shares,
                "marker": {
                    "color": colour,
                    "line": {"color": "@panel", "width": 1},
                    "pattern": {"shape": shape, "size": 5, "solidity": 0.2, "fillmode": "overlay"},
                },
                "text": [f"{share:.0f} %" for share in shares],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "customdata": [f"{min(row):.1f} to {max(row):.1f}" for row in by_layer],
                "hovertemplate": "<b>%{y}</b>: %{x:.1f} % are %{fullData.name}<br>%{customdata} % by layer<extra></extra>",
            }
        )
    return {
        "data": traces,
        "layout": layout(
            uirevision=f"weights/{report.key}",
            caption="weights of each projection, mean over layers",
            margin=(42, 12, 34, 44),
            legend=BELOW,
            barmode="stack",
            bargap=0.25,
            showlegend=True,
            xaxis={"title": {"text": "% of the weights"}, "range": [0, 100]},
            yaxis={"autorange": "reversed", "showgrid": False},
        ),
    }


def input_distribution(report: Any, label: str) -> Figure:
    """Draw one projection's input values above and their codes below; both as shares on a logarithmic axis."""
    edges, total = report.edges, sum(report.counts) or 1
    top = {
        "type": "bar",
        "x": pack([(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]),
        "y": [100 * count / total or None for count in report.counts],
        "width": edges[1] - edges[0],
        "marker": {"color": "@points"},
        "yaxis": "y2",
        "xaxis": "x2",
        "hovertemplate": "%{y:.3~g} % near %{x:.3~g}<extra></extra>",
    }
    traces, notes = [top], [_corner(f"<b>{label}</b>", 1.0, "left", size=13)]
    axis = {"type": "log", "dtick": 1, "tickformat": "~g", "nticks": 4}
    frame: dict[str, Any] = {
        "xaxis2": {"title": {"text": "value; end bars: and beyond"}, "anchor": "y2"},
        "yaxis2": axis | {"domain": [0.6, 0.95], "title": {"text": "% of values"}},
    }
    if report.code_values:
        coded = sum(report.code_counts) or 1
        shares = [100 * count / coded for count in report.code_counts]
        zeros = next((s for value, s in zip(report.code_values, shares, strict=True) if value == 0), 0.0)
        traces.append(
            {
                "type": "bar",
                "x": list(report.code_values),
                "y": [share or None for share in shares],
                "marker": {"color": ["@alert" if value == 0 else "@points" for value in report.code_values]},
                "hovertemplate": "code %{x}: %{y:.3~g} %<extra></extra>",
            }
        )
        notes.append(_corner(f"{number(zeros)} % zeros", 0.455, "right", colour="@alert"))
        frame["xaxis"] = {"title": {"text": f"code: {texts.INPUT_KINDS[report.kind]}"}, "anchor": "y"}
        frame["yaxis"] = axis | {"domain": [0, 0.36], "title": {"text": "% of codes"}}
    else:
        notes.append(_corner(texts.INPUT_KINDS["fp"], 0.3, "left"))
        frame |= {"xaxis": {"visible": False}, "yaxis": {"visible": False, "domain": [0, 0.36]}}
    return {
        "data": traces,
        "layout": layout(
            uirevision=f"{report.key}/{report.site}/{report.layer}",
            margin=(52, 8, 6, 44),
            bargap=0.05,
            annotations=notes,
            **frame,
        ),
    }


def _corner(text: str, y: float, side: str, *, size: float = 12, colour: str = "@ink") -> Figure:
    """Draw a note at the left or right edge."""
    place = {"xref": "paper", "yref": "paper", "x": 0 if side == "left" else 1, "xanchor": side, "y": y, "yanchor": "top"}
    return {"text": text, "showarrow": False, "font": {"size": size, "color": colour}, **place}


def training_curves(cards: Sequence[dict[str, Any]]) -> Figure:
    """Draw the training loss of the embedded models; a dotted line marks the switch of input rules.

    Args:
        cards: with mode, architecture and curve, as `training.export` writes them.
    """
    lines, marks = [], []
    for card in cards:
        config, mode = card["config"], str(card.get("mode"))
        name = f"{config.get('architecture', '')} {texts.BITNET_MODES.get(mode, 'full precision').partition(':')[0]}".strip()
        name += ", distilled" if config.get("teacher") else ""
        colour = MODE_COLOURS.get(mode, "@base")
        lines.append((name, card["curve"], colour, DASHES[sum(c == colour for _, _, c, _ in lines) % 5]))
        if config.get("switch"):
            marks.append(config["switch"] * config["tokens"])
    return loss_chart(lines, caption="training loss of the embedded models", revision="training", marks=sorted(set(marks)))


def ablation_curves(runs: Sequence[dict[str, Any]], figure: str) -> Figure | None:
    """Draw the loss curves of the runs for a figure of the paper: "figure4" (number format), "figure5" (input of down)."""
    lines = []
    for run in runs:
        config = run["config"]
        inputs, activation = config.get("inputs") or {}, config.get("activation") or "relu2"
        down = "silu" if activation == "silu" else inputs.get("down_in", "")
        belongs = (
            not inputs and activation == "relu2"
            if figure == "figure4"
            else config["mode"] == "w1.58a8" and down in texts.DOWN_INPUTS
        )
        if not belongs or config.get("switch"):
            continue
        name = texts.BITNET_MODES[config["mode"]] if figure == "figure4" else texts.DOWN_INPUTS[down]
        baseline = config["mode"] == "w1.58a8" and not down
        place = sum(colour != "@base" for _, _, colour, _ in lines)
        colour, dash = ("@base", "solid") if baseline else (f"@run{place % 5 + 1}", DASHES[place % 5])
        lines.append((name if run.get("finished") else f"{name} (stopped)", run["curve"], colour, dash))
    if not lines:
        return None
    what = "number format of the inputs" if figure == "figure4" else "input of the down projection"
    return loss_chart(lines, caption=f"training loss by {what} (as {figure.replace('figure', 'figure ')})", revision=figure)


def loss_chart(
    lines: Sequence[tuple[str, list[dict[str, Any]], str, str]], *, caption: str, revision: str, marks: Sequence[float] = ()
) -> Figure:
    """Draw loss against tokens; lines as (name, points with tokens and loss, colour token, dash)."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [point["tokens"] / 1e6 for point in curve],
            "y": [point["loss"] for point in curve],
            "line": {"color": colour, "width": 2, "dash": dash},
            "hovertemplate": "%{x:.2f} M tokens: %{y:.3f}<extra>%{fullData.name}</extra>",
        }
        for name, curve, colour, dash in lines
    ]
    shapes = [
        {
            "type": "line",
            "x0": m / 1e6,
            "x1": m / 1e6,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": "@alert", "dash": "dot"},
        }
        for m in marks
    ]
    words = {"text": "switch to 4 bits ", "showarrow": False, "font": {"size": 11, "color": "@alert"}}
    notes = [words | {"x": m / 1e6, "xanchor": "right", "y": 1, "yref": "paper", "yanchor": "top"} for m in marks]
    return {
        "data": traces,
        "layout": layout(
            uirevision=revision,
            caption=caption,
            margin=(56, 14, 34, 44),
            legend=BELOW,
            showlegend=True,
            shapes=shapes,
            annotations=notes,
            xaxis={"title": {"text": "million training tokens"}, "rangemode": "tozero"},
            yaxis={"title": {"text": "loss, nats per token"}} | _after_the_start([curve for _, curve, _, _ in lines]),
        ),
    }


def _after_the_start(curves: Sequence[list[dict[str, Any]]]) -> Figure:
    """Return an axis for what follows the first tenth of each training, whose steep fall would leave the rest no room."""
    late = [p["loss"] for curve in curves for p in curve if p["tokens"] >= 0.1 * curve[-1]["tokens"]]
    margin = 0.05 * (max(late, default=0.0) - min(late, default=0.0))
    return {"range": [min(late) - margin, max(late) + margin]} if margin else {}

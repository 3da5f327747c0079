"""Draw a figure as SVG, for files without a script: lines, points and stacked bars, in the light theme.

It draws what `plots_runs` and `plots_pareto` describe; dashes and patterns are left out, as the numbers stand beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from app.view.figure import THEMES, Figure

THEME = THEMES["light"]
WIDTH, RIGHT, TOP, BOTTOM, ROW = 760, 20, 30, 46, 18
NAMES = 210
"""Pixels left of a chart whose rows have names; other charts have `NUMBERS`."""
NUMBERS = 64


@dataclass(frozen=True)
class Axis:
    """A mapping of the values `low` to `high` to the pixels `start` to `end`, by their logarithms if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> Axis:
        """Make an axis that shows all values, and zero if `zero`, with a margin where there is no zero."""
        found = [math.log10(v) if log else v for v in values if not log or v > 0] or [0.0]
        low, high = min(found), max(found)
        pad = 0.06 * (high - low) or 0.5
        return cls(0.0 if zero else low - pad, high + pad, start, end, log)

    def __call__(self, value: float) -> float:
        place = (math.log10(value) if value > 0 else self.low) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """List round values, about six; decades of a logarithmic axis, or 1, 2 and 5 times them where there are few decades."""
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            parts = (1,) if len(decades) > 4 else (1, 2, 5)
            found = [part * 10.0**decade for decade in decades for part in parts]
            shown = [value for value in found if self.low <= math.log10(value) <= self.high]
            return shown if len(shown) > 1 else Axis(10**self.low, 10**self.high, self.start, self.end).ticks()
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def draw(figure: Figure, *, label: str, height: int = 300) -> str:
    """Write a figure as an SVG element. `label`: what it shows, read aloud. Returns: nothing for a figure without content."""
    traces, layout = figure["data"], figure["layout"]
    if not traces:
        return ""
    rows = next((list(t["y"]) for t in traces if t["type"] == "bar"), [])
    named = [t for t in traces if t.get("name") and t.get("showlegend", layout["showlegend"])]
    bottom = height - BOTTOM - (ROW * math.ceil(len(named) / 3) + 6 if named else 0)
    left = NAMES if rows else NUMBERS
    x, y = _axes(traces, layout, rows, (left, WIDTH - RIGHT), (bottom, TOP))
    step = (bottom - TOP) / max(1, len(rows))
    parts = [_frame(layout, x, y, rows, step)]
    ends = [0.0] * len(rows)
    for trace in traces:
        if trace["type"] == "bar":
            parts.append(_bar(trace, x, ends, step))
        else:
            places = {row: TOP + (i + 0.5) * step for i, row in enumerate(rows)}
            parts.append(_scatter(trace, x, lambda value, at=places: at.get(value) if rows else y(value)))
    parts.append(_legend(named, bottom + BOTTOM + 10))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" font-size="12" fill="{THEME["ink"]}">'
        f"{''.join(parts)}</svg>"
    )


def _axes(traces: list, layout: dict, rows: list, across: tuple, up: tuple) -> tuple[Axis, Axis]:
    """Make both axes: of stacked bars the sums count."""
    bars = [t["x"] for t in traces if t["type"] == "bar"]
    xs = [sum(sizes) for sizes in zip(*bars, strict=True)] + [v for t in traces if t["type"] == "scatter" for v in t["x"]]
    ys = [v for t in traces if t["type"] == "scatter" for v in t["y"] if isinstance(v, (int, float))]
    errors = [pair for t in traces if "error_y" in t for pair in zip(t["y"], t["error_y"]["array"], strict=True)]
    ys += [end for value, error in errors for end in (max(value - error, value * 1e-3), value + error)]
    x = Axis.around(xs, *across, zero=bool(bars))
    return x, Axis.around([] if rows else ys, *up, log=layout["yaxis"].get("type") == "log")


def _frame(layout: dict, x: Axis, y: Axis, rows: list, step: float) -> str:
    """Write caption, titles, ticks and names of rows."""
    grid, muted, middle = THEME["grid"], THEME["muted"], (x.start + x.end) / 2
    bottom = y.start
    out = [_text(10, 18, layout.get("title", {}).get("text", ""), colour=muted)]
    for tick in x.ticks():
        place = x(tick)
        out.append(f'<path d="M{place:.1f} {TOP}V{bottom:.1f}" stroke="{grid}"/>')
        out.append(_text(place, bottom + 16, _tick(tick), anchor="middle", colour=muted))
    for tick in [] if rows else y.ticks():
        out.append(f'<path d="M{x.start} {y(tick):.1f}H{x.end}" stroke="{grid}"/>')
        out.append(_text(x.start - 6, y(tick) + 4, _tick(tick), anchor="end", colour=muted))
    for index, row in enumerate(rows):
        lines = str(row).split("<br>")
        at = TOP + (index + 0.5) * step + 4 - 7 * (len(lines) - 1)
        out += [_text(x.start - 8, at + 14 * i, line, anchor="end", written=True) for i, line in enumerate(lines)]
    out.append(_text(middle, bottom + 34, layout.get("xaxis", {}).get("title", {}).get("text", ""), anchor="middle"))
    title = layout["yaxis"].get("title", {}).get("text", "")
    return "".join(out) + (
        f'<g transform="translate(14 {(TOP + bottom) / 2:.0f}) rotate(-90)">{_text(0, 0, title, anchor="middle")}</g>'
    )


def _bar(trace: dict, x: Axis, ends: list[float], step: float) -> str:
    """Write one part of every stacked bar, and move the ends of the bars."""
    out = []
    colour, told = _colour(trace["marker"]["color"]), trace.get("customdata", trace["x"])
    for index, (size, words) in enumerate(zip(trace["x"], told, strict=True)):
        begin, ends[index] = ends[index], ends[index] + size
        width = x(ends[index]) - x(begin)
        at = TOP + (index + 0.18) * step
        shape = f'<rect x="{x(begin):.1f}" y="{at:.1f}" width="{width:.1f}" height="{0.64 * step:.1f}" fill="{colour}"/>'
        out.append(f"<g>{shape}<title>{escape(str(trace['name']))}: {escape(str(words))}</title></g>" if size else "")
    return "".join(out)


def _scatter(trace: dict, x: Axis, y: Any) -> str:
    """Write a line, points, or both."""
    marker, line, out = trace.get("marker", {}), trace.get("line", {}), []
    found = [(x(a), y(b), i) for i, (a, b) in enumerate(zip(trace["x"], trace["y"], strict=True)) if b is not None]
    if "lines" in trace["mode"]:
        path = ""
        for left, top, _ in found:
            path += (
                f"H{left:.1f}V{top:.1f}" if path and line.get("shape") == "hv" else f"{'L' if path else 'M'}{left:.1f} {top:.1f}"
            )
        out.append(f'<path d="{path}" fill="none" stroke="{_colour(line["color"])}" stroke-width="{line.get("width", 2)}"/>')
    for left, top, index in found if "markers" in trace["mode"] else []:
        colours, told = marker.get("color", line.get("color", "@ink")), trace.get("text", trace.get("name", ""))
        colour, words = (v[index] if isinstance(v, list) else v for v in (colours, told))
        if "error_y" in trace:
            value, error = trace["y"][index], trace["error_y"]["array"][index]
            low, high = y(max(value - error, value * 1e-3)), y(value + error)
            out.append(f'<path d="M{left:.1f} {low:.1f}V{high:.1f}" stroke="{THEME["muted"]}"/>')
        hollow = "open" in str(marker.get("symbol", ""))
        fill = f'fill="none" stroke="{_colour(colour)}" stroke-width="2"' if hollow else f'fill="{_colour(colour)}"'
        out.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{marker.get("size", 6) / 2:.1f}" {fill}>{_title(words)}</circle>')
    return "".join(out)


def _legend(traces: list, top: float) -> str:
    out = []
    for index, trace in enumerate(traces):
        left, at = 12 + index % 3 * (WIDTH - 24) / 3, top + index // 3 * ROW
        colour = trace.get("marker", {}).get("color") or trace.get("line", {}).get("color", "@ink")
        out.append(f'<rect x="{left:.0f}" y="{at - 9:.0f}" width="10" height="10" fill="{_colour(colour)}"/>')
        out.append(_text(left + 15, at, trace["name"], written=True))
    return "".join(out)


def _text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "", written: bool = False) -> str:
    """Write a line of text. `written`: whether it is HTML already, as names of runs are."""
    shown = words if written else escape(words)
    paint = f' fill="{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{paint}>{shown}</text>' if words else ""


def _title(words: str) -> str:
    """Write what hovering shows: HTML without its tags."""
    return f"<title>{re.sub('<[^>]*>', '', str(words).replace('<br>', ', '))}</title>" if words else ""


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _colour(token: str) -> str:
    return THEME[token[1:]] if token.startswith("@") else token

"""The common parts of all charts: colours, number formats, axes, and arrays in plotly's form.

A figure is a plain dict of plotly's JSON. Colours that must differ between light and dark are written as tokens
("@ink", "@run1", "@cluster3", …) and replaced in the browser by `chart.js` from `THEMES`; so one figure serves both.

Activation ranges span decades on both sides of zero. Plotly has no axis for that, so values are mapped here:

    s(v) = asinh(v / 2t) / ln 10        about sign(v) log10(|v| / t) where |v| >> t, and linear where |v| << t
"""

from __future__ import annotations

import base64
import math
import textwrap
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Figure = dict[str, Any]
LOG10 = math.log(10.0)

NAME_LINES = 3
ABOVE = {"orientation": "h", "xref": "container", "x": 0.01, "yref": "container", "y": 0.92, "yanchor": "top"}
BELOW = {"orientation": "h", "xref": "container", "x": 0.01, "yref": "container", "y": 0, "yanchor": "bottom"}
"""Places of a legend: rows under the caption or under the chart. `chart.js` makes room for as many rows as the names need."""

CLUSTER_COUNT = 8
"""Number of clusters up to which each has a colour and a symbol; more clusters share an ordered scale."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")

_CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")
_PARTS = ("#4a5f7f", "#7fb0a8", "#c9b068", "#a9799c", "#a5a8ad", "#8a6d5b")
_PARTS_DARK = ("#8ba3c7", "#5d9c92", "#c4a850", "#b684a8", "#7d838c", "#b08f7a")
_RUNS = (
    *("#0072b2", "#d98200", "#009e73", "#b5548a", "#b34700", "#5b3fc4"),
    *("#7c8a00", "#e0115f", "#6a3d12", "#1f97bb", "#8c1ab3", "#33523f"),
)
_RUNS_DARK = (
    *("#4aa8e0", "#f0a830", "#2cc79b", "#e08abb", "#f0643c", "#9d8cff"),
    *("#b9c832", "#ff5c93", "#c59a6d", "#7fe3ff", "#d76bff", "#a9c7b4"),
)
RUN_COLOURS = len(_RUNS)
"""Number of runs with a colour of their own; lines differ in dashes and marks too."""
_CLUSTERS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#6b6b6b")
_CLUSTERS_DARK = ("#3fa7e0", "#f0b429", "#1fc49a", "#e29cc4", "#f07b3a", "#8fd0f5", "#f0e442", "#bdbdbd")

THEMES: dict[str, dict[str, Any]] = {
    "light": {
        "ink": "#1c2430",
        "muted": "#5d6878",
        "faint": "#c3cad4",
        "grid": "#e8ebf0",
        "panel": "#ffffff",
        "base": "#7b8694",
        "alert": "#d55e00",
        "mark": "#b34700",
        "points": "#35506e",
        "heat": [[0, "#dde6ef"], [0.35, "#a9c6de"], [0.7, "#2f77ad"], [1, "#08306b"]],
        "ordered": [[i / 9, c] for i, c in enumerate(_CIVIDIS)],
    },
    "dark": {
        "ink": "#e8ecf2",
        "muted": "#9aa6b5",
        "faint": "#4a5563",
        "grid": "#2a323d",
        "panel": "#161b22",
        "base": "#9aa4b1",
        "alert": "#ff8a4c",
        "mark": "#ff8a4c",
        "points": "#9cc4ea",
        "heat": [[0, "#26323f"], [0.35, "#1f4e79"], [0.7, "#4aa8e0"], [1, "#e3f3ff"]],
        "ordered": [[0, "#3b5c9e"], *[[i / 9, c] for i, c in enumerate(_CIVIDIS) if i > 1]],
    },
}
for _theme, _runs, _clusters, _parts in (
    ("light", _RUNS, _CLUSTERS, _PARTS),
    ("dark", _RUNS_DARK, _CLUSTERS_DARK, _PARTS_DARK),
):
    for _name, _first, _colours in (("run", 1, _runs), ("cluster", 0, _clusters), ("part", 0, _parts)):
        THEMES[_theme].update({f"{_name}{i}": colour for i, colour in enumerate(_colours, _first)})


def pack(values: Iterable[float], *, columns: int = 1, kind: str = "f4") -> dict[str, str]:
    """Pack numbers as plotly's typed array: a quarter of the bytes of a JSON list. `columns` > 1 gives rows of that width."""
    data = values if hasattr(values, "tobytes") else array({"f4": "f", "i4": "i"}[kind], values)
    packed = {"dtype": kind, "bdata": base64.b64encode(data.tobytes()).decode()}
    if columns > 1:
        packed["shape"] = f"{len(data) // columns},{columns}"
    return packed


def number(value: float, digits: int = 3) -> str:
    """Format a number for people: three significant digits, no exponent where it can be avoided, a true minus sign."""
    if value != value or math.isinf(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "undefined"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10**6 or size < 10**-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}·10{_superscript(int(exponent))}"
    elif size >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return text.replace("-", "−")


def _superscript(value: int) -> str:
    return str(value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def axis_name(title: str, characters: int = 28) -> str:
    """Break a run's name into lines short enough for an axis or a legend, escaped."""
    return "<br>".join(escape(line) for line in textwrap.wrap(title, characters, max_lines=NAME_LINES, placeholder="…"))


def legend_name(title: str, characters: int = 32) -> str:
    """Cut a run's name to one line of a legend, escaped; the pointer shows it in full."""
    return escape(title if len(title) <= characters else f"{title[: characters - 1].rstrip()}…")


def bytes_text(count: float) -> str:
    """Format bytes in the largest fitting decimal unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{number(count / size)} {unit}"
    return f"{count:,.0f} B"


def seconds_text(seconds: float) -> str:
    """Format a duration for people: "3 min 20 s", "1.2 s", "12.5 ms"."""
    if seconds < 0.1:
        unit, size = ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
        return f"{number(seconds / size)} {unit}"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


@dataclass(frozen=True)
class Scale:
    """A mapping from activation units to chart coordinates.

    Attributes:
        threshold: t of the formula above, in activation units; None for a linear axis.
    """

    threshold: float | None = None

    @classmethod
    def fit(cls, values: Sequence[float], *, linear: bool = False) -> Scale:
        """Choose a linear mapping, or a symmetric-log one with t a power of ten that a tenth of the values lie below."""
        sizes = sorted(abs(v) for v in values if v)
        if linear or not sizes:
            return cls(None)
        return cls(10.0 ** math.floor(math.log10(max(sizes[len(sizes) // 10], sizes[-1] * 1e-6, 1e-30))))

    def __call__(self, value: float) -> float:
        return value if self.threshold is None else math.asinh(value / (2 * self.threshold)) / LOG10

    def map(self, values: Iterable[float]) -> list[float]:
        """Convert values to chart coordinates."""
        if self.threshold is None:
            return list(values)
        factor, asinh = 0.5 / self.threshold, math.asinh
        return [asinh(v * factor) / LOG10 for v in values]

    def axis(self, low: float, high: float, *, title: str, margin: float = 0.05) -> dict[str, Any]:
        """Return the layout of an axis that shows [low, high] (activation units) with tick texts in activation units."""
        a, b = self(low), self(high)
        pad = (b - a) * margin or 1.0
        axis = {"title": {"text": title}, "range": [a - pad, b + pad], "zeroline": True}
        if self.threshold is not None:
            ticks = self.ticks(low, high)
            axis |= {"tickmode": "array", "tickvals": self.map(ticks), "ticktext": [number(t, 1) for t in ticks]}
        return axis

    def ticks(self, low: float, high: float) -> list[float]:
        """List ticks: zero and decades on both sides, about nine at most; where fewer than three fit, 2 and 5 times them too."""
        decades = []
        top = max(abs(low), abs(high))
        while self.threshold and self.threshold * 10 ** len(decades) <= top * 1.0001:
            decades.append(self.threshold * 10 ** len(decades))
        if len(decades) > 2:
            decades = decades[1:]  # t itself would be too close to zero
        signed = [-d for d in decades if -d >= low] + [d for d in decades if d <= high]
        if len(signed) > 9:
            decades = decades[len(decades) % 2 - 1 :: 2]
            signed = [-d for d in decades if -d >= low] + [d for d in decades if d <= high]
        found = sorted({*signed, 0.0} if low <= 0 <= high else signed)
        if self.threshold and sum(low <= t <= high for t in found) < 3:
            steps = [d * m for d in (self.threshold / 10, *decades, self.threshold) for m in (1, 2, 5)]
            found = sorted({*found, *(t for d in steps for t in (-d, d) if low <= t <= high)})
        return found


def log_axis(values: Iterable[float], title: str) -> dict[str, Any]:
    """Return the layout of a logarithmic axis for positive values, with a whole number at every tick: 0.002, not 2 beside 10⁻³.

    Ticks are decades, and where fewer than three fit, 2 and 5 times them too. Values of 0 and below have no place on it.
    """
    shown = [value for value in values if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    inner = (1,) if math.log10(max(shown) / min(shown)) > 2 else (1, 2, 5)
    ticks = [m * 10.0**decade for decade in range(first, last + 1) for m in inner]
    texts = [number(tick, 1) for tick in ticks]
    return {"type": "log", "title": {"text": title}, "tickmode": "array", "tickvals": ticks, "ticktext": texts}


def layer_map(
    rows: dict[str, list[float | None]], *, unit: str, hover: str, caption: str, revision: str, left: int, **trace: Any
) -> Figure:
    """Draw a heat map with a named row per quantity and a column per layer; `left` is the margin for the names."""
    layers = list(range(max(map(len, rows.values()), default=0)))
    cells = {"type": "heatmap", "z": list(rows.values()), "y": list(rows), "x": layers, "colorscale": "@heat"}
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 8, "outlinewidth": 0}
    return {
        "data": [cells | {"hovertemplate": f"<b>%{{y}}</b>, layer %{{x}}<br>{hover}<extra></extra>", "colorbar": bar} | trace],
        "layout": layout(
            uirevision=revision,
            caption=caption,
            margin=(left, 10, 34, 42),
            xaxis={"title": {"text": "layer"}, "showgrid": False, "zeroline": False, "dtick": 5 if len(layers) > 12 else 1},
            yaxis={"autorange": "reversed", "showgrid": False},
        ),
    }


def cluster_colour(index: int, count: int) -> str:
    """Return a cluster's colour token if there are few, else its place on the ordered scale as "@ordered:0.25"."""
    if count <= CLUSTER_COUNT:
        return f"@cluster{index}"
    return f"@ordered:{index / max(1, count - 1):.4f}"


def layout(
    *, uirevision: str, caption: str = "", margin: tuple[int, int, int, int] = (56, 16, 12, 44), **more: Any
) -> dict[str, Any]:
    """Return the layout that every chart starts from.

    Args:
        uirevision: zoom is kept while this stays the same.
        caption: one line above the chart that says what is drawn; it makes the top margin 34 pixels.
        margin: left, right, top, bottom, in pixels.
    """
    left, right, top, bottom = margin
    notes = list(more.pop("annotations", []))
    if caption:
        top = max(top, 34)
        title = {
            "text": caption,
            "font": {"size": 12.5, "color": "@muted"},
            "xref": "container",
            "yref": "container",
            "automargin": False,
        }
        more["title"] = title | {"x": 0.012, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 9, "l": 2}}
    return {
        "uirevision": uirevision,
        "margin": {"l": left, "r": right, "t": top, "b": bottom},
        "hovermode": "closest",
        "showlegend": False,
        "annotations": notes,
        "legend": ABOVE | {"font": {"size": 11}, "traceorder": "normal"} | more.pop("legend", {}),
    } | more


def note(text: str) -> Figure:
    """Draw an empty chart that says what to do first."""
    words = {"text": text, "showarrow": False, "font": {"size": 14, "color": "@muted"}}
    place = {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    hidden = {"visible": False}
    return {"data": [], "layout": layout(uirevision="note", xaxis=hidden, yaxis=hidden, annotations=[words | place])}

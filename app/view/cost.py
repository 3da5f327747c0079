"""Write what a recipe costs: bars, a sentence on its sources, a heat map of the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from app.view import cards
from app.view import texts_divergence as texts
from app.view.figure import Figure, bytes_text, layer_map, note, number

LOWEST, HIGHEST = 1e-5, 10.0
"""Ends of the bars' log scale, nats."""
NEAR = 1.25
"""Ratio of prediction to measurement up to which it is not remarked on."""
SHARE = 0.5
"""Share of the whole cost that the sentence explains, with as few parts as that takes, at most MOST."""
MOST = 3


def place(kld: float) -> float:
    """Return where a divergence lies on the bars' scale, 0 to 1."""
    low, high = math.log(LOWEST), math.log(HIGHEST)
    return min(1.0, max(0.0, (math.log(max(kld, LOWEST)) - low) / (high - low)))


def cost_card(label: str, costs: Any, verified: Any, size: tuple[float, float], caution: str | None, busy: str = "") -> str:
    """Write the card of a recipe's cost.

    Args:
        costs: `app.session.Costs` with a prediction. verified: EvalReport of a finished run, or None.
        size: bytes of the model, and of keys and values per token, by formula.
        caution: a warning about the model's weights, or None. busy: what is still being computed; empty when nothing is.
    """
    prediction, measured, probe = costs.predicted, costs.measured, costs.probe
    figures = {
        "predicted": (prediction.total, None),
        "measured": (measured.kld, measured.stderr) if measured is not None else None,
    }
    if verified is not None and verified.kld_mean is not None:
        figures["verified"] = (verified.kld_mean, verified.kld_stderr)
    bars = "".join(gauge(kind, *texts.COST_ROWS[kind], found, probe.noise_floor, busy) for kind, found in figures.items())
    facts = (
        f"≈ {bytes_text(size[0])} and {bytes_text(size[1])} of KV cache per token, by formula · "
        f"{probe.tokens:,} tokens of {probe.text} · {texts.COST_FLOOR}, {number(probe.noise_floor)} nats"
    )
    notes = [facts, *remarks(prediction, measured), caution or ""]
    return (
        f'<div class="qs-summary qs-cost"><h2>{escape(texts.COST)}: {escape(label)}</h2>{bars}'
        f"{''.join(map(cards.caution, notes))}</div>"
    )


def before_start(found: Any) -> str:
    """Write what a run will take. `found`: RunEstimate."""
    pairs = [
        (f"≈ {cards.seconds_text(found.seconds)}", texts.BEFORE_TIME.format(tokens=found.tokens)),
        (
            f"≈ {cards.seconds_text(found.compare_seconds + found.original_seconds)}",
            texts.BEFORE_MEASURE.format(tokens=found.compared),
        ),
        (
            f"≈ {bytes_text(found.peak_bytes(measured=True))}",
            texts.BEFORE_PEAK.format(alone=bytes_text(found.peak_bytes(measured=False))),
        ),
        (f"≈ {bytes_text(found.model_bytes)}", texts.BEFORE_BYTES.format(packed=bytes_text(found.packed_bytes))),
    ]
    lacking = found.lacking_bytes(measured=True)
    notes = [
        texts.BEFORE_SAVED if found.saved else "",
        texts.BEFORE_SHORT.format(lacking=bytes_text(lacking)) if lacking else "",
        texts.BEFORE_NOTE.format(seconds=cards.seconds_text(found.timing_seconds)),
    ]
    said = cards.figures(pairs) + "".join(map(cards.caution, notes))
    return f'<div class="qs-summary"><h2>{escape(texts.BEFORE)}</h2>{said}</div>'


def gauge(kind: str, name: str, how: str, found: tuple[float, float | None] | None, floor: float, busy: str = "") -> str:
    """Write one bar of a divergence on the log scale, with the noise floor marked.

    Args:
        kind: "predicted", "measured" or "verified". name, how: its title, and how the figure was found.
        found: nats and their standard error; None before they are known: `busy` then says what is being done.
    """
    if found is None:
        return f'<div class="qs-gauge"><span>{escape(name)}</span><i></i><b>{escape(busy or "…")}</b></div>'
    kld, error = found
    figure = number(kld) + (f" ± {number(error)}" if error else "") + " nats"
    return (
        f'<div class="qs-gauge" title="{escape(how)}"><span>{escape(name)}</span>'
        f'<i><u class="qs-{kind}" style="width:{100 * place(kld):.1f}%"></u><s style="left:{100 * place(floor):.1f}%"></s></i>'
        f"<b>{escape(figure)}</b></div>"
    )


def remarks(prediction: Any, measured: Any) -> list[str]:
    """Say what limits the figures: a large cost, parts that are estimated, a prediction that was off."""
    found = [texts.COST_SATURATED] if prediction.saturated else []
    if prediction.estimated or prediction.unknown:
        parts = len(prediction.estimated) + len(prediction.unknown)
        found.append(texts.COST_ESTIMATED.format(count=parts, all=len(prediction.cells) + len(prediction.unknown)))
    elif measured is not None and measured.kld > 0 and not 1 / NEAR <= prediction.total / measured.kld <= NEAR:
        found.append(texts.COST_OFF.format(ratio=number(prediction.total / measured.kld, 2)))
    return found


def blame(cells: Mapping[str, float]) -> str:
    """Say in one sentence which parts cause most of the cost: "60 % of the cost is MLP hidden of layers 2 and 26"."""
    total = math.fsum(cells.values())
    if total <= 0:
        return texts.COST_NOTHING
    chosen: list[str] = []
    for name in ranked(cells):
        chosen.append(name)
        if math.fsum(cells[n] for n in chosen) >= SHARE * total or len(chosen) == MOST:
            break
    share = math.fsum(cells[n] for n in chosen) / total
    layers: dict[str, list[int]] = {}
    for name in chosen:
        layer, cell = split(name)
        layers.setdefault(texts.WHERE_ROWS[cell], []).append(layer)
    parts = [f"{row} of {'layers' if len(own) > 1 else 'layer'} {listed(sorted(own))}" for row, own in layers.items()]
    return f"{100 * share:.0f} % of the cost is {listed(parts)}."


def listed(words: Sequence[object]) -> str:
    """Write words as a sentence lists them: "a, b and c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def ranked(cells: Mapping[str, float]) -> list[str]:
    """List parts by their predicted cost, the most expensive first."""
    return sorted(cells, key=lambda name: -cells[name])


def split(name: str) -> tuple[int, str]:
    """Return (layer, cell) of a name such as "layers.3.k"."""
    _, layer, cell = name.split(".")
    return int(layer), cell


def where_map(cells: Mapping[str, float], measured: Mapping[str, Any], layers: int, *, revision: str) -> Figure:
    """Draw the heat map of parts and layers: log10 of the measured cost where it was measured, else of the predicted one."""
    shown = {name: kld for name, kld in (cells | {n: m.kld for n, m in measured.items()}).items() if kld > 0}
    if not shown:
        return note(texts.COST_NOTHING)
    rows: dict[str, list[float | None]] = {}
    told: list[list[str]] = []
    parts: list[list[str]] = []
    for cell, label in texts.WHERE_ROWS.items():
        names = [f"layers.{layer}.{cell}" for layer in range(layers)]
        if any(name in shown for name in names):
            rows[label] = [math.log10(shown[name]) if name in shown else None for name in names]
            told.append([_told(name, cells, measured) for name in names])
            parts.append(names)
    top, bottom = (pick(math.log10(v) for v in shown.values()) for pick in (max, min))
    figure = layer_map(
        rows,
        unit="nats",
        hover="%{text}",
        caption=texts.WHERE_CAPTION,
        revision=revision,
        left=132,
        text=told,
        customdata=parts,
        zmin=max(bottom, top - 4),
        zmax=top,
    )
    ticks = list(range(math.ceil(max(bottom, top - 4)), math.floor(top) + 1))
    figure["data"][0]["colorbar"] |= {"tickvals": ticks, "ticktext": [number(10.0**t, 1) for t in ticks]}
    return figure


def _told(name: str, cells: Mapping[str, float], measured: Mapping[str, Any]) -> str:
    said = [f"predicted {number(cells[name])} nats"] if name in cells else []
    return "<br>".join([*said, *([f"measured alone {number(measured[name].kld)} nats"] if name in measured else [])])


def where_rows(cells: Mapping[str, float], measured: Mapping[str, Any], most: int = 10) -> list[list[str]]:
    """Make rows of the table of the most expensive parts: layer, part, predicted, measured alone, share of the predicted sum."""
    total = math.fsum(cells.values()) or 1.0
    rows = []
    for name in ranked(cells)[:most]:
        kld, (layer, cell) = cells[name], split(name)
        own = number(measured[name].kld) if name in measured else "–"
        rows.append([str(layer), texts.WHERE_ROWS[cell], number(kld), own, f"{number(100 * kld / total)} %"])
    return rows


def swaps_note(cells: Mapping[str, float], measured: Mapping[str, Any], control: float, together: Any) -> str:
    """Say how well predictions fit the parts measured alone, the control, and how the parts add up to all at once.

    Args: together: Measurement of the whole recipe, or None.
    """
    both = [cells[name] / m.kld for name, m in measured.items() if cells.get(name) and m.kld > 0]
    additive = "not known"
    if together is not None and together.kld > 0 and len(measured) >= len(cells):
        additive = number(math.fsum(m.kld for m in measured.values()) / together.kld)
    ratio = number(median(both)) if both else "not known"
    return cards.caution(
        texts.SWAPS_NOTE.format(count=len(measured), all=len(cells), ratio=ratio, control=number(control), additive=additive)
    )

"""Write what a budget was spent on: a comparison with a uniform recipe, and the bits as a map."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from app.view import cards
from app.view import texts_layers as texts
from app.view.figure import bytes_text, number
from app.view.tables import with_error
from app.view.texts_divergence import WHERE_ROWS

FEWEST, MOST = 2, 8
"""Bits at the ends of the map's shades."""


def card(found: Any, measured: Any, rival: Any, rank: str = "") -> str:
    """Write the card of an allocation.

    Args:
        found: `core.probe.autopilot.Allocation`. measured, rival: Measurements of it and of its uniform rival; None before.
        rank: what `ranked` says.
    """
    limit = (
        texts.WITHIN_BYTES.format(bytes_text(found.budget))
        if found.bound is None
        else texts.WITHIN_KLD.format(number(found.bound))
    )
    facts = texts.SPENT.format(
        bytes=bytes_text(found.nbytes), context=found.context, limit=limit, predicted=number(found.predicted)
    )
    facts += texts.SPENT_MEASURED.format(_with_error(measured)) if measured is not None else ""
    return (
        f'<div class="qs-summary"><h2>{escape(texts.SPENT_TITLE)}</h2>'
        f'<p class="qs-verdict">{escape(compared(found, measured, rival))}</p>{cards.caution(rank)}{cards.caution(facts)}</div>'
    )


def compared(found: Any, measured: Any, rival: Any) -> str:
    """Say how an allocation compares with its uniform rival: by what was measured of both, or else by what is predicted."""
    if found.rival is None:
        return texts.NO_RIVAL
    told = _named(found.rival)
    if measured is None or rival is None:
        own, other, how = found.predicted, found.rival.predicted, texts.BY_PREDICTION
    else:
        own, other, how = measured.kld, rival.kld, texts.BY_MEASUREMENT
    size = bytes_text(found.rival.nbytes)
    words = {"rival": told, "bytes": size, "own": number(own), "other": number(other), "how": how}
    if found.bound is not None:
        return texts.SMALLER.format(**words, less=number(100 * (1 - found.nbytes / found.rival.nbytes), 2))
    if own >= other:
        return texts.UNIFORM_BETTER.format(**words)
    return texts.BETTER.format(**words, less=number(100 * (1 - own / other), 2))


def smallest(found: Any) -> str:
    """Write the smallest g that was found (GroupCount)."""
    words = {"g": found.g, "within": number(100 * found.within), "own": number(found.predicted)}
    return f'<p class="qs-verdict">{texts.SMALLEST_FOUND.format(other=number(found.per_channel), **words)}</p>'


def ranked(own: Any, uniform: Sequence[tuple[str, Any]], context: int) -> str:
    """Say how the verified run of an allocation stands among uniform runs; empty text where nothing can be compared.

    Args:
        own: EvalReport of the run, or None.
        uniform: names and EvalReports of runs of the same model without bits of single layers.
        context: tokens whose keys and values count.
    """
    same = [(name, report) for name, report in uniform if own is not None and report.windows_id == own.windows_id]
    if not same or own.kld_mean is None:
        return ""

    def size(report: Any) -> float:
        return report.weight_bytes + context * report.kv_bytes_per_token

    place = 1 + sum(report.kld_mean < own.kld_mean for _, report in same)
    better = [(report.kld_mean, name) for name, report in same if size(report) <= size(own) and report.kld_mean < own.kld_mean]
    kld, rival = min(better, default=(0.0, ""))
    best = texts.RANK_BEATEN.format(rival=rival, kld=number(kld)) if better else texts.RANK_BEST
    words = {"own": with_error(own.kld_mean, own.kld_stderr), "bytes": bytes_text(size(own)), "best": best}
    return texts.RANK.format(place=place, count=1 + len(same), **words)


def _named(rival: Any) -> str:
    """Name a uniform recipe by the bits that were chosen."""
    parts = [(texts.RIVAL_WEIGHTS, rival.weights), (texts.RIVAL_CACHE, rival.cache)]
    return " and ".join(words.format(bits) for words, bits in parts if bits is not None)


def _with_error(measured: Any) -> str:
    return number(measured.kld) + (f" ± {number(measured.stderr)}" if measured.stderr else "")


def bits_map(bits: dict[str, int]) -> str:
    """Write the bits of every part as a table: a row for each kind of part, a column for each layer, a shade for each number.

    Args: bits: by "layers.<i>.<cell>".
    """
    layers = sorted({int(name.split(".")[1]) for name in bits})
    head = "".join(f'<th scope="col">{layer}</th>' for layer in layers)
    rows = ""
    for cell, label in WHERE_ROWS.items():
        own = [bits.get(f"layers.{layer}.{cell}") for layer in layers]
        if any(value is not None for value in own):
            rows += f'<tr><th scope="row">{escape(label)}</th>{"".join(map(_cell, own))}</tr>'
    return (
        f'<div class="qs-scroll" tabindex="0" role="region" aria-label="{escape(texts.MAP_LABEL)}">'
        f'<table class="qs-bits"><caption>{escape(texts.MAP_CAPTION)}</caption>'
        f'<thead><tr><th scope="col">{escape(texts.LAYER)}</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _cell(bits: int | None) -> str:
    if bits is None:
        return "<td></td>"
    shade = (min(bits, MOST) - FEWEST) / (MOST - FEWEST)
    return f'<td style="--qs-shade:{shade:.2f}">{bits}</td>'


def marks(points: dict[str, float]) -> list[tuple[str, str]]:
    """Name schemes with what they take, for a list of choices: (label, scheme), by rising bytes."""
    return [(f"{name}, {bytes_text(size)}", name) for name, size in sorted(points.items(), key=lambda point: point[1])]

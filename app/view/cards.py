"""Write small pieces of HTML: status line, cards, tables, streamed texts; foreign text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from app.view import texts
from app.view.figure import bytes_text, number, seconds_text
from app.view.plots_runs import drawable, run_colour
from app.view.tables import Cell, Estimate, Hover
from app.worker.job import JobView
from core.errors import Cancelled, QuantscopeError

VERDICTS = (
    (0.995, "No loss: perplexity fell,"),
    (1.005, "No loss: perplexity is unchanged,"),
    (1.9, "Perplexity rose by {percent} %:"),
    (2.1, "Perplexity doubled:"),
    (2.9, "Perplexity more than doubled:"),
    (3.1, "Perplexity tripled:"),
)
"""(upper limit of a ratio of perplexities, words for it), ascending."""


def counted(count: int, thing: str) -> str:
    """Format a count with its noun: "1 channel", "1,536 channels"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def css_colour(place: int) -> str:
    """Return the CSS variable of a run's colour."""
    return f"var(--qs-{run_colour(place)[1:]})"


def progress(view: JobView, what: str) -> str:
    """Write the status line of a running or waiting job."""
    if view.state == "waiting":
        ahead = "next in line" if view.ahead == 0 else f"{counted(view.ahead, 'job')} ahead"
        return _line("wait", what, f"waiting, {ahead}", None)
    left = f", about {seconds_text(max(0.1, view.remaining_s))} left" if view.remaining_s is not None else ""
    gone = seconds_text(max(0.1, view.elapsed_s))  # a job that begins has no microseconds to tell
    detail = f"{view.stage} · {gone}{left}" if view.stage else gone
    return _line("run", what, detail, view.fraction)


def _line(kind: str, title: str, detail: str, fraction: float | None) -> str:
    width = f"{100 * fraction:.1f}%" if fraction is not None else "30%"
    bar = (
        f'<div class="qs-bar{"" if fraction is not None else " qs-busy"}"><i style="width:{width}"></i></div>'
        if kind != "idle"
        else ""
    )
    return (
        f'<div class="qs-status qs-{kind}" role="status" aria-live="polite"><b>{escape(title)}</b>'
        f"<span>{escape(detail)}</span>{bar}</div>"
    )


def starting() -> str:
    """Write the status line that is shown before the first model is known."""
    return _line("run", texts.TITLE, texts.STARTING, None)


def working(what: str) -> str:
    """Write the status line for work of the server without a measure of progress."""
    return _line("run", texts.TITLE, what, None)


def note(title: str, words: str) -> str:
    """Write the status line for a message that is not an error."""
    return _line("idle", title, words, None)


def intro(info: Any, larger: str) -> str:
    """Write what the page shows and why it matters; under a small embedded model, how to open a larger one."""
    size = number(info.parameters / 1e6) if info is not None else ""
    toy = f" <span>{escape(texts.INTRO_TOY.format(size=size, other=larger))}</span>" if larger and info is not None else ""
    words = f'<span class="qs-rich">{texts.INTRO}</span>{toy}'
    return f'<div class="qs-intro"><h1>{escape(texts.INTRO_TITLE)}</h1><p>{words}</p></div>'


def footer(versions: str, report: Any = None) -> str:
    """Write which versions run here, and, once `report` (DoctorReport) is known, which backends and why."""
    if report is None:
        return f'<div class="qs-footer">{escape(versions)}</div>'
    running = "; ".join(b.name for b in report.backends if b.runs)
    missing = "; ".join(f"{b.name} ({b.reason})" for b in report.backends if not b.runs)
    line = texts.BACKENDS.format(running) + (texts.NO_BACKENDS.format(missing) if missing else "")
    packages = [[p.name, p.version or "–", p.tested, texts.PACKAGE_STATES[p.ok]] for p in report.packages]
    backends = [[b.name, texts.BACKEND_STATES[b.runs], b.reason] for b in report.backends]
    tables = table(texts.PACKAGE_HEADERS, packages) + table(texts.BACKEND_HEADERS, backends)
    command = f"<p>{escape(texts.FOOTER_COMMAND)} <code>python -m app.cli doctor</code></p>"
    folded = f'<summary>{escape(texts.FOOTER)}</summary><div class="qs-columns">{tables}</div>{command}'
    return f'<div class="qs-footer">{escape(versions)}. {escape(line)}.<details>{folded}</details></div>'


def links(pairs: Sequence[tuple[str, str]]) -> str:
    """Write links to papers, each opened in a tab of its own."""
    shown = " · ".join(f'<a href="{escape(url)}" target="_blank" rel="noreferrer">{escape(name)}</a>' for name, url in pairs)
    return f'<p class="qs-links">{escape(texts.PAPERS)} {shown}</p>'


def command(line: str) -> str:
    """Write a command line that repeats a run."""
    return f'<p class="qs-protocol">{escape(texts.KEEP_COMMAND)}</p><pre class="qs-command" tabindex="0">{escape(line)}</pre>'


def loads(answers: dict[str, str] | None) -> str:
    """Write which other programs load a run and why not; nothing for a run of an earlier version (`core.models.export.fit`)."""
    if not answers:
        return ""
    rows = "".join(f"<p><b>{escape(program)}</b> <span>{escape(answer)}</span></p>" for program, answer in answers.items())
    return f'<div class="qs-protocol"><p>{escape(texts.LOADS)}</p>{rows}</div>'


def error_card(error: QuantscopeError) -> str:
    """Write an error in one sentence, with its code; a stop by the user is not shown as an error.

    The card of a session that has ended tells the page's script to load the page anew.
    """
    if error.code == Cancelled.code:
        return stopped(None, None)
    restart = " data-restart" if error.code == "E-SESSION" else ""
    return (
        f'<div class="qs-status qs-error" role="alert"{restart}><b>That did not work</b><span>{escape(str(error))} '
        f"<code>{escape(error.code)}</code></span></div>"
    )


def stopped(info: Any, ranges: Any) -> str:
    """Write the status line after a Stop, which names the model that is still open."""
    still = f"{texts.STOPPED} {info.name} · {_facts(info, ranges)}" if info and ranges else texts.STOPPED
    return _line("idle", "Stopped", still, None)


def idle(info: Any, ranges: Any) -> str:
    """Write the status line when nothing runs: the model, its size, what its ranges were observed on."""
    if info is None or ranges is None:
        return _line("idle", "Ready", texts.NO_RANGES, None)
    return _line("idle", info.label or info.name, _facts(info, ranges), None)


def _facts(info: Any, ranges: Any) -> str:
    size = f"{number(info.parameters / 1e6)} M parameters"
    fidelity = f" · {info.fidelity}" if info.fidelity else ""
    kept = "packed" if info.fidelity else info.dtype  # for ternary weights `dtype` is the activations' type
    stored = f" · from {info.precision}" if info.precision and not info.fidelity else ""
    layers = counted(info.layers, "layer")
    where = f"{info.architecture}{fidelity} · {layers} · {size} · {bytes_text(info.weight_bytes)} {kept}{stored}"
    asked = ranges.calibration["tokens"]
    fitted = texts.WHOLE_WINDOWS.format(asked=asked, window=ranges.window) if asked != ranges.tokens else ""
    where_from = f"{ranges.tokens:,} tokens of {ranges.text_name}{fitted}"
    how = f"ranges from {where_from}, {seconds_text(ranges.seconds)} on {ranges.device}"
    return f"{where} · {how}"


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str = "",
    colours: Sequence[int] | None = None,
    pick: bool = False,
    keys: Sequence[Sequence[object]] | None = None,
) -> str:
    """Write a table; a `Table` lets its rows be chosen or its columns be sorted.

    Args:
        colours: the colour place of each row's run. pick: whether rows can be chosen.
        keys: the value of each cell, to sort its column by; None where nothing was measured.
    """
    names = [escape(h) for h in headers]
    sortable = "<th scope='col' aria-sort='none'><button type='button'>{}</button></th>"
    head = "".join((sortable if keys else "<th scope='col'>{}</th>").format(name) for name in names)
    body = []
    for index, row in enumerate(rows):
        dot = f'<i class="qs-dot" style="background:{css_colour(colours[index])}"></i>' if colours else ""
        own = [f' data-key="{escape("" if key is None else str(key))}"' for key in keys[index]] if keys else [""] * len(row)
        cells = "".join(f"<td{own[place]}>{dot if not place else ''}{_cell(cell)}</td>" for place, cell in enumerate(row))
        chosen = f' data-index="{index}" tabindex="0" role="button"' if pick else ""
        body.append(f"<tr{chosen}>{cells}</tr>")
    note = f'<p class="qs-caption">{escape(caption)}</p>' if caption else ""
    kind = "qs-table qs-pick" if pick else "qs-table"
    name = escape(caption or headers[0])
    return (
        f'{note}<div class="qs-scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="{kind}" aria-label="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, Estimate):
        return f'<span class="qs-estimate" title="by formula, not measured">≈ {escape(cell.text)}</span>'
    if isinstance(cell, Hover):
        return f'<span title="{escape(cell.hover)}">{escape(cell.text)}</span>'
    return escape(str(cell))


def verdict(perplexity: float, pair: Any, measured_on: str) -> str:
    """Write how quantising changed the perplexity, with the ratio. `pair`: PairedRatio against the unquantised model."""
    words = texts.NOT_TOLD_APART if pair.differs is False else verdict_words(pair.ratio)
    figures = f"{number(perplexity / pair.ratio, 4)} → {number(perplexity, 4)} (×{number(pair.ratio)}) on {measured_on}"
    return f'<p class="qs-verdict"><b>{escape(words)}</b> {escape(figures)}</p>'


def verdict_words(ratio: float) -> str:
    """Describe a ratio of perplexities as the beginning of a sentence."""
    if not math.isfinite(ratio) or ratio >= 10:
        return "The model is broken, it writes noise: perplexity"
    for limit, words in VERDICTS:
        if ratio < limit:
            return words.format(percent=f"{abs(100 * (ratio - 1)):.0f}")
    return f"Perplexity is {number(ratio, 2)} times as large:"


def hint(text: str) -> str:
    """Write the text of an empty panel: what to do first."""
    return f'<div class="qs-hint">{escape(text)}</div>'


def channel_facts(site: Any, channel: int, median_width: float, cluster: Any = None, bits: int = 4) -> str:
    """Write the known facts of a channel: range, width against its site's, and its cluster if one is given."""
    low, high = float(site.low[channel]), float(site.high[channel])
    facts = [
        (texts.AVERAGE_RANGE if site.is_average else "range", f"{number(low)} to {number(high)}"),
        ("width", f"{number((high - low) / median_width if median_width else 0)} × the median channel"),
    ]
    if cluster is not None:
        facts += [
            ("cluster", f"{counted(cluster.size, 'channel')}, {number(cluster.low)} to {number(cluster.high)}"),
            ("one step", f"{number(cluster.scale)} at {bits} bits"),
        ]
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    title = f"Layer {site.layer} · {escape(texts.site_label(site.kind))} · channel {channel}"
    return f'<div class="qs-facts"><h2>{title}</h2><dl>{rows}</dl></div>'


def extremes(detail: Any) -> str:
    """Write the tokens at a channel's extreme values, with their neighbours."""
    ordered = sorted(detail.extremes, key=lambda e: -e.value)
    rows = "".join(
        f'<tr><td class="qs-num">{escape(number(e.value))}</td><td class="qs-token">…{escape(e.context_before)}'
        f"<mark>{escape(e.token_text)}</mark>{escape(e.context_after)}…</td></tr>"
        for e in ordered
    )
    facts = f"mean {number(detail.mean)}, standard deviation {number(detail.std)}"
    return (
        f'<div class="qs-scroll qs-tokens" tabindex="0" role="region" aria-label="tokens"><table class="qs-table">'
        f"<caption>tokens behind the extremes ({escape(facts)})</caption>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def run_summary(report: Any, title: str, place: int, verdict: str = "") -> str:
    """Write the result of a quantisation as a sentence (`verdict`, HTML) and a few figures, under the run's name."""
    saved = report.float_bytes / report.weight_bytes if report.weight_bytes else 0.0
    before = f"{number(saved)} × smaller than {bytes_text(report.float_bytes)}" if saved > 1.01 else "no smaller than before"
    calibrated = "errors compared on" if report.recipe["method"] == "bitnet" else "calibrated on"
    pairs = [
        (f"{report.effective_weight_bits:.2f}", "bits per decoder weight, scales included"),
        (
            bytes_text(report.weight_bytes),
            f"whole model, measured: {before}",
        ),
        (seconds_text(report.seconds), f"{calibrated} {report.calibration}"),
    ]
    exact = all(drawable(entry.output_sqnr_db) is None for entry in report.layers)
    notes = caution(texts.EXACT if exact else "") + caution(report.unsaved or "") + caution(report.caution or "")
    return headed(title, place, verdict + figures(pairs) + notes + loads(report.loads))


def headed(title: str, place: int, content: str) -> str:
    """Write a panel about a run: its name and colour above `content`, which is HTML already."""
    dot = f'<i class="qs-dot" style="background:{css_colour(place)}"></i>'
    return f'<div class="qs-summary"><h2>{dot}{escape(title)}</h2>{content}</div>'


def cluster_figures(view: Any, heads: int) -> str:
    """Write the predicted error of a clustering in words."""
    times = 1 / view.predicted_error if view.predicted_error > 0 else float("inf")
    where = f"clusters in each of {heads} heads" if heads > 1 else "clusters"
    return figures(
        [
            (f"{number(times)}×", f"less rounding error than one scale, predicted at {view.bits} bits"),
            (f"{1 + int(view.labels.max())}", f"{where} over {len(view.labels):,} channels"),
        ]
    )


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """Write a row of large figures, each over the words that explain it."""
    cells = "".join(f"<div><b>{escape(figure)}</b><span>{escape(words)}</span></div>" for figure, words in pairs)
    return f'<div class="qs-figures">{cells}</div>'


def streams(panels: Sequence[tuple[int, str, str, tuple[str, str, str], str]]) -> str:
    """Write texts side by side.

    Args:
        panels: (colour place, name, prompt, text so far, footer) of each run; a text is what stands before its marked token,
            that token, and what follows. Without a marked token the last two are empty.
    """
    cards = []
    for place, name, prompt, (before, token, after), footer in panels:
        mark = f"<mark>{escape(token)}</mark>" if token else ""
        text = f"<span>{escape(prompt)}</span>{escape(before)}{mark}{escape(after)}"
        body = f"<h2>{escape(name)}</h2><p>{text}</p><footer>{escape(footer)}</footer>"
        cards.append(f'<section class="qs-stream" style="border-top-color:{css_colour(place)}">{body}</section>')
    return f'<div class="qs-streams">{"".join(cards)}</div>'


def protocol(text: str) -> str:
    """Write how the numbers above were measured."""
    return caution(f"How it was measured: {text}")


def caution(text: str) -> str:
    """Write a warning about the numbers above; nothing for an empty text."""
    return f'<p class="qs-protocol">{escape(text)}</p>' if text else ""

"""Turn reports into rows of cells, and rows into files: pure functions, without widgets.

A cell is a text, or an `Estimate`, which tables show in italics after "≈" so that it is not taken for a measurement.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.view import texts, texts_distill
from app.view.figure import bytes_text, number
from core.evaluation.paired import against_reference

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\0")


@dataclass(frozen=True)
class Estimate:
    """A figure from a formula, not from a measurement."""

    text: str


@dataclass(frozen=True)
class Hover:
    """A short text with a longer one shown on hovering."""

    text: str
    hover: str


Cell = str | Estimate | Hover
Rows = list[list[Cell]]


def outlier_rows(outliers: Sequence[Any]) -> list[list[Any]]:
    """Make rows of the outliers table: layer, site, channel, minimum, maximum, ratio."""
    return [
        [o.layer, texts.SITE_LABELS.get(o.kind, o.kind), o.channel, number(o.low), number(o.high), number(o.ratio)]
        for o in outliers
    ]


def cluster_rows(view: Any) -> list[list[Any]]:
    """Make rows of the cluster table: index, channels, low, high, scale, zero point."""
    return [[c.index, c.size, number(c.low), number(c.high), number(c.scale), c.zero_point] for c in view.clusters]


NUMBER_COLUMNS = {
    "run": "run",
    "perplexity": "perplexity",
    "against float": "ln_ratio",
    "KLD, nats": "kld_mean",
    "median, 99 %, 99.9 %": "kld_99",
    "Δp rms, %": "delta_p_rms",
    "same top token": "same_top_token",
    "bytes measured": "weight_bytes",
    "by formula": "formula_bytes",
    "KV / token": "kv_bytes_per_token",
    "tokens/s": "tokens_per_second",
}
"""Columns of the comparison, and the name of each one's value in `Measured.record`."""
RECORDED = (
    *("key", "reference", "text_name", "tokens", "window", "windows_id", "perplexity", "perplexity_stderr", "ln_ratio"),
    *("ln_ratio_stderr", "kld_mean", "kld_stderr", "delta_p_mean", "delta_p_stderr", "delta_p_rms", "delta_p_rms_stderr"),
    *("same_top_token", "same_top_stderr", "weight_bytes", "effective_weight_bits", "kv_bytes_per_token"),
    *("tokens_per_second", "device", "dtype", "backend"),
)
"""Fields of EvalReport that the files of numbers have, beside the divergence's quantiles."""
SPREAD = ("50", "99", "99.9")
"""Percentages of the divergence's distribution over tokens that have a place of their own."""
MEASURED_ON = "measured on"


@dataclass(frozen=True)
class Measured:
    """A row of the comparison.

    Attributes:
        name: the short name. hover: the full one.
        report: EvalReport.
        estimate: bytes by formula, None for a model as it was opened.
        protocol: text, tokens and window in words. other: whether they differ from those of the newest measurements.
        place: colour place of the run.
    """

    name: str
    hover: str
    report: Any
    estimate: float | None = None
    protocol: str = ""
    other: bool = False
    place: int = 0

    def record(self) -> dict[str, Any]:
        """Return the row's values in full precision: bytes, nats, shares 0 to 1, tokens per second; None if not measured."""
        report = self.report.to_dict()
        spread = {f"kld_{name}": (self.report.kld_quantiles or {}).get(name) for name in SPREAD}
        own = {name: report[name] for name in RECORDED}
        return {"run": self.name, "name": self.hover, **own, **spread, "formula_bytes": self.estimate}


def number_rows(runs: Sequence[Measured]) -> tuple[list[str], Rows]:
    """Make headers and rows of the comparison. Where protocols differ, a last column names them and rows of others are marked."""
    mixed = len({run.protocol for run in runs}) > 1
    rows: Rows = []
    for run in runs:
        e = run.report
        row: list[Cell] = [
            Hover(f"{run.name} †" if run.other and mixed else run.name, run.hover),
            f"{number(e.perplexity, 4)} ± {number(e.perplexity_stderr, 2) if e.perplexity_stderr else '–'}",
            ratio_cell(run),
            *divergence_cells(run),
            bytes_cell(e),
            Estimate(bytes_text(run.estimate)) if run.estimate else "–",
            bytes_text(e.kv_bytes_per_token),
            number(e.tokens_per_second),
        ]
        rows.append([*row, run.protocol] if mixed else row)
    return [*NUMBER_COLUMNS, *([MEASURED_ON] if mixed else [])], rows


def number_keys(runs: Sequence[Measured]) -> list[list[Any]]:
    """List the values that sort the cells of `number_rows`."""
    return [[*(record[column] for column in NUMBER_COLUMNS.values()), run.protocol] for run in runs for record in [run.record()]]


def numbers_csv(runs: Sequence[Measured]) -> str:
    """Write measurements as CSV, a row for each; a value that was not measured is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    records = [run.record() for run in runs]
    writer.writerow(dict.fromkeys(name for record in records for name in record))
    writer.writerows([safe_cell(v) if isinstance(v, str) else v for v in record.values()] for record in records)
    return out.getvalue()


def numbers_json(runs: Sequence[Measured]) -> str:
    """Write measurements as a JSON list, an object for each."""
    return json.dumps([run.record() for run in runs], indent=2, allow_nan=False, ensure_ascii=False)


def ratio_cell(run: Measured) -> Cell:
    """Format perplexity as a multiple of the unquantised model's on the same windows, with the paired error of its logarithm."""
    e = run.report
    if e.ln_ratio is None:
        return "–"
    pair = against_reference(e)
    return Hover(f"×{number(pair.ratio)} (ln {with_error(e.ln_ratio, e.ln_ratio_stderr)})", pair.verdict())


def bytes_cell(report: Any) -> Cell:
    """Format the bytes of a model's weights, with the bits of a decoder weight where they are known."""
    size, bits = bytes_text(report.weight_bytes), report.effective_weight_bits
    return size if bits is None else Hover(size, f"{number(bits)} bits per decoder weight, scales included")


def divergence_cells(run: Measured) -> list[Cell]:
    """Format the divergence from the unquantised model: mean, distribution, change of the right token's probability, same top."""
    e, found = run.report, run.report.kld_quantiles or {}
    if e.kld_mean is None:
        return ["–"] * 4
    spread = ", ".join(f"{quantile(name)} {number(value)}" for name, value in found.items())
    quantiles = Hover(" · ".join(number(found[name], 2) for name in SPREAD if name in found) or "–", f"over tokens: {spread}")
    kld = Hover(with_error(e.kld_mean, e.kld_stderr), f"over tokens: {spread}")
    mean, rms = probability_change(e)
    return [kld, quantiles, Hover(rms, f"mean: {mean} %"), share(e.same_top_token, e.same_top_stderr)]


def probability_change(report: Any) -> tuple[str, str]:
    """Format the change of the right token's probability, in per cent with errors: (mean, root mean square)."""
    pairs = ((report.delta_p_mean, report.delta_p_stderr), (report.delta_p_rms, report.delta_p_rms_stderr))
    mean, rms = (with_error(*(None if value is None else 100 * value for value in pair)) for pair in pairs)
    return mean, rms


def with_error(value: float | None, error: float | None) -> str:
    """Format a figure with its standard error, to two digits of the error; a dash where it was not measured."""
    if value is None or error is None:
        return "–" if value is None else number(value, 4)
    places = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4
    return f"{value:.{places}f} ± {error:.{places}f}".replace("-", "−")


def share(value: float | None, error: float | None = None) -> str:
    """Format a share as percent, with its standard error where it is known."""
    return "–" if value is None else f"{100 * value:.1f}{'' if error is None else f' ± {100 * error:.1f}'} %"


def quantile(name: str) -> str:
    """Name a quantile of the divergence for people."""
    return {"50": "median", "100": "max"}.get(name, f"{name} %")


def several_models(models: Sequence[Any]) -> str:
    """Say what to know before comparing runs of several models (ModelInfo, None where unknown); nothing for one."""
    if len(models) < 2:
        return ""
    sizes = sorted({info.vocab for info in models if info is not None})
    same = len(sizes) == 1 and None not in models
    words = (
        texts.SAME_VOCABULARY.format(size=sizes[0])
        if same
        else texts.OTHER_VOCABULARY.format(sizes=", ".join(f"{n:,}" for n in sizes))
    )
    return f"{texts.SEVERAL_MODELS} {words}" if same or len(sizes) > 1 else texts.SEVERAL_MODELS


def speed_rows(runs: Sequence[tuple[str, Any, Any]]) -> Rows:
    """Make rows of the speed table: (name, GenerationReport, SpeedLimit) of each run."""
    rows: Rows = []
    for name, made, limit in runs:
        bound = limit.tokens_per_second(made.kv_bytes)
        rows.append(
            [
                name,
                f"{number(made.tokens_per_second)} tokens/s",
                Estimate(f"{number(bound)} tokens/s"),
                f"{number(100 * made.tokens_per_second / bound, 2)} %",
                f"{bytes_text(limit.weight_bytes)} + {bytes_text(made.kv_bytes)} KV",
                f"{bytes_text(limit.bytes_per_second)}/s",
            ]
        )
    return rows


def sparsity_rows(report: Any, paper: tuple[str, tuple[str, ...], str] | None = None) -> Rows:
    """Make the whole model's row of table 2 from a SparsityReport; `paper`: a published row to add."""
    share = report.active_parameters / report.parameters if report.parameters else 0.0
    active = f"{_millions(report.active_parameters)} of {_millions(report.parameters)} ({100 * share:.0f} %)"
    rows: Rows = [["this model", *_shares(report.total), active]]
    return [*rows, [paper[0], *(f"{share} %" for share in paper[1]), paper[2]]] if paper else rows


def sparsity_layer_rows(report: Any) -> Rows:
    """Make a row of zeros for every layer: layer, projections, overall."""
    return [[str(index), *_shares(layer)] for index, layer in enumerate(report.layers)]


def _shares(zeros: Any) -> list[Cell]:
    return [f"{100 * getattr(zeros, name):.1f} %" for name in (*texts.PROJECTION_LABELS, "overall")]


def _millions(count: int) -> str:
    return f"{number(count / 1e6)} M"


def fallback_rows(report: Any) -> Rows:
    """Make a row for each weight that GPTQ did not round although asked to, and each expert without tokens: layer, name, why."""
    return [[str(entry.layer), name, why] for entry in report.layers for name, why in entry.fallbacks.items()]


def stage_rows(report: Any) -> Rows:
    """Make rows of seconds per stage of a quantisation."""
    return [[name, f"{number(seconds)} s"] for name, seconds in report.stages.items()]


def distill_rows(found: Any) -> Rows:
    """Make a row for the texts of a distillation, on windows that it was not trained on, and one for other text, if any."""
    marks = found.before, found.after
    names = texts_distill.HELD_OUT.format(names=" + ".join(found.texts))
    rows = [[names, found.float_perplexity, *(m.perplexity for m in marks), *(m.kld for m in marks)]]
    if found.other:
        rows += [[found.other, found.other_float_perplexity, *(m.other_perplexity for m in marks), *(m.other_kld for m in marks)]]
    return [[name, *(number(value, 4) for value in values)] for name, *values in rows]


def backend_rows(report: Any) -> Rows:
    """Make rows of the backends: how many layers run on each, and why."""
    return [[use.backend, str(use.layers), use.reason] for use in report.backends]


def ranges_csv(report: Any) -> str:
    """Write every channel's range as CSV; each row repeats its model, text and tokens."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(["model", "text", "tokens", "window", "site", "layer", "kind", "channel", "minimum", "maximum"])
    head = [safe_cell(report.model), safe_cell(report.text_name), report.tokens, report.window]
    for site in report.sites.values():
        for channel, (low, high) in enumerate(zip(site.low.tolist(), site.high.tolist(), strict=True)):
            writer.writerow([*head, safe_cell(site.site), site.layer, site.kind, channel, repr(low), repr(high)])
    return out.getvalue()


def safe_cell(text: str) -> str:
    """Return a text cell that no spreadsheet takes for a formula."""
    text = str(text)
    return "'" + text if text.startswith(FORMULA_STARTS) else text


def report_json(runs: Sequence[Any]) -> str:
    """Write all runs of a session as one JSON object: recipes, quantisation reports, measurements."""
    entries = [
        {
            "key": r.key,
            "label": r.label,
            "recipe": r.recipe.to_record() if r.recipe else None,
            "quantize": r.quantize.to_dict() if r.quantize else None,
            "evaluation": r.evaluation.to_dict() if r.evaluation else None,
        }
        for r in runs
    ]
    return json.dumps({"runs": entries}, indent=2, allow_nan=False)

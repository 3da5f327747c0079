"""Reports as rows of cells, and rows as files: pure functions, no widgets.

A cell is a text, or an `Estimate`, which tables show in italics after "≈" so that it is never taken for a measurement.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.view import texts
from app.view.figure import bytes_text, number

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\0")


@dataclass(frozen=True)
class Estimate:
    """A figure from a formula, not from a measurement."""

    text: str


Cell = str | Estimate
Rows = list[list[Cell]]


def outlier_rows(outliers: Sequence[Any]) -> list[list[Any]]:
    """Rows of the outliers table: layer, site, channel, minimum, maximum, ratio."""
    return [
        [o.layer, texts.SITE_LABELS.get(o.kind, o.kind), o.channel, number(o.low), number(o.high), number(o.ratio)]
        for o in outliers
    ]


def cluster_rows(view: Any) -> list[list[Any]]:
    """Rows of the cluster table: index, channels, low, high, scale, zero point."""
    return [[c.index, c.size, number(c.low), number(c.high), number(c.scale), c.zero_point] for c in view.clusters]


NUMBER_HEADERS = [
    "run",
    "perplexity",
    "KLD to base",
    "same top token",
    "bytes measured",
    "by formula",
    "KV cache / token",
    "speed",
]


def number_rows(runs: Sequence[tuple[str, Any, float | None]]) -> Rows:
    """Rows of the comparison: one per run (name, EvalReport, estimated weight bytes or None). One window has no error."""
    return [
        [
            name,
            f"{number(e.perplexity, 4)} ± {number(e.perplexity_stderr, 2) if e.perplexity_stderr else '–'}",
            "–" if e.kld_mean is None else f"{number(e.kld_mean)} nats",
            "–" if e.same_top_token is None else f"{100 * e.same_top_token:.1f} %",
            bytes_text(e.weight_bytes),
            Estimate(bytes_text(estimate)) if estimate else "–",
            bytes_text(e.kv_bytes_per_token),
            f"{number(e.tokens_per_second)} tokens/s",
        ]
        for name, e, estimate in runs
    ]


def several_models(models: Sequence[Any]) -> str:
    """What to know before comparing runs of several models (ModelInfo, None where unknown); nothing for one."""
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
    """Rows of the speed table: (name, GenerationReport, SpeedLimit) of each run."""
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
    """The whole model as a row of table 2: SparsityReport; `paper`: a published row to put beside it."""
    share = report.active_parameters / report.parameters if report.parameters else 0.0
    active = f"{_millions(report.active_parameters)} of {_millions(report.parameters)} ({100 * share:.0f} %)"
    rows: Rows = [["this model", *_shares(report.total), active]]
    return [*rows, [paper[0], *(f"{share} %" for share in paper[1]), paper[2]]] if paper else rows


def sparsity_layer_rows(report: Any) -> Rows:
    """Zeros of every layer: layer, projections, overall."""
    return [[str(index), *_shares(layer)] for index, layer in enumerate(report.layers)]


def _shares(zeros: Any) -> list[Cell]:
    return [f"{100 * getattr(zeros, name):.1f} %" for name in (*texts.PROJECTION_LABELS, "overall")]


def _millions(count: int) -> str:
    return f"{number(count / 1e6)} M"


def fallback_rows(report: Any) -> Rows:
    """Weights that were rounded another way than asked: layer, weight, reason."""
    return [
        [str(entry.layer), name, str(weight.fallback)]
        for entry in report.layers
        for name, weight in entry.weights.items()
        if weight.fallback
    ]


def stage_rows(report: Any) -> Rows:
    """Seconds per stage of a quantisation."""
    return [[name, f"{number(seconds)} s"] for name, seconds in report.stages.items()]


def backend_rows(report: Any) -> Rows:
    """Which kernels run how many layers, and why."""
    return [[use.backend, str(use.layers), use.reason] for use in report.backends]


def ranges_csv(report: Any) -> str:
    """Every channel's range as CSV; each row repeats which model, text and tokens it is from."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(["model", "text", "tokens", "window", "site", "layer", "kind", "channel", "minimum", "maximum"])
    head = [safe_cell(report.model), safe_cell(report.text_name), report.tokens, report.window]
    for site in report.sites.values():
        for channel, (low, high) in enumerate(zip(site.low.tolist(), site.high.tolist(), strict=True)):
            writer.writerow([*head, safe_cell(site.site), site.layer, site.kind, channel, repr(low), repr(high)])
    return out.getvalue()


def safe_cell(text: str) -> str:
    """A text cell no spreadsheet takes for a formula."""
    text = str(text)
    return "'" + text if text.startswith(FORMULA_STARTS) else text


def report_json(runs: Sequence[Any]) -> str:
    """All runs of a session as one JSON object: recipes, quantisation reports, measurements."""
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

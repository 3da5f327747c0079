"""R0: RPTQ with one order of the residual stream for all layers against an order of each layer: perplexity, and a pass's time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.common import Result, interleave
from benchmarks.quality_table import protocol_of, text_of
from core import Calibration, Clusters, QuantRecipe, Workbench
from core.evaluation.paired import paired
from core.evaluation.perplexity import hidden_windows
from core.evaluation.windows import evaluation_windows

SCHEMES = (("W4A4", "strict"), ("W4A8", "default"))
COUNTS = (8, 16, 32)
CALIBRATION_TOKENS = 8192
ROUNDS = 15


def run(model: str, tokens: int) -> Iterator[Result]:
    """Yield the ratio of perplexities for each scheme and g, then that of the times of one window's pass."""
    protocol, bench = protocol_of(model), Workbench()
    text, calibration = text_of(protocol.evaluation, 0), text_of(protocol.calibration, 1)
    options = {"text": text, "tokens": tokens, "window": protocol.window, "reference": model}
    plain = bench.evaluate(model, **{**options, "reference": None})
    for scheme, variant in SCHEMES:
        for count in COUNTS:
            recipe = QuantRecipe(
                model=model,
                scheme=scheme,
                variant=variant,
                clusters=Clusters.uniform(count),
                calibration=Calibration(calibration, CALIBRATION_TOKENS, protocol.window),
            )
            made = [bench.quantize(replace(recipe, order=order)) for order in ("layer", "shared")]
            layer, shared = (bench.evaluate(report.key, **options) for report in made)
            compared = paired(shared, layer)
            note = (
                f"perplexity {shared.perplexity:.2f} against {layer.perplexity:.2f}, float32 {plain.perplexity:.2f}; "
                f"{compared.verdict()}; KLD {shared.kld_mean:.4f} against {layer.kld_mean:.4f}; {shared.tokens:,} tokens in "
                f"windows of {shared.window}"
            )
            yield Result(
                f"order {scheme} {variant}, g={count}: perplexity over that of an order by layer",
                compared.ratio,
                "an order by layer",
                seconds=made[1].seconds,
                note=note,
                weight_bits=made[1].effective_weight_bits,
                kv_bytes=shared.kv_bytes_per_token,
                text=protocol.text,
            )
    parts, _ = evaluation_windows(bench.model(model), text, tokens=protocol.window, window=protocol.window)
    models = [bench.model(report.key).model for report in made]
    gathers, none = interleave(*(partial(hidden_windows, each, parts) for each in models), rounds=ROUNDS)
    yield Result("order: time over that with an order by layer", none / gathers, "an order by layer", seconds=none)

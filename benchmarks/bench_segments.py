"""Measure what few segments cost: perplexity and time of RPTQ with exact, aligned and power-of-two scales."""

from __future__ import annotations

from benchmarks.common import Result, interleave
from core import Calibration, QuantRecipe
from core.evaluation.perplexity import score
from core.workbench import Workbench, evaluation_windows

CASES = (("W4A8", "default", ("exact", "aligned")), ("W4A4", "strict", ("exact", "aligned", "pow2")))


def run(model: str) -> list[Result]:
    """Measure time over float32 and perplexity on two windows of 512; GPTQ weights, 2,048 calibration tokens."""
    bench = Workbench()
    base = bench.model(model)
    parts, _ = evaluation_windows(base, "sotu", tokens=1024, window=512)
    plain_perplexity = score(base.model, parts).perplexity
    results = []
    for scheme, variant, modes in CASES:
        reports = [
            bench.quantize(
                QuantRecipe(model=model, scheme=scheme, variant=variant, segments=mode, calibration=Calibration(tokens=2048))
            )
            for mode in modes
        ]
        models = [bench.model(report.key).model for report in reports]
        plain, *times = interleave(lambda: score(base.model, parts), *(lambda m=m: score(m, parts) for m in models), rounds=5)
        exact = score(models[0], parts).perplexity
        for mode, report, quantized, seconds in zip(modes, reports, models, times, strict=True):
            perplexity = score(quantized, parts).perplexity
            backends = ", ".join(f"{use.backend} × {use.layers}" for use in report.backends)
            note = f"perplexity {perplexity:.2f}, exact {perplexity / exact - 1:+.1%}, float32 {plain_perplexity:.2f}; {backends}"
            job = f"segments {scheme} {variant}, {mode}: time over float32"
            results.append(Result(job, seconds / plain, f"float32, {plain:.2f} s", "", seconds, note=note))
    return results

"""Perplexity with quantised activations over float32 perplexity on the same windows."""

from __future__ import annotations

from benchmarks.common import Result, interleave
from core import Calibration, QuantRecipe
from core.evaluation.perplexity import score
from core.pipeline import Workbench, evaluation_windows


def run(model: str) -> list[Result]:
    """Time over float32 of W4A4 (g = 32, reference backend) and of RTN W4A4 (int8 backend), window by window."""
    bench = Workbench()
    base = bench.model(model)
    parts, _ = evaluation_windows(base, "sotu", tokens=1024, window=512)
    results = []
    for method in ("rptq", "rtn"):
        recipe = QuantRecipe(model=model, method=method, weights="rtn", calibration=Calibration(tokens=1024))
        report = bench.quantize(recipe)
        quantized = bench.model(report.key)
        plain, ours = interleave(lambda: score(base.model, parts), lambda q=quantized: score(q.model, parts), rounds=5)
        backends = ", ".join(f"{use.backend} × {use.layers}" for use in report.backends)
        results.append(
            Result(
                f"perplexity, {report.label}: time over float32",
                ours / plain,
                f"transformers float32, {plain:.2f} s",
                "≤ 1.10×" if method == "rptq" else "",
                seconds=ours,
                note=backends,
            )
        )
    return results

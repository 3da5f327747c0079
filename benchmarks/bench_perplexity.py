"""C3 and C4: perplexity with quantised activations over float32 perplexity on the same windows."""

from __future__ import annotations

import copy

import torch

from benchmarks.common import Result, interleave, limits
from core import Calibration, QuantRecipe
from core.evaluation.perplexity import score
from core.pipeline import Workbench, evaluation_windows


def run(model: str) -> list[Result]:
    """Time over float32 of W4A4 in float arithmetic (C3) and of RTN W4A4 in integers (C4), pass by pass, and of bfloat16."""
    bench = Workbench()
    base = bench.model(model)
    parts, _ = evaluation_windows(base, "sotu", tokens=512, window=512)
    models = {}
    for method in ("rptq", "rtn"):
        report = bench.quantize(QuantRecipe(model=model, method=method, weights="rtn", calibration=Calibration(tokens=1024)))
        models[method] = (report, bench.model(report.key).model)
    half = copy.deepcopy(base.model).to(torch.bfloat16)
    (fake, fake_model), (real, real_model) = models["rptq"], models["rtn"]
    plain, c3, c4, bf16 = interleave(*(lambda m=m: score(m, parts) for m in (base.model, fake_model, real_model, half)), rounds=5)
    operations = 2 * parts.numel() * sum(p.numel() for p in base.model.parameters())
    results = []
    for number, report, seconds, target in (("C3", fake, c3, "≤ 1.05×"), ("C4", real, c4, "≤ 0.75×")):
        backends = ", ".join(f"{use.backend} × {use.layers}" for use in report.backends)
        rate = limits().float32 if number == "C3" else limits().int8
        peer, limit = f"transformers float32, {plain:.2f} s", operations / rate / seconds
        job = f"{number} perplexity, {report.label}: time over float32"
        results.append(Result(job, seconds / plain, peer, target, seconds, note=backends, limit_fraction=limit))
        results.append(Result(f"{number} the same, time over bfloat16", seconds / bf16, f"transformers bfloat16, {bf16:.2f} s"))
    return results

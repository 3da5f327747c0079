"""C3 and C4: time of perplexity with quantised activations over that of float32, on the same windows."""

from __future__ import annotations

import functools

import torch

from benchmarks.common import Result, absent, interleave, limits
from benchmarks.peers import LlamaCpp, score_transformers, torchao, transformers_model
from core import Calibration, QuantRecipe
from core.evaluation.perplexity import score
from core.workbench import Workbench, evaluation_windows


def run(model: str) -> list[Result]:
    """Measure W4A4 in float arithmetic (C3) and RTN W4A4 in integers (C4), as time over float32, bfloat16 and the peers."""
    bench = Workbench()
    base = bench.model(model)
    parts, _ = evaluation_windows(base, "sotu", tokens=512, window=512)
    models = {}
    for method in ("rptq", "rtn"):
        report = bench.quantize(QuantRecipe(model=model, method=method, weights="rtn", calibration=Calibration(tokens=1024)))
        models[method] = (report, bench.model(report.key).model)
    (fake, fake_model), (real, real_model) = models["rptq"], models["rtn"]
    theirs, narrow = (transformers_model(base, dtype) for dtype in (torch.float32, torch.bfloat16))
    passes, peers = [functools.partial(score_transformers, theirs, parts)], ["transformers bfloat16"]
    passes += [functools.partial(score, m, parts) for m in (fake_model, real_model)]
    passes.append(functools.partial(score_transformers, narrow, parts))
    if (changed := torchao(theirs, activations=True)) is not None:
        passes.append(functools.partial(score_transformers, changed, parts))
        peers.append("torchao int8")
    if LlamaCpp.runs(model):
        llama = LlamaCpp(context=parts.shape[1], logits="all")
        passes.append(lambda: [llama.read(window.tolist()) for window in parts])
        peers.append("llama.cpp Q4_0, head included")
    plain, c3, c4, *others = interleave(*passes, rounds=5)
    operations = 2 * parts.numel() * sum(p.numel() for p in theirs.parameters())
    results = []
    for number, report, seconds, target in (("C3", fake, c3, "≤ 1.05×"), ("C4", real, c4, "≤ 0.75×")):
        backends = ", ".join(f"{use.backend} × {use.layers}" for use in report.backends)
        rate = limits().float32 if number == "C3" else limits().int8
        peer, limit = f"transformers float32, {plain:.2f} s", operations / rate / seconds
        job = f"{number} perplexity, {report.label}: time over float32"
        results.append(Result(job, seconds / plain, peer, target, seconds, note=backends, limit_fraction=limit))
        for name, found in zip(peers, others, strict=True):
            results.append(Result(f"{number} the same, time over a peer", seconds / found, f"{name}, {found:.2f} s"))
    return results + absent("C4 perplexity", "torchao", "llama_cpp")

"""C5: tokens per second of decoding with packed 4-bit weights, against transformers in float and bfloat16."""

from __future__ import annotations

import functools
import time
from statistics import median

import torch

from benchmarks.common import Result, absent, interleave, limits
from benchmarks.peers import LlamaCpp, torchao, transformers_model
from core import Calibration, QuantRecipe
from core.models.decoder import CACHE_FIELD
from core.models.io.quantized import modules_of
from core.workbench import Workbench

CONTEXT, NEW = 64, 16
TARGETS = {"float32": "≥ 1.7× (stretch 2.2×)", "bfloat16": "≥ 2×"}


@torch.inference_mode()
def decode(model: torch.nn.Module) -> float:
    """Measure seconds per token of NEW greedy tokens after CONTEXT; the prompt's pass is not counted."""
    out = model(torch.arange(1, CONTEXT + 1)[None], use_cache=True)
    token, cache = out.logits[:, -1:].argmax(-1), {CACHE_FIELD: out[CACHE_FIELD]}
    start = time.perf_counter()
    for _ in range(NEW):
        token = model(token, **cache).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / NEW


def run(model: str) -> list[Result]:
    """Measure W4A16 by rounding (one scale per row) and by RPTQ in aligned runs; torchao and llama.cpp where installed."""
    bench = Workbench()
    base = bench.model(model)
    recipes = {
        "RTN W4A16": QuantRecipe(model=model, method="rtn", scheme="W4A16", weights="rtn", calibration=Calibration(tokens=512)),
        "RPTQ W4A16, aligned": QuantRecipe(
            model=model, scheme="W4A16", weights="rtn", segments="aligned", calibration=Calibration(tokens=512)
        ),
    }
    models = {name: transformers_model(base, getattr(torch, name)) for name in ("float32", "bfloat16")}
    backends = {}
    for name, recipe in recipes.items():
        report = bench.quantize(recipe)
        models[name] = bench.model(report.key).model
        backends[name] = ", ".join(f"{use.backend} × {use.layers}" for use in report.backends)
    if (peer := torchao(models["float32"], activations=False)) is not None:
        models["torchao int8 weights"] = peer
    entries = {name: functools.partial(decode, m) for name, m in models.items()}
    if LlamaCpp.runs(model):
        entries["llama.cpp Q4_0"] = functools.partial(_decode_llama_cpp, LlamaCpp(context=CONTEXT + NEW, logits="last"))
    times: dict[str, list[float]] = {name: [] for name in entries}
    interleave(*(lambda n=n, f=f: times[n].append(f()) for n, f in entries.items()), rounds=5)
    seconds = {name: median(found[1:]) for name, found in times.items()}
    head = base.model.get_output_embeddings().weight
    results = []
    for name in recipes:
        packed = sum(layer.out_features * layer.in_features for layer in modules_of(models[name])) // 2
        limit = (packed + head.numel() * head.element_size()) / limits().copy / seconds[name]
        for peer in [p for p in entries if p not in recipes]:
            judged = peer == "float32"
            results.append(
                Result(
                    f"C5 decode {name}",
                    seconds[peer] / seconds[name],
                    f"{peer}, {1 / seconds[peer]:.1f} tokens/s",
                    TARGETS.get(peer, ""),
                    seconds[name],
                    note=f"{backends[name]}; {1 / seconds[name]:.1f} tokens/s, head in float32" if judged else "",
                    limit_fraction=limit if judged else None,
                )
            )
    return results + absent("C5 decode", "torchao", "llama_cpp")


def _decode_llama_cpp(peer: LlamaCpp) -> float:
    """Measure what `decode` measures, in llama.cpp."""
    peer.read(list(range(1, CONTEXT + 1)))
    start = time.perf_counter()
    peer.write(NEW)
    return (time.perf_counter() - start) / NEW

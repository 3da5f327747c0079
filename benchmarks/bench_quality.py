"""Q1 to Q4: perplexity of saved rotated models over float32, on WikiText-2 and C4, and the time of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.common import Result, absent, interleave
from benchmarks.quality_table import CALIBRATION_TOKENS, evaluation_texts, protocol_of, text_of
from core import Calibration, QuantRecipe, Workbench
from core.distill_report import DistillReport
from core.evaluation.perplexity import hidden_windows
from core.evaluation.windows import evaluation_windows
from core.options import DistillOptions

JOBS = (
    ("Q1 W4A4 untrained", {"scheme": "W4A4", "variant": "strict"}, "≤ 1.50× at 5.12 weight bits, 5,760 KV bytes"),
    ("Q2 W4A4 distilled", {"scheme": "W4A4", "variant": "strict"}, "≤ 1.30×, 15 minutes more; C4's at most 1.15 of WikiText-2's"),
    ("Q3 W4A4KV", {"scheme": "W4A4KV"}, "≤ 1.10×"),
    ("Q4 W3A3KV", {"scheme": "W3A3KV"}, "≤ 1.45×"),
)
"""Jobs, their recipes, and the targets, which are those of smollm2-135m."""
DISTILL_STEPS = 36
"""Steps of Q2 at FULL_TOKENS evaluated tokens; fewer tokens take fewer steps."""
FULL_TOKENS = 32_768


def run(model: str, tokens: int) -> Iterator[Result]:
    """Yield each recipe's results: quantised, saved, loaded, and measured on `tokens` tokens of each text."""
    protocol = protocol_of(model)
    texts = evaluation_texts(protocol)
    calibration = Calibration(text_of(protocol.calibration, 1), CALIBRATION_TOKENS, protocol.window)
    options = {"tokens": tokens, "window": protocol.window}
    bench = Workbench()
    plain = {name: bench.evaluate(model, text=text, **options) for name, text in texts.items()}
    steps = max(1, min(DISTILL_STEPS, round(DISTILL_STEPS * tokens / FULL_TOKENS)))
    for job, fields, target in JOBS:
        own = fields | ({"distill": DistillOptions(steps=steps)} if "distilled" in job else {})
        made = bench.quantize(QuantRecipe(model=model, method="rotation", calibration=calibration, **own))
        folder = bench.open_saved(folder=made.folder).key if made.folder else made.key
        for name, text in texts.items():
            found = bench.evaluate(folder, text=text, reference=model, **options)
            note = (
                f"perplexity {found.perplexity:.2f} ± {found.perplexity_stderr:.2f}, float32 {plain[name].perplexity:.2f}, "
                f"ln ratio ± {found.ln_ratio_stderr or 0:.4f}, KLD {found.kld_mean:.4f}, same top {found.same_top_token:.1%}; "
                f"{found.tokens:,} tokens in windows of {found.window}"
            )
            note += _distillation(made.distilled) if made.distilled else ""
            yield Result(
                job,
                found.perplexity / plain[name].perplexity,
                "float32",
                target,
                made.seconds,
                note=note,
                weight_bits=made.effective_weight_bits,
                kv_bytes=found.kv_bytes_per_token,
                text=name,
            )
        yield from absent(f"{job}, C4", "pyarrow")
    yield pass_time(bench, model)


def pass_time(bench: Workbench, model: str) -> Result:
    """Measure the time of a W4A4 pass over one window of sotu, with rotated channels over that with RPTQ's clusters.

    Weights are rounded to nearest, which takes less time to make and as long to run.
    """
    window, _ = evaluation_windows(bench.model(model), "sotu", tokens=512, window=512)
    passes, backends = [], []
    for method in ("rotation", "rptq"):
        recipe = QuantRecipe(model, method=method, variant="strict", weights="rtn", calibration=Calibration(tokens=1024))
        made = bench.quantize(recipe)
        passes.append(partial(hidden_windows, bench.model(made.key).model, window))
        backends.append(", ".join(f"{use.backend} × {use.layers}" for use in made.backends))
    seconds, peer = interleave(*passes, rounds=11)
    note = f"{backends[0]} against {backends[1]}; {window.numel()} tokens"
    job = "W4A4 strict pass of rotation: time over RPTQ's"
    return Result(job, seconds / peer, f"RPTQ, {peer:.2f} s", "≤ 1.00×", seconds, note=note)


def _distillation(found: DistillReport) -> str:
    before, after = found.before, found.after
    said = f"; {found.steps} steps of {found.tokens:,} tokens in {found.seconds:.0f} s, step {found.best} kept; held out: KLD "
    said += f"{before.kld:.4f} → {after.kld:.4f}, perplexity {before.perplexity:.2f} → {after.perplexity:.2f}"
    return said + (f"; {found.other} {before.other_perplexity:.2f} → {after.other_perplexity:.2f}" if found.other else "")

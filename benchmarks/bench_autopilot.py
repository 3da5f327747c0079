"""P6: bits of single layers, allocated by predictions, against a uniform recipe at equal bytes.

`ratio` is the KLD of the allocation's packed GPTQ model over that of the uniform recipe whose bytes it may spend, on 8,192 tokens
(the probe has read 512); `median_ratio` is its predicted over its verified KLD.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.common import Result
from benchmarks.instrument import CALIBRATION, EMBEDDED, TEXT
from core import QuantRecipe
from core.recipe import Overrides
from core.workbench import Workbench

SPENT, VERIFIED = (("W4A4KV", False), ("W4A4", False), ("W4A4", True), ("W3A3KV", False)), 8192


def run(model: str) -> Iterator[Result]:
    """Measure allocations at the bytes of each scheme on the embedded Llama and on `model`."""
    return (_autopilot(name, scheme, spread) for name in (EMBEDDED, model) for scheme, spread in SPENT)


def _autopilot(model: str, scheme: str, spread: bool) -> Result:
    """Verify an allocation at the bytes of a uniform scheme: GPTQ, packed, evaluated beside the uniform model.

    Args: spread: let activations share their bits too.
    """
    start, bench = time.perf_counter(), Workbench()
    recipe = QuantRecipe(model, scheme=scheme, calibration=CALIBRATION)
    found = bench.allocate(recipe, activations=spread)
    klds, sizes = [], []
    for made in (recipe, replace(recipe, overrides=Overrides.from_dict(found.overrides))):
        report = bench.evaluate(bench.quantize(made).key, text=TEXT, tokens=VERIFIED, reference=model)
        klds.append(report.kld_mean)
        sizes.append(report.weight_bytes + found.context * report.kv_bytes_per_token)
    uniform, own = klds
    note = f"verified {own:.4f} nats, uniform {uniform:.4f}; predicted {found.predicted:.4f}; "
    note += f"{sizes[1]:,} bytes stored, uniform {sizes[0]:,}"
    seconds = time.perf_counter() - start
    job = f"P6 autopilot, {model} {scheme}{', activations too' if spread else ''}"
    return Result(job, own / uniform, "uniform, equal bytes", "≤ 0.85", seconds, note=note, median_ratio=found.predicted / own)

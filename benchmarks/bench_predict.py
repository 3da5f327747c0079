"""P1 to P6: predicted divergence against measured, what predictions take, and bits allocated by them.

A swap is one site or one linear layer quantised, everything else in float. `ratio` is the rank correlation (Spearman) of
predicted and measured KLD, `median_ratio` the median of predicted over measured. Of an allocation, `ratio` is the KLD of its
packed GPTQ model over that of the uniform recipe whose bytes it may spend, on 8,192 tokens (the probe has read 512), and
`median_ratio` its predicted over its verified KLD.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median, quantiles

import torch

from benchmarks.common import Result
from core import Bits, Calibration, Clusters, QuantRecipe
from core.calibration.data import calibration_tokens
from core.evaluation.windows import evaluation_windows
from core.methods import method
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model
from core.probe.measure import measure, swap
from core.probe.plans import cell_name
from core.probe.predict import predict
from core.probe.probe import Probe, build_probe
from core.probe.statistics import Observed, Statistics, collect_statistics
from core.recipe import INPUT_SITE, SITES, Overrides
from core.workbench import Workbench

EMBEDDED, TEXT, TOKENS, WINDOW = "quantscope-llama-6m", "sotu", 512, 256
CALIBRATION = Calibration(TEXT, 2048, 512)
SPENT, VERIFIED = (("W4A4KV", False), ("W4A4", False), ("W4A4", True), ("W3A3KV", False)), 8192
SWAP_BITS, SWAP_CLUSTERS, MIXES, DRAGS = (3, 4, 6), (1, 32), 20, 40


@dataclass
class Tool:
    """A probe of a model, its statistics, and what they took."""

    loaded: LoadedModel
    windows: torch.Tensor
    calibration: torch.Tensor
    recipe: QuantRecipe

    @classmethod
    def of(cls, name: str) -> Tool:
        """Load a model and cut the texts."""
        loaded, recipe = load_model(name), QuantRecipe(name, calibration=CALIBRATION, weights="rtn")
        windows, _ = evaluation_windows(loaded, TEXT, tokens=TOKENS, window=WINDOW)
        calibration, _ = calibration_tokens(loaded, recipe.calibration, recipe.seed, True)
        return cls(loaded, windows, calibration, recipe)

    @cached_property
    def probe(self) -> Probe:
        """The probe."""
        return build_probe(self.loaded.model, self.windows)

    @cached_property
    def statistics(self) -> Statistics:
        """What recipes plan on."""
        observed = Observed.by(method(self.recipe.method), self.recipe, len(self.loaded.model.blocks))
        return collect_statistics(self.loaded.model, self.calibration, observed)

    @property
    def arguments(self) -> tuple:
        """What predictions and measurements begin with."""
        return self.probe, self.loaded.model, self.statistics


def run(model: str) -> list[Result]:
    """Run all jobs on the embedded Llama and on `model`."""
    results = []
    for job, name, marks in (("embedded", EMBEDDED, (2, 0.5, 0.5)), (model.split("-")[0], model, (20, 3, 4))):
        tool = Tool.of(name)
        results += _times(tool, job, marks)
        layers = range(0, len(tool.loaded.model.blocks), 1 if name == EMBEDDED else 7)
        number = "P1 swaps embedded" if name == EMBEDDED else f"P2 swaps {job}"
        results += _swaps(tool, number, layers)
        results += [_mixes(tool, job)]
        if name == EMBEDDED:
            results += [_drag(tool, "P4 drag, embedded", 0.06, 0.03)]
        results += [_autopilot(name, scheme, spread) for scheme, spread in SPENT]
    return results + [_drag(_wide(), "P4 drag, 4,096 channels", 0.15, 0.08)]


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


def _swaps(tool: Tool, job: str, layers: Iterable[int]) -> list[Result]:
    """Compare predicted and measured swaps of sites and of weights."""
    pairs: dict[str, list[tuple[float, float]]] = {"activations and KV cache": [], "weights": []}
    for count in SWAP_CLUSTERS:
        for bits in SWAP_BITS:
            recipe = replace(
                tool.recipe,
                scheme="custom",
                bits=Bits(*[bits] * 9),
                clusters=Clusters.uniform(count),
            )
            cells = predict(*tool.arguments, recipe).cells
            for layer in layers:
                for cell in (*SITES, *INPUT_SITE):
                    kind = "weights" if cell in INPUT_SITE else "activations and KV cache"
                    found = swap(*tool.arguments, recipe, layer, cell).kld
                    pairs[kind].append((cells[cell_name(layer, cell)], found))
    targets = {"activations and KV cache": "≥ 0.98, median 0.9 … 1.1", "weights": "≥ 0.95, median 0.8 … 1.2"}
    return [_agreement(f"{job}, {kind}", found, targets[kind]) for kind, found in pairs.items()]


def _mixes(tool: Tool, job: str) -> Result:
    """Compare predicted and measured divergence of random recipes."""
    draw, pairs = random.Random(0), []
    for _ in range(MIXES):
        bits = Bits(*(draw.choice((3, 4, 5, 6, 8, 16)) for _ in range(9)))
        clusters = Clusters(*(draw.choice((1, 4, 16, 32)) for _ in range(5)))
        recipe = replace(tool.recipe, scheme="custom", bits=bits, clusters=clusters)
        pairs.append((predict(*tool.arguments, recipe).total, measure(*tool.arguments, recipe).kld))
    return _agreement(f"P3 mixes, {job}", pairs, "≥ 0.95")


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


def _wide() -> Tool:
    """A random model of one layer of 4,096 channels."""
    sizes = {"hidden_size": 4096, "intermediate_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    loaded = tiny_model("llama", layers=1, head_dim=128, **sizes)
    recipe = QuantRecipe(loaded.name, calibration=CALIBRATION, weights="rtn")
    windows, _ = evaluation_windows(loaded, TEXT, tokens=TOKENS, window=WINDOW)
    calibration, _ = calibration_tokens(loaded, recipe.calibration, recipe.seed, True)
    return Tool(loaded, windows, calibration, recipe)


def _agreement(job: str, pairs: Sequence[tuple[float, float]], target: str) -> Result:
    """Make the line of a comparison: rank correlation, median ratio, quartiles."""
    ratios = [predicted / found for predicted, found in pairs]
    low, middle, high = quantiles(ratios, n=4)
    note = f"predicted / measured {middle:.3f} ({low:.2f} – {high:.2f}), KLD {min(m for _, m in pairs):.2g} … "
    note += f"{max(m for _, m in pairs):.2g} nats"
    return Result(job, spearman(pairs), f"{len(pairs)} measured", target, note=note, median_ratio=middle)


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Compute the rank correlation of pairs without ties."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in zip(*pairs, strict=True)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])

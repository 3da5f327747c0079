"""Quantise a model layer by layer: observe, plan, apply, and pass the quantised outputs to the next layer.

    1  run the float block on the outputs of the quantised layers before it: ranges, Hessians, float outputs
        2  plan and apply
        3  run the quantised block on the same inputs: the next layer's inputs, and this layer's error

A method that asks for it also gets the sites of the unquantised model, which then runs beside the quantised one. Where all layers
share one order of the residual stream, a pass over the unquantised model comes first, and every block takes that order before
step 1. One float block and the hidden states of all windows are in memory at a time. Source: RPTQ's published pipeline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from core.calibration.observe import LINEAR_SITES, BlockInputs, Recorder, embed, observe_layers
from core.errors import NumericError
from core.methods.base import FLOAT_FIRST_TOKENS, LayerPlan, LayerStatistics, Method, Streams
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.progress import Progress, part, silent
from core.quant.observer import decibels
from core.recipe import FLOAT_BITS, INPUT_SITE, QuantRecipe
from core.report import WeightError

ORDER_TIME = 0.15
"""Share of a run's time that choosing one order for all layers takes: a float pass, beside those of every layer's own steps."""


@dataclass(frozen=True)
class LayerOutcome:
    """One layer's plan, how its weights were quantised, and the error of its output against the float block, dB."""

    plan: LayerPlan
    weights: dict[str, WeightError]
    output_sqnr_db: float


@dataclass
class Stopwatch:
    """A clock that adds up the seconds of named stages."""

    seconds: dict[str, float] = field(default_factory=dict)
    _start: float = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last start or lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._start
        self._start = now


@torch.inference_mode()
def quantize_layers(
    model: CausalModel,
    method: Method,
    recipe: QuantRecipe,
    windows: Tensor,
    *,
    progress: Progress = silent,
) -> tuple[CausalModel, list[LayerOutcome], dict[str, float]]:
    """Quantise every decoder layer of a float model.

    Args:
        windows: [S, T] int64 calibration tokens.
    Returns: (a model sharing all but its layers with `model`, one outcome per layer, seconds per stage).
    Raises: NumericError if a site or a layer's output has NaN or infinity.
    """
    count = len(model.blocks)
    watch, outcomes, blocks = Stopwatch(), [], []
    watch.start()
    ahead = part(progress, 0.0, ORDER_TIME)
    order = method.residual_order(observe_layers(model, windows, skip_first=FLOAT_FIRST_TOKENS, progress=ahead), recipe)
    inputs = embed(model, windows)
    if order is not None:
        progress, order = part(progress, ORDER_TIME, 1.0), order.to(model.device)
        inputs = [replace(item, hidden=item.hidden[..., order]) for item in inputs]
    hidden = exact = [item.hidden for item in inputs]
    for index, start in enumerate(model.blocks):

        def tell(stage: str, within: float, title: str = f"Layer {index + 1} of {count}", done: int = index) -> None:
            progress(f"{title}: {stage}", (done + within) / count)

        own = recipe.for_layer(index)
        block = start if start.is_float or method.keeps_ternary else start.dequantized()
        block = block if order is None else block.in_order(order)
        stats, outputs = _observe(block, hidden, inputs, method, own, tell)
        sites: dict[str, list[Tensor]] = {}
        if method.uses_exact_inputs(recipe):
            exact = _watch_inputs(block, exact, inputs, sites)
        entering = [BlockInputs(states, item.rotary) for states, item in zip(hidden, inputs, strict=True)]
        stats = replace(stats, streams=Streams(entering, sites))
        watch.lap("observe")
        tell("clustering and scales", 0.4)
        plan = method.plan_layer(stats, own, block.spec)
        watch.lap("cluster and plan")
        tell("ternary weights" if method.keeps_ternary else f"{recipe.weights.upper()} weights", 0.5)
        quantized, errors = method.apply_layer(block, plan, stats, own)
        quantized.to(model.device)  # it was built on the CPU, where plans are made
        watch.lap("weights")
        hidden = run_layer(quantized, hidden, inputs, lambda part, say=tell: say("quantised pass", 0.7 + 0.3 * part))
        for linear in quantized.linears().values():
            linear.release()
        outcomes.append(LayerOutcome(plan, errors, _output_sqnr(outputs, hidden, index)))
        blocks.append(quantized)
        watch.lap("propagate")
    return model.with_blocks(blocks, order), outcomes, watch.seconds


def _observe(
    block: DecoderBlock,
    hidden: list[Tensor],
    inputs: list[BlockInputs],
    method: Method,
    recipe: QuantRecipe,
    tell: Callable[[str, float], None],
) -> tuple[LayerStatistics, list[Tensor]]:
    """Measure one float block's statistics and outputs; a method that calibrates with a quantised softmax needs a second pass."""

    skip = method.sink_tokens(recipe)

    def record(wants_hessians: bool, stage: str, softmax_bits: int) -> tuple[Recorder, list[Tensor]]:
        windows = sum(len(h) for h in hidden)
        recorder = Recorder(block.layer_index, windows, hessians_wanted=wants_hessians, skip_first=skip, seed=recipe.seed)
        return recorder, watch_layer(
            block, hidden, inputs, [recorder], lambda part: tell(stage, 0.35 * part), softmax_bits=softmax_bits
        )

    wanted, softmax_bits = method.uses_hessians(recipe), method.calibration_softmax_bits(recipe)
    recorder, outputs = record(wanted and softmax_bits >= FLOAT_BITS, "observing", FLOAT_BITS)
    calibrated = recorder
    if softmax_bits < FLOAT_BITS:
        calibrated, _ = record(wanted, "calibrating", softmax_bits)
    return layer_statistics(block, recorder, calibrated), outputs


def watch_layer(
    block: DecoderBlock,
    hidden: list[Tensor],
    inputs: list[BlockInputs],
    recorders: Sequence[Callable[[str, Tensor], None]],
    tell: Callable[[float], None] = lambda part: None,
    *,
    softmax_bits: int = FLOAT_BITS,
) -> list[Tensor]:
    """Run a block while recorders see its sites, its softmax output quantised to `softmax_bits`. Returns: its outputs."""

    def see(site: str, x: Tensor) -> None:
        for recorder in recorders:
            recorder(site, x)

    before, block.attention.softmax_bits = block.attention.softmax_bits, softmax_bits
    try:
        with block.slots.watch(see):
            return run_layer(block, hidden, inputs, tell)
    finally:
        block.attention.softmax_bits = before


def _watch_inputs(
    block: DecoderBlock, hidden: list[Tensor], inputs: list[BlockInputs], kept: dict[str, list[Tensor]]
) -> list[Tensor]:
    """Run a float block and put what reaches its linear layers into `kept`. Returns: its outputs."""

    def see(site: str, x: Tensor) -> None:
        if site in LINEAR_SITES:
            kept.setdefault(site, []).append(x)

    with block.slots.watch(see):
        return run_layer(block, hidden, inputs)


def layer_statistics(block: DecoderBlock, clustered: Recorder, calibrated: Recorder) -> LayerStatistics:
    """Collect what recorders have seen of a block: ranges for clusters and for scales, the latter's Hessians, and importance."""
    linears, ranges = block.linears(), clustered.ranges()
    importance = {site: linears[name].dequantized_weight().square().mean(0).cpu() for name, site in INPUT_SITE.items()}
    scales = ranges if calibrated is clustered else calibrated.ranges()
    return LayerStatistics(ranges, scales, calibrated.hessians, importance)


def run_layer(
    block: DecoderBlock, hidden: list[Tensor], inputs: list[BlockInputs], tell: Callable[[float], None] = lambda part: None
) -> list[Tensor]:
    """Run a block on every batch of hidden states, with the rotation of `inputs`."""
    outputs = []
    for i, (states, item) in enumerate(zip(hidden, inputs, strict=True)):
        tell(i / len(inputs))
        outputs.append(block(states, item.rotary))
    return outputs


def _output_sqnr(signal: list[Tensor], approximation: list[Tensor], layer: int) -> float:
    """Compute a layer's signal-to-noise ratio, quantised against float outputs, 10 log10(Σ y² / Σ (y - ŷ)²)."""
    power = math.fsum(float(y.square().sum(dtype=torch.float64)) for y in signal)
    noise = math.fsum(float((y - z).square().sum(dtype=torch.float64)) for y, z in zip(signal, approximation, strict=True))
    if not math.isfinite(power + noise):
        raise NumericError(f"The output of layer {layer} is not finite: use more bits, or another model.", code="E-NUM-NAN")
    return decibels(power, noise)

"""Quantise a model layer by layer: observe, plan, apply, and pass the quantised outputs to the next layer.

    1  run the float block on the outputs of the quantised layers before it: ranges, Hessians, float outputs
        2  plan and apply
        3  run the quantised block on the same inputs: the next layer's inputs, and this layer's error

A method that asks for it also gets the sites of the unquantised model, which then runs beside the quantised one. Where all layers
share one order of the residual stream, a pass over the unquantised model comes first, and every block takes that order before
step 1. A step needs one float block and the hidden states of all windows. Source: RPTQ's published pipeline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from core.bits import input_site, kind_of
from core.calibration.observe import LINEAR_SITES, BlockInputs, Recorder, embed, observe_layers
from core.errors import InputError, NumericError
from core.memory import give_back
from core.methods.base import FLOAT_FIRST_TOKENS, LayerPlan, LayerStatistics, Method, Streams
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.slots import ROUTES
from core.progress import Progress, part, silent
from core.quant.observer import decibels
from core.recipe import FLOAT_BITS, QuantRecipe
from core.report import WeightError

ORDER_TIME = 0.15
"""Share of a run's time that choosing one order for all layers takes: a float pass, beside those of every layer's own steps."""


@dataclass(frozen=True)
class LayerOutcome:
    """One layer's plan, how its weights were quantised, and the error of its output against the float block, dB.

    `routed`: calibration tokens that each expert's ranges were taken from, none where there is one MLP.
    """

    plan: LayerPlan
    weights: dict[str, WeightError]
    output_sqnr_db: float
    routed: tuple[int, ...] = ()


@dataclass
class Stopwatch:
    """A clock that adds up the seconds of named stages, from when it is made."""

    seconds: dict[str, float] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._start
        self._start = now


class LayerSteps:
    """The layers of a float model, quantised one after another; what passes from one to the next is kept here.

    Args:
        shell: the model that the layers belong to; its embeddings are used, its blocks are not.
        windows: [S, T] int64 calibration tokens.
        count: number of layers, for the progress.
        order: [D] int64, of the residual stream in all quantised layers (`Method.residual_order`); None: the model's own.
    Attributes:
        index: of the layer that comes next.
        inputs: what enters it behind the quantised layers: hidden states [B, T, D] of each batch, with the rotation.
        exact: hidden states that enter it in the unquantised model, where the method asks for them; None elsewhere.
        watch: the clock of the stages; None for a new one.
    """

    def __init__(
        self,
        shell: CausalModel,
        method: Method,
        recipe: QuantRecipe,
        windows: Tensor,
        count: int,
        progress: Progress = silent,
        *,
        order: Tensor | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        require_method(shell, method, recipe)
        self.method, self.recipe, self.count, self.progress = method, recipe, count, progress
        self.index, self.watch, self._device = 0, watch or Stopwatch(), shell.device
        self.inputs = embed(shell, windows)
        self.order = None if order is None else order.to(self._device)
        if self.order is not None:
            self.inputs = self._with_hidden([states[..., self.order] for states in self.hidden])
        self.exact = self.hidden if method.uses_exact_inputs(recipe) else None

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states of `inputs`."""
        return [item.hidden for item in self.inputs]

    def resume(self, index: int, hidden: list[Tensor], exact: list[Tensor] | None) -> None:
        """Continue with layer `index`, which these hidden states enter, as `hidden` and `exact` were before it."""
        self.index, self.exact, self.inputs = index, exact, self._with_hidden(hidden)

    def step(self, start: DecoderBlock) -> tuple[DecoderBlock, LayerOutcome]:
        """Quantise the next layer, and pass the hidden states through it.

        Args: start: its float or ternary block, which is not changed.
        Raises: NumericError if a site or the layer's output has NaN or infinity.
        """
        index, title, method, watch = self.index, f"Layer {self.index + 1} of {self.count}", self.method, self.watch

        def tell(stage: str, within: float) -> None:
            self.progress(f"{title}: {stage}", (index + within) / self.count)

        with torch.inference_mode():  # a decorator would hold `start` until the end
            own = self.recipe.for_layer(index)
            block = start if start.is_float or method.keeps_ternary else start.dequantized()
            block = block if self.order is None else block.in_order(self.order)
            stats, outputs, routed = _observe(block, self.hidden, self.inputs, method, own, tell)
            sites: dict[str, list[Tensor]] = {}
            if self.exact is not None:
                self.exact = _watch_inputs(block, self.exact, self.inputs, sites)
            stats = replace(stats, streams=Streams(self.inputs, sites))
            give_back()
            watch.lap("observe")
            tell("clustering and scales", 0.4)
            plan = method.plan_layer(stats, own, block.spec)
            watch.lap("cluster and plan")
            tell("ternary weights" if method.keeps_ternary else f"{self.recipe.weights.upper()} weights", 0.5)
            quantized, errors = method.apply_layer(block, plan, stats, own)
            quantized.to(self._device)  # it was built on the CPU, where plans are made
            del start, block, stats, sites  # the working copies of the quantised layer take their place
            give_back()
            watch.lap("weights")
            hidden = run_layer(quantized, self.hidden, self.inputs, lambda part: tell("quantised pass", 0.7 + 0.3 * part))
            for linear in quantized.linears().values():
                linear.release()
            outcome = LayerOutcome(plan, errors, _output_sqnr(outputs, hidden, index), routed)
            self.resume(index + 1, hidden, self.exact)
            watch.lap("propagate")
            return quantized, outcome

    def _with_hidden(self, hidden: list[Tensor]) -> list[BlockInputs]:
        return [BlockInputs(states, item.rotary) for states, item in zip(hidden, self.inputs, strict=True)]


def require_method(model: CausalModel, method: Method, recipe: QuantRecipe) -> None:
    """Check that a method quantises this kind of model. Raises: InputError E-PARAM-METHOD."""
    if model.decoder.adapter.experts is not None and (recipe.plus is not None or not method.takes_experts):
        named = recipe.method if recipe.plus is None else f"{recipe.method} with parts of rotation"
        rule = f"The method {named} does not quantise mixtures of experts: choose rptq without additions, or rtn."
        raise InputError(rule, code="E-PARAM-METHOD")


@torch.inference_mode()
def quantize_layers(
    model: CausalModel,
    method: Method,
    recipe: QuantRecipe,
    windows: Tensor,
    *,
    progress: Progress = silent,
) -> tuple[CausalModel, list[LayerOutcome], dict[str, float]]:
    """Quantise every decoder layer of a float model that is in memory.

    Args:
        windows: [S, T] int64 calibration tokens.
    Returns: (a model sharing all but its layers with `model`, one outcome per layer, seconds per stage).
    Raises: as `LayerSteps.step`.
    """
    watch, ahead = Stopwatch(), part(progress, 0.0, ORDER_TIME)
    order = method.residual_order(observe_layers(model, windows, skip_first=FLOAT_FIRST_TOKENS, progress=ahead), recipe)
    progress = progress if order is None else part(progress, ORDER_TIME, 1.0)
    steps = LayerSteps(model, method, recipe, windows, len(model.blocks), progress, order=order, watch=watch)
    done = [steps.step(block) for block in model.blocks]
    return model.with_blocks([block for block, _ in done], steps.order), [outcome for _, outcome in done], steps.watch.seconds


def _observe(
    block: DecoderBlock,
    hidden: list[Tensor],
    inputs: list[BlockInputs],
    method: Method,
    recipe: QuantRecipe,
    tell: Callable[[str, float], None],
) -> tuple[LayerStatistics, list[Tensor], tuple[int, ...]]:
    """Measure one float block's statistics and outputs, and the tokens that each expert got.

    A method that calibrates with a quantised softmax needs a second pass, and an expert that no token was sent to another one, in
    which it gets all of them.
    """

    skip = method.sink_tokens(recipe)
    routed: list[tuple[int, ...]] = []

    def record(wants_hessians: bool, stage: str, softmax_bits: int) -> tuple[Recorder, list[Tensor]]:
        windows = sum(len(h) for h in hidden)
        recorder = Recorder(block.layer_index, windows, hessians_wanted=wants_hessians, skip_first=skip, seed=recipe.seed)
        outputs = watch_layer(
            block, hidden, inputs, [recorder], lambda part: tell(stage, 0.35 * part), softmax_bits=softmax_bits
        )
        routed.append(tuple(recorder.routed.get(site, 0) for site in block.spec.sites if site != kind_of(site)))
        if 0 in routed[-1]:
            _watch_unrouted(block, hidden, inputs, recorder, [i for i, count in enumerate(routed[-1]) if not count])
        return recorder, outputs

    wanted, softmax_bits = method.uses_hessians(recipe), method.calibration_softmax_bits(recipe)
    recorder, outputs = record(wanted and softmax_bits >= FLOAT_BITS, "observing", FLOAT_BITS)
    calibrated = recorder
    if softmax_bits < FLOAT_BITS:
        calibrated, _ = record(wanted, "calibrating", softmax_bits)
    return layer_statistics(block, recorder, calibrated), outputs, routed[0]


def _watch_unrouted(
    block: DecoderBlock, hidden: list[Tensor], inputs: list[BlockInputs], recorder: Recorder, experts: list[int]
) -> None:
    """Show a recorder the sites of experts as if every token were sent to them."""
    chosen = torch.tensor(experts, device=hidden[0].device)

    def see(site: str, x: Tensor) -> Tensor | None:
        if site == ROUTES:
            x = chosen.expand(*x.shape[:2], -1)
        elif site == kind_of(site):
            return None
        recorder(site, x)
        return x

    with block.slots.watch(see):
        run_layer(block, hidden, inputs)


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
    squares: dict[str, list[Tensor]] = {}
    for name, linear in linears.items():  # experts read one mlp_in: their mean
        squares.setdefault(input_site(name), []).append(linear.dequantized_weight().square().mean(0).cpu())
    importance = {site: torch.stack(found).mean(0) for site, found in squares.items()}
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

"""The layer-by-layer pass of a method over a model: observe, plan, apply, carry the quantised outputs on.

    1  the float block on the inputs that the quantised layers before it produce: ranges, Hessians, float outputs
    2  plan and apply
    3  the quantised block on the same inputs: what the next layer will see, and this layer's error

One float block and the hidden states of all windows are in memory at a time. Source: RPTQ's published pipeline.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.calibration.observe import LINEAR_SITES, Progress, Recorder, embed, silent
from core.config import QuantRecipe
from core.methods.base import LayerPlan, LayerStatistics, Method, WeightNote
from core.methods.build import INPUT_SITE
from core.models.adapter import ModelAdapter
from core.models.block import DecoderBlock
from core.models.shell import BlockInputs, with_layers


@dataclass(frozen=True)
class LayerOutcome:
    """One layer's plan, how its weights were quantised, and the error of its output against the float block, dB."""

    plan: LayerPlan
    weights: dict[str, WeightNote]
    output_sqnr_db: float


@dataclass
class Stopwatch:
    """Seconds spent per named stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    _start: float = 0.0

    def start(self) -> None:
        """Begin timing."""
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last start or lap to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._start
        self._start = now


@torch.inference_mode()
def quantize_layers(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    method: Method,
    recipe: QuantRecipe,
    windows: Tensor,
    *,
    sink_tokens: int = 0,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, list[LayerOutcome], dict[str, float]]:
    """Quantise every decoder layer of a float model.

    Args:
        windows: [S, T] int64 calibration tokens.
        sink_tokens: first positions of each window left out of the ranges.
    Returns: (a model sharing all but its layers with `model`, one outcome per layer, seconds per stage).
    Raises: NumericError if a site has NaN or infinity.
    """
    layers, spec = adapter.decoder_layers(model), adapter.spec(model.config)
    watch, outcomes, blocks = Stopwatch(), [], []
    watch.start()
    inputs = embed(model, adapter, windows)
    hidden = [item.hidden for item in inputs]
    for index, layer in enumerate(layers):
        title = f"Layer {index + 1} of {len(layers)}"
        progress(f"{title}: observing", index / len(layers))
        block = DecoderBlock.from_layer(layer, adapter, spec, index)
        recorder = Recorder(
            index, len(windows), hessians_wanted=recipe.weights == "gptq", skip_first=sink_tokens, seed=recipe.seed
        )
        outputs = [_run(block, h, item, index, recorder, title, progress) for h, item in zip(hidden, inputs, strict=True)]
        stats = LayerStatistics(recorder.ranges(), recorder.hessians, _importance(block))
        watch.lap("observe")
        progress(f"{title}: clustering and scales", (index + 0.4) / len(layers))
        plan = method.plan_layer(stats, recipe, spec)
        watch.lap("cluster and plan")
        progress(f"{title}: {recipe.weights.upper()} weights", (index + 0.5) / len(layers))
        quantized, notes = method.apply_layer(block, plan, stats, recipe)
        watch.lap("weights")
        noise = power = 0.0
        for i, item in enumerate(inputs):
            hidden[i] = _run(quantized, hidden[i], item, index, None, title, progress)
            power += float(outputs[i].square().sum(dtype=torch.float64))
            noise += float((outputs[i] - hidden[i]).square().sum(dtype=torch.float64))
        _release(quantized)
        outcomes.append(LayerOutcome(plan, notes, _decibels(power, noise)))
        blocks.append(quantized)
        watch.lap("propagate")
    return with_layers(model, adapter, blocks), outcomes, watch.seconds


def _run(
    block: DecoderBlock, hidden: Tensor, item: BlockInputs, index: int, recorder: Recorder | None, title: str, progress: Progress
) -> Tensor:
    progress(f"{title}: {'observing' if recorder else 'quantised pass'}", None)
    return block(hidden, **item.kwargs[index], observe=recorder)


def _importance(block: DecoderBlock) -> dict[str, Tensor]:
    linears = block.linears()
    return {site: linears[name].weight.square().mean(0) for name, site in INPUT_SITE.items() if site in LINEAR_SITES}


def _release(block: DecoderBlock) -> None:
    for linear in block.linears().values():
        linear.release()


def _decibels(power: float, noise: float) -> float:
    return float("inf") if noise == 0 else float(10 * torch.log10(torch.tensor(power / noise, dtype=torch.float64)))

"""Estimate what a run takes before it starts, from shapes and from one layer that is timed here.

One middle layer is quantised by the code of a real run on m calibration tokens, and then scored on a few, with and without a
reference. A run of L layers on M tokens takes

    observe, propagate           L t M / m        t: seconds of the stage in the timed layer
    cluster and plan, weights    L t

and a measurement on N tokens N (L passes + heads). Memory is counted from the tensors that live at once. The timed layer reads
the embedded tokens, not the output of the layers before it: the work is the same, the numbers are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from core.calibration.observe import BATCH_TOKENS, SAMPLED_ROWS
from core.evaluation.memory import layer_floats, linear_bytes, linear_sizes, recipe_bytes, working_bytes
from core.evaluation.perplexity import Reference, hidden_windows, score
from core.evaluation.run_report import RunEstimate
from core.evaluation.shapes import Shape
from core.memory import free_memory_bytes
from core.methods import method
from core.methods.sequential import quantize_layers
from core.models.decoder import CausalModel
from core.progress import Progress, silent
from core.recipe import FLOAT_BITS, INPUT_SITE, Overrides, QuantRecipe

TIMED_TOKENS = 1024
"""Calibration tokens of the timed layer, in whole windows."""
REPEATS = 2
"""Every timing is made twice; the faster one counts, as the first is also a warm-up."""
PASSES = ("observe", "propagate")
"""Stages whose time grows with the tokens."""
FLOAT_BYTES = 4
HEAD_TOKENS = 64
"""Tokens that a score is timed on: its cost per token does not depend on them."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one layer and of one token's heads on this machine.

    Attributes:
        stages: of `quantize_layers` on so many `tokens`.
        float_token, quantized_token: of one layer's pass, original and quantised; working copies exist already.
        prepare: of making one layer's working copies, which take `working_bytes`.
        score_token, compare_token: of head and loss, alone and against a reference.
        seconds: what the timing took.
    """

    stages: dict[str, float]
    tokens: int
    float_token: float
    quantized_token: float
    prepare: float
    working_bytes: int
    score_token: float
    compare_token: float
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers, for a store that counts what it keeps."""
        return 8 * (8 + len(self.stages))


def timed_recipe(recipe: QuantRecipe, layers: int) -> tuple[int, QuantRecipe]:
    """Choose the layer to time, the middle one of those without overrides, and return its index and the recipe of all such."""
    plain = [i for i in range(layers) if i not in recipe.overrides.layers] or list(range(layers))
    index = plain[len(plain) // 2]
    return index, replace(recipe.for_layer(index), overrides=Overrides())


@torch.inference_mode()
def time_layer(model: CausalModel, recipe: QuantRecipe, windows: Tensor, *, progress: Progress = silent) -> Timing:
    """Time one layer of a float model on the first of some calibration windows [S, T] int64."""

    def tell(stage: str, fraction: float | None = None) -> None:
        progress("Timing one layer", None)

    quantizer = method(recipe.method)  # its import, which a run needs too, is not timed
    start = time.perf_counter()
    index, own = timed_recipe(recipe, len(model.blocks))
    one, length = model.with_blocks([model.blocks[index]]), windows.shape[1]
    few = min(max(1, TIMED_TOKENS // length), len(windows))
    tries = []
    for _ in range(REPEATS):
        made, _, stages = quantize_layers(one, quantizer, own, windows[:few], progress=tell)
        tries.append(stages)
    stages = {name: min(found[name] for found in tries) for name in stages}
    window = windows[:1]
    first = _seconds(lambda: hidden_windows(made, window), 1)
    quantized = _seconds(lambda: hidden_windows(made, window))
    plain = _seconds(lambda: hidden_windows(one, window))
    part = window[:, : HEAD_TOKENS + 1]
    reference = Reference("", one.get_output_embeddings(), hidden_windows(one, part))
    passes = part.shape[1] / length
    alone = _seconds(lambda: score(one, part)) - passes * plain
    against = _seconds(lambda: score(made, part, reference=reference)) - passes * quantized
    return Timing(
        stages,
        few * length,
        plain / length,
        quantized / length,
        max(0.0, first - quantized),
        working_bytes(made),
        max(0.0, alone) / HEAD_TOKENS,
        max(0.0, against) / HEAD_TOKENS,
        time.perf_counter() - start,
    )


def _seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def estimate_run(
    shape: Shape, recipe: QuantRecipe, timing: Timing, windows: tuple[int, int], compared: tuple[int, int]
) -> RunEstimate:
    """Estimate a run on this machine.

    Args:
        windows: calibration windows and their length, S and T. compared: the same of the text that is measured on.
    """
    layers, tokens, measured = shape.layers, windows[0] * windows[1], compared[0] * compared[1]
    grows = dict.fromkeys(PASSES, tokens / timing.tokens)
    stages = {name: layers * seconds * grows.get(name, 1) for name, seconds in timing.stages.items()}
    plain, quantized = (layers * each * measured for each in (timing.float_token, timing.quantized_token))
    stored, per_token = recipe_bytes(shape, recipe)
    now = psutil.Process().memory_info().rss
    own = [recipe.for_layer(index) for index in range(layers)]
    return RunEstimate(
        stages=stages,
        seconds=sum(stages.values()),
        compare_seconds=plain + quantized + layers * timing.prepare + timing.compare_token * measured,
        original_seconds=plain + timing.score_token * measured,
        tokens=tokens,
        compared=measured,
        memory_bytes=now,
        added_bytes=added_bytes(shape, recipe, windows),
        measuring_bytes=measuring_bytes(shape, recipe, compared, timing.working_bytes),
        free_bytes=free_memory_bytes(),
        model_bytes=round(stored),
        packed_bytes=sum(linear_bytes(shape, name, layer) for layer in own for name in INPUT_SITE),
        kv_bytes_per_token=round(per_token),
        timing_seconds=timing.seconds,
    )


def added_bytes(shape: Shape, recipe: QuantRecipe, windows: tuple[int, int]) -> int:
    """Count the bytes that live beside the original model at the peak of quantising: the finished layers, hidden states, and

        observing      statistics, a batch
        rounding       statistics, the reordered layer unless it becomes ternary, a matrix
        passing on     working copies of the layer, a batch

    whichever is the most; see `step_bytes`.
    """
    parts, layer = step_bytes(shape, recipe, windows), 4 * layer_floats(shape)
    kept, batch, shaped = parts["statistics"], parts["batch"], 0 if method(recipe.method).keeps_ternary else layer
    most = max(kept + batch, kept + shaped + parts["rounding"], layer + batch)
    return _own_bytes(shape, recipe) + parts["hidden states"] + most


def step_bytes(shape: Shape, recipe: QuantRecipe, windows: tuple[int, int]) -> dict[str, int]:
    """Count the bytes that live while one layer is quantised, beside its own:

        hidden states    what enters it, and what both its versions give; a fourth set where it is observed twice
        statistics       its Hessians and sampled rows
        batch            of the MLP's inner tensors, gate, up and two copies
        rounding         of a matrix [N, K]: four copies for its error, or for GPTQ one, and two of its Hessian

    Args: windows: S and T.
    """
    count, length = windows
    sizes = linear_sizes(shape).values()
    batch = min(count, max(1, BATCH_TOKENS // length)) * length
    heads = shape.heads * shape.head_dim
    inputs = (shape.hidden, heads, shape.hidden, *(shape.ffn for _ in range(shape.experts or 1)))
    own = method(recipe.method)
    solved, calibrations = own.uses_hessians(recipe), 1 + (own.calibration_softmax_bits(recipe) < FLOAT_BITS)
    kept = calibrations * SAMPLED_ROWS * (sum(inputs) + heads + 2 * shape.kv_heads * shape.head_dim)
    kept += solved * sum(width**2 for width in inputs)
    rounding = max(n * k * 4 if not solved else max(n * k * 4, n * k + k * k * 2, n * k * 3 + k * k) for n, k in sizes)
    states = (2 + calibrations) * count * length * shape.hidden
    if own.uses_exact_inputs(recipe):  # sites and hidden states of the original beside the run, two matrices per site
        states += count * length * (sum(inputs) + 2 * shape.hidden)
        kept += 2 * sum(width**2 for width in inputs)
    counts = {"hidden states": states, "statistics": kept, "batch": 4 * batch * shape.ffn, "rounding": rounding}
    return {name: FLOAT_BYTES * floats for name, floats in counts.items()}


def measuring_bytes(shape: Shape, recipe: QuantRecipe, compared: tuple[int, int], working: int) -> int:
    """Count the bytes that live beside the original model while the quantised one is measured against it: its layers, the working
    copies of their backends, the reference's hidden states, and five tensors of one window's logits or four of the MLP's.

    Args: compared: S and T. working: bytes of one layer's working copies.
    """
    count, length = compared
    floats = count * length * shape.hidden + length * max(5 * shape.vocab, 4 * shape.ffn)
    return _own_bytes(shape, recipe) + shape.layers * working + FLOAT_BYTES * floats


def _own_bytes(shape: Shape, recipe: QuantRecipe) -> int:
    """Count the bytes of a quantised model that it does not share with the original, whose float parts it copies for one order of
    all layers."""
    shared = 0 if recipe.order == "shared" else FLOAT_BYTES * (shape.parameters - shape.decoder_weights)
    return round(recipe_bytes(shape, recipe)[0]) - shared

"""Distil a quantised model: lower its divergence from the float model by training what it stores.

    loss = mean over tokens of KL(float || quantised)        each block is computed again in the backward pass

Adafactor (arXiv:1804.04235) changes each tensor as soon as its gradient is complete, and the gradient is dropped: beside both
models there are the latent weights, one number for each row and column of them, the hidden states between the layers, and what
one layer needs. Step t moves by lr / √t of a tensor's root mean square, or of 1 for `TrainedBlock.relative`. Every few steps the
packed model is judged on held-out windows, and the best one is kept. Nothing depends on the number of steps: a run that is
stopped is the run of as many steps.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adafactor
from torch.utils.checkpoint import checkpoint

from core.calibration.observe import embed
from core.distill.state import DistillState, read_state, write_state
from core.distill.texts import HELD_OUT, DistillTexts
from core.distill.trained import TrainedBlock
from core.distill_report import DistillMark, DistillReport
from core.errors import Cancelled, NumericError
from core.evaluation.run_estimate import Timing
from core.folders import remove
from core.methods.sequential import run_layer
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.options import DistillOptions
from core.progress import Progress, silent

logger = logging.getLogger(__name__)

JUDGED_EVERY = 4
"""Steps between two judgements, of which each costs about as much as one step."""
CHUNK = 128
"""Tokens whose logits are in memory at once."""


@torch.inference_mode(False)
def distill_model(
    base: CausalModel,
    quantized: CausalModel,
    options: DistillOptions,
    texts: DistillTexts,
    *,
    state: Path | None = None,
    progress: Progress = silent,
) -> tuple[CausalModel, DistillReport]:
    """Train a quantised model towards the float model that it was made from; neither is changed.

    Args:
        state: folder to continue from and to write to after each judgement, removed at the end; None for none. A run that is
            continued gives the same bits as one that was not interrupted.
        progress: raising Cancelled in it, or Ctrl-C, ends the training and keeps the best model so far; the state stays.
    Returns: (the best model: packed, sharing with `quantized` what is outside the blocks; what was measured).
    Raises: NumericError when the loss is not finite.
    """
    start, steps = time.perf_counter(), options.steps
    run = _Run(base, quantized, options, texts)
    found = None if state is None else read_state(state, quantized)
    stopped = False
    try:
        if found is None:
            run.judge(progress)
        else:
            run.restore(found)
        while len(run.kept.losses) < steps:
            run.step(progress)
            done = len(run.kept.losses)
            if done % JUDGED_EVERY == 0 or done == steps:
                run.judge(progress)
                if state is not None:
                    progress(f"Distilling: saving the state after step {done}", done / steps)
                    write_state(state, run.snapshot())
    except (Cancelled, KeyboardInterrupt):
        if not run.kept.marks:
            raise
        stopped = True
    if state is not None and not stopped:
        remove(state)
    kept = run.kept
    taken = kept.marks[-1].step
    report = DistillReport(
        taken,
        kept.best,
        len(run.batch(0)) * texts.train.shape[1],
        texts.names,
        texts.held_out.numel(),
        texts.other_name,
        tuple(kept.losses[:taken]),
        tuple(kept.marks),
        run.held_out.float_perplexity,
        None if run.other is None else run.other.float_perplexity,
        time.perf_counter() - start,
        stopped and taken < steps,
    )
    return (quantized.with_blocks(kept.blocks) if kept.blocks else quantized), report


def distill_seconds(options: DistillOptions, timing: Timing, layers: int, window: int) -> float:
    """Estimate the seconds of a distillation on windows of so many tokens, from the timing of one layer.

    A step is five passes of the original: one of its own, two of the trained model, and two that gradients of inputs and weights
    take; of the head, which is not trained, one less.
    """
    tokens, judged = max(1, options.tokens // window) * window, 2 * HELD_OUT * window
    step = tokens * (5 * layers * timing.float_token + 4 * timing.score_token)
    judgement = judged * (layers * timing.quantized_token + timing.compare_token) + 2 * layers * timing.prepare
    return options.steps * step + (2 + options.steps // JUDGED_EVERY) * judgement


class _Windows:
    """Windows [S, T] that packed models are judged on, with the float model's states before its head, S tensors [T, D]."""

    def __init__(self, base: CausalModel, windows: Tensor) -> None:
        self.base, self.windows = base, windows
        self.targets = _hidden(base, list(base.blocks), windows)
        self.float_perplexity = self.judge(self.targets)[1]

    def judge(self, hidden: list[Tensor]) -> tuple[float, float]:
        """Return the mean divergence, nats per token, and the perplexity of a model with these states before its head."""
        totals = torch.zeros(2, dtype=torch.float64)
        with torch.inference_mode():
            for states, target, window in zip(hidden, self.targets, self.windows, strict=True):
                right = window.to(states.device)[1:]
                for part, goal, token in zip(*(t.split(CHUNK) for t in (states[:-1], target[:-1], right)), strict=True):
                    divergence, log_p = _divergence(self.base.decoder.head, part, goal)
                    loss = -log_p.gather(1, token[:, None]).sum(dtype=torch.float64)
                    totals += torch.stack([divergence.sum(dtype=torch.float64), loss]).cpu()
        kld, loss = (totals / (self.windows.shape[0] * (self.windows.shape[1] - 1))).tolist()
        return kld, math.exp(min(loss, 700.0))


class _Run:
    """A distillation between two steps; `kept` is what has been found so far."""

    def __init__(self, base: CausalModel, quantized: CausalModel, options: DistillOptions, texts: DistillTexts) -> None:
        self.base, self.quantized, self.options, self.texts = base, quantized, options, texts
        self.held_out = _Windows(base, texts.held_out)
        self.other = None if texts.other is None else _Windows(base, texts.other)
        self.blocks = [TrainedBlock(block) for block in quantized.blocks]
        self.optimizers: dict[str, Adafactor] = {}
        self.kept = DistillState()
        for index, block in enumerate(self.blocks):
            for name, tensor in block.own.items():
                least = 1.0 if name in block.relative else 1e-3  # of the size that a change is relative to
                own = self.optimizers[f"{index}.{name}"] = Adafactor([tensor], lr=options.lr, eps=(None, least))
                tensor.register_post_accumulate_grad_hook(partial(_change, own))

    def batch(self, step: int) -> Tensor:
        """Return the windows [B, T] of a step; after the last one comes the first again."""
        train = self.texts.train
        count = min(max(1, self.options.tokens // train.shape[1]), len(train))
        return train[(torch.arange(count) + step * count) % len(train)]

    def step(self, progress: Progress) -> None:
        """Take one step. Raises: NumericError when the loss is not finite."""
        done, steps = len(self.kept.losses), self.options.steps
        title = f"Distilling: step {done + 1} of {steps}"
        title += f", loss {self.kept.losses[-1]:.3f}, held-out divergence {self.kept.marks[-1].kld:.4f}" if done else ""
        for own in self.optimizers.values():
            own.param_groups[0]["lr"] = self.options.lr / math.sqrt(done + 1)
        windows, decoder = self.batch(done).to(self.base.device), self.base.decoder

        def run(block: TrainedBlock, x: Tensor, rotary: Rotary) -> Tensor:
            progress(title, done / steps)  # in both passes, so that a stop need not wait for the step's end
            return block(x, rotary)

        with torch.no_grad():
            targets = decoder(windows).flatten(0, 1)
            x, rotary = decoder.enter(windows, torch.arange(windows.shape[1], device=self.base.device)[None])
        x = x.detach().requires_grad_()  # a block that is given no gradient may overwrite its input
        for block in self.blocks:
            x = checkpoint(run, block, x, rotary, use_reentrant=False, preserve_rng_state=False)
        parts = zip(decoder.leave(x).flatten(0, 1).split(CHUNK), targets.split(CHUNK), strict=True)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        loss = torch.stack([checkpoint(_total, decoder.head, *part, **options) for part in parts]).sum() / len(targets)
        if not bool(loss.isfinite()):
            raise NumericError(f"The loss of distillation is not finite at step {done + 1}: use a smaller lr.", code="E-NUM-NAN")
        loss.backward()
        self.kept.losses.append(float(loss.detach()))

    def judge(self, progress: Progress) -> None:
        """Measure the packed model of this moment, and keep it if it is the best on the held-out windows."""
        done = len(self.kept.losses)
        progress(f"Distilling: judging after step {done}", done / self.options.steps)
        blocks = [block.packed() for block in self.blocks] if done else list(self.quantized.blocks)
        texts = [text for text in (self.held_out, self.other) if text is not None]
        found = [text.judge(_hidden(self.base, blocks, text.windows)) for text in texts]
        mark = DistillMark(done, *(value for pair in found for value in pair))
        if self.kept.marks and mark.kld < min(m.kld for m in self.kept.marks):
            self.kept = replace(self.kept, best=done, blocks=blocks)
        self.kept.marks.append(mark)

    def snapshot(self) -> DistillState:
        """Return all that the next step depends on."""
        tensors = {}
        for index, block in enumerate(self.blocks):
            for name, tensor in block.own.items():
                key = f"{index}.{name}"
                tensors[key] = tensor.detach()
                tensors |= {f"{key}/{part}": value for part, value in self.optimizers[key].state[tensor].items()}
        return replace(self.kept, tensors=tensors)

    @torch.no_grad()
    def restore(self, state: DistillState) -> None:
        """Continue from a state."""
        kept: dict[str, dict[str, Tensor]] = {key: {} for key in self.optimizers}
        for path, value in state.tensors.items():
            key, _, part = path.partition("/")
            kept[key][part] = value
        for index, block in enumerate(self.blocks):
            for name, tensor in block.own.items():
                key = f"{index}.{name}"
                tensor.copy_(kept[key].pop(""))
                self.optimizers[key].state[tensor] = kept[key]
        self.kept = replace(state, tensors={})


def _change(optimizer: Adafactor, tensor: Tensor) -> None:
    """Change the optimizer's tensor by its gradient, which is complete, and drop the gradient."""
    optimizer.step()
    optimizer.zero_grad()


@torch.inference_mode()
def _hidden(model: CausalModel, blocks: list[DecoderBlock], windows: Tensor) -> list[Tensor]:
    """Run blocks on windows [S, T], one after another, without keeping their working copies: S states before the head, [T, D]."""
    inputs = embed(model, windows)
    hidden = [item.hidden for item in inputs]
    for block in blocks:
        hidden = run_layer(block, hidden, inputs)
        for linear in block.linears().values():
            linear.release()
    return [states for batch in hidden for states in model.decoder.leave(batch)]


def _divergence(head: nn.Module, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(float || model) of each token [n] and the model's log probabilities [n, V] of states before the head [n, D]."""
    log_p, log_q = (torch.log_softmax(head(t).float(), dim=-1) for t in (states, targets))
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1), log_p


def _total(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return _divergence(head, states, targets)[0].sum()

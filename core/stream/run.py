"""Quantise a model layer by layer from its files: `core.quantize` for models larger than the memory.

    read layer i -> observe, plan, round -> write it and what leaves it -> forget it

The result and its report are those of a run in memory, bit for bit. At the peak there are, in bytes,

    embeddings and head + 2 layers + hidden states and statistics of one layer + the larger of a batch and rounding
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.cache import in_use
from core.calibration.data import calibration_tokens
from core.errors import InputError, ResourceError
from core.evaluation.describe import LayerRecord, quantize_report
from core.evaluation.memory import layer_floats, module_bytes, recipe_bytes
from core.evaluation.run_estimate import step_bytes
from core.evaluation.shapes import Shape, shape_of
from core.folders import bytes_in, remove, state_of
from core.memory import free_memory_bytes, freed_at_once
from core.methods import method
from core.methods.sequential import LayerSteps
from core.models.block import DecoderBlock
from core.models.export.fit import loads_in
from core.models.io.catalog import resolve
from core.models.io.layerwise import LayerReader
from core.models.io.load import check_device
from core.models.io.preflight.folder import SAVED_WEIGHTS
from core.models.io.quantized import block_entry, block_from, check_output, save_tensors, shell_tensors, write_description
from core.models.io.shards import shard_name, write_index
from core.progress import Progress, silent
from core.recipe import QuantRecipe
from core.report import QuantizeReport
from core.stages import described_windows, made_from
from core.storage import atomic_dir
from core.stream.work import WorkFolder, open_work

STEM = SAVED_WEIGHTS.partition(".")[0]


def quantize_streamed(
    recipe: QuantRecipe,
    folder: Path | str,
    *,
    device: str = "cpu",
    allow_local: bool = True,
    note: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> QuantizeReport:
    """Quantise the recipe's model into a folder, with one of its layers in memory at a time.

    A run that was stopped or killed continues behind its last whole layer when it is called again: see `core.stream.work`.

    Args:
        folder: as in `save_quantized`; work in progress lies beside it, in `<folder>.stream`.
        note: called with a line on what the run needs, and with one on where it continues.
    Raises: as `load_model`, `observe` and `save_quantized`; as `open_work`; ResourceError E-MEM, E-DISK before the start where
        memory or disk are too small; InputError E-PARAM-ORDER, -DISTILL for what needs all layers at once.
    """
    if recipe.order == "shared":
        raise InputError(
            "One order for all layers needs a pass over the whole model first, which is not streamed: choose the order layer.",
            code="E-PARAM-ORDER",
        )
    if recipe.distill is not None:
        raise InputError("A distillation needs the whole model in memory: leave distill out.", code="E-PARAM-DISTILL")
    check_output(folder)
    check_device(device, torch.float32)
    target, start = Path(os.path.realpath(folder)), time.perf_counter()
    resolved = resolve(recipe.model, revision=recipe.revision, progress=progress, allow_local=allow_local)
    with in_use(resolved.path), freed_at_once():
        reader = LayerReader(resolved, torch.float32, device, progress)
        recipe.overrides.require_layers(reader.count)
        windows, source = calibration_tokens(reader.shell, recipe.calibration, recipe.seed, allow_local)
        identity = {
            "recipe": recipe.hash,
            "version of the model": f"{resolved.revision} {state_of(str(resolved.path))}",
            "calibration text": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "device": device,
        }
        with open_work(target, identity, reader.count) as work:
            note(_check_room(reader, recipe, windows, work))
            if work.done:
                note(f"Continuing after layer {work.done} of {reader.count}, which {work.path.name!r} holds.")
            before = sum(work.facts(work.done - 1)["stages"].values()) if work.done else 0.0
            _quantize_rest(reader, recipe, windows, work, progress)
            facts = [work.facts(index) for index in range(reader.count)]
            report = quantize_report(
                reader.shell,
                recipe,
                [LayerRecord.from_dict(entry["record"]) for entry in facts],
                calibration=described_windows(windows, source, recipe.seed),
                stages=facts[-1]["stages"],
                seconds=before + time.perf_counter() - start,
            )
            progress("Saving the quantised model", None)
            structure = [entry["structure"] for entry in facts]
            made = made_from(reader.shell, _SavedModel(reader, work, structure), report.label)
            saved = replace(report, folder=str(folder), loads=loads_in(made))
            _publish(target, reader, work, structure, saved)
            remove(work.path)
    return saved


def streaming_bytes(shape: Shape, recipe: QuantRecipe, windows: tuple[int, int], outside: int) -> dict[str, int]:
    """Count the bytes of a streamed run by part; batch and rounding do not live at once. None depends on the number of layers.

    Args: windows: S and T. outside: bytes of the tensors outside the layers.
    """
    layer = 4 * layer_floats(shape)
    return {"embeddings": outside, "two layers": 2 * layer, **step_bytes(shape, recipe, windows)}


def peak_of(parts: dict[str, int]) -> int:
    """Compute the bytes at the peak from `streaming_bytes`: statistics and rounding do not meet the working copies of a layer."""
    layer = parts["two layers"] // 2
    most = max(parts["batch"], layer + parts["rounding"]) + parts["statistics"]
    return max(parts["embeddings"], layer + parts["hidden states"] + most) + parts["embeddings"]  # copied from mapped files


def _quantize_rest(reader: LayerReader, recipe: QuantRecipe, windows: Tensor, work: WorkFolder, progress: Progress) -> None:
    """Quantise the layers that the work folder does not hold yet."""
    if work.done == reader.count:
        return
    steps = LayerSteps(reader.shell.model, method(recipe.method), recipe, windows, reader.count, progress)
    if work.done:
        states = {name: [batch.to(reader.device) for batch in found] for name, found in work.states().items()}
        steps.resume(work.done, states["hidden"], states.get("exact"))
        steps.watch.seconds.update(work.facts(work.done - 1)["stages"])
    for index in range(work.done, reader.count):
        blocks = [reader.block(index)]
        steps.watch.lap("read")
        float_bytes = module_bytes(blocks[0])
        after, outcome = steps.step(blocks.pop())  # no name holds the float layer: the step forgets it when it is quantised
        tensors, structure = block_entry(after)
        record = LayerRecord.of(float_bytes, after, outcome).to_dict()
        states: dict[str, Sequence[Tensor]] = {}
        if index + 1 < reader.count:
            states = {"hidden": steps.hidden} | ({} if steps.exact is None else {"exact": steps.exact})
        facts = {"record": record, "structure": structure, "stages": steps.watch.seconds}
        work.keep(index, tensors, facts, states)
        del after, outcome, tensors, states
        steps.watch.lap("write")


def _publish(
    target: Path, reader: LayerReader, work: WorkFolder, structure: list[dict[str, Any]], report: QuantizeReport
) -> None:
    """Put the finished layers and the rest of the model into the target folder."""
    made, count = made_from(reader.shell, reader.shell.model, report.label), reader.count + 1
    shell = shell_tensors(made)
    shards = {shard_name(STEM, 1, count): list(shell)}
    with atomic_dir(target) as stage:
        save_tensors(stage / shard_name(STEM, 1, count), shell)
        for index, facts in enumerate(structure):
            name = shard_name(STEM, index + 2, count)
            work.move_weights(index, stage / name)
            shards[name] = [f"blocks.{index}.{own}" for own in facts["tensors"]]
        write_index(stage, STEM, shards, report.weight_bytes)
        write_description(stage, made, {"recipe": report.recipe, "report": report.to_dict()}, structure)


class _SavedModel(Sequence[DecoderBlock]):
    """A quantised model whose layers are read from the work folder whenever one is looked at, for what looks at one at a time."""

    def __init__(self, reader: LayerReader, work: WorkFolder, structure: list[dict[str, Any]]) -> None:
        self.config, self.decoder = reader.shell.model.config, reader.shell.model.decoder
        self._work, self._structure = work, structure

    @property
    def blocks(self) -> Sequence[DecoderBlock]:
        """The layers in order."""
        return self

    def __len__(self) -> int:
        return len(self._structure)

    def __getitem__(self, index: int) -> DecoderBlock:
        if index >= len(self):
            raise IndexError(index)
        return block_from(self.config, self.decoder.adapter, index, self._structure[index], self._work.weights(index))


def _check_room(reader: LayerReader, recipe: QuantRecipe, windows: Tensor, work: WorkFolder) -> str:
    """Check that memory and disk suffice. Returns: a line that says what is needed. Raises: ResourceError E-MEM, E-DISK."""
    shape, outside = _shape_of(reader), module_bytes(reader.shell.model)
    states = 2 * windows.numel() * shape.hidden * 4
    parts = streaming_bytes(shape, recipe, tuple(windows.shape), outside)
    memory = peak_of(parts)
    disk = round(recipe_bytes(shape, recipe)[0]) + states * (1 + method(recipe.method).uses_exact_inputs(recipe))
    disk = max(0, disk - bytes_in(work.path))
    for kind, needed, free, remedy, code in (
        ("memory", memory - outside, free_memory_bytes(), "use fewer calibration tokens", "E-MEM"),
        ("disk", disk, shutil.disk_usage(work.path).free, "free some space, or choose another folder", "E-DISK"),
    ):
        if needed > free:
            said = f"This run needs {needed / 1e9:.1f} GB of {kind} more, {free / 1e9:.1f} GB are free: {remedy}."
            raise ResourceError(said, code=code)
    named = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"Needs about {memory / 1e9:.2f} GB of memory ({named}) and {disk / 1e9:.2f} GB of disk."


def _shape_of(reader: LayerReader) -> Shape:
    decoder, config = reader.shell.model.decoder, reader.shell.model.config
    positions, tied = decoder.positions, decoder.head.weight is decoder.embed.weight
    rows = 0 if positions is None else positions.num_embeddings
    return shape_of(reader.adapter.widest(config), reader.count, config.vocab_size, tied=tied, positions=rows)

"""The state of a distillation between two steps, and its folder: whole or absent, no pickles.

    state.json            losses, marks, the best step, and how the best blocks are built
    state.safetensors     trained tensors as <layer>.<name>, what the optimizer keeps of each as <layer>.<name>/<part>, and the
                          best blocks' tensors as best.blocks.<layer>.<name>
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.distill_report import DistillMark
from core.errors import ArtifactError
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.io.quantized import block_facts, block_from, block_tensors
from core.storage import atomic_dir, verify

logger = logging.getLogger(__name__)

BEST = "best."


@dataclass(frozen=True)
class DistillState:
    """What a distillation has found so far.

    Attributes:
        losses: of every step. marks: of every judgement.
        best: step of the best model; blocks: its packed blocks, empty for the model as it was before.
        tensors: what the next step depends on, by name; only in what is written and read.
    """

    losses: list[float] = field(default_factory=list)
    marks: list[DistillMark] = field(default_factory=list)
    best: int = 0
    blocks: list[DecoderBlock] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_state(folder: Path, state: DistillState) -> None:
    """Write a state, replacing an earlier one in one step; nobody else may read it. Raises: ResourceError E-DISK."""
    kept = {f"{BEST}blocks.{i}.{name}": t for i, block in enumerate(state.blocks) for name, t in block_tensors(block).items()}
    facts = {
        "losses": state.losses,
        "marks": [mark.to_dict() for mark in state.marks],
        "best": state.best,
        "layers": [block_facts(block) for block in state.blocks],
    }
    with atomic_dir(folder, replace=True, private=True) as stage:
        save_file({name: t.contiguous() for name, t in (state.tensors | kept).items()}, stage / "state.safetensors")
        (stage / "state.json").write_text(json.dumps(facts))


def read_state(folder: Path, model: CausalModel) -> DistillState | None:
    """Read the state of a distillation of `model`; None where there is none, or where it is damaged, which is logged."""
    if not folder.exists():
        return None
    try:
        verify(folder, checksums=True)
        facts, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
        best = {name.removeprefix(BEST): tensors.pop(name) for name in list(tensors) if name.startswith(BEST)}
        adapter = model.decoder.adapter
        blocks = [block_from(model.config, adapter, i, layer, best) for i, layer in enumerate(facts["layers"])]
        marks = [DistillMark(**mark) for mark in facts["marks"]]
        return DistillState(list(facts["losses"]), marks, int(facts["best"]), blocks, tensors)
    except (ArtifactError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the state of the distillation %s is left out: %s", folder.name, error)
        return None

"""Checkpoints of a training run: whole or absent, no pickles, with all that the next step depends on.

    state.json               step, tokens, configuration, mode, and the texts of the corpus
    model.safetensors        float32 master weights under their transformers names, tied tensors once
    optimizer.safetensors    AdamW's exp_avg, exp_avg_sq and step as <parameter>/<name>, and torch's generator state

The position in the data is the step itself (`corpus.batch_rows`). A run keeps its two latest states, in `LATEST` and `PREVIOUS`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.disk import disk_errors
from core.errors import ArtifactError
from core.folders import publish
from core.storage import atomic_dir, verify

logger = logging.getLogger(__name__)

LATEST, PREVIOUS = "checkpoint", "previous"
_RNG = "generator"


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint, replacing an earlier one in one step. Raises: ResourceError E-DISK."""
    moments = {_RNG: torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}/{key}"] = value.contiguous()
    with atomic_dir(folder, replace=True) as stage:
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, stage / "model.safetensors")
        save_file(moments, stage / "optimizer.safetensors")
        (stage / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def save_latest(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write the latest checkpoint of a run; the one before becomes `PREVIOUS`. Raises: ResourceError E-DISK."""
    save_checkpoint(run / PREVIOUS, model, optimizer, state)
    with disk_errors(run):
        publish(run / PREVIOUS, run / LATEST)  # swaps the two names in one step


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Find the latest whole checkpoint of a run and its facts, `PREVIOUS` where `LATEST` is damaged; None if there is neither.

    Raises: ArtifactError E-CKPT-BAD of `LATEST` when neither is whole.
    """
    faults = []
    for folder in (run / LATEST, run / PREVIOUS):
        if not folder.exists():
            continue
        try:
            return folder, read_state(folder)
        except ArtifactError as error:
            logger.warning("the checkpoint %s is left out: %s", folder.name, error)
            faults.append(error)
    if faults:
        raise faults[0]
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Read the facts of a whole checkpoint, every checksum compared. Raises: ArtifactError E-CKPT-BAD."""
    verify(folder, checksums=True)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not (isinstance(state, dict) and type(state["step"]) is int and isinstance(state["config"], dict)):
            raise ValueError("not a state")
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder.name!r} is no training checkpoint: name the checkpoint folder of a run.") from error
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy a checkpoint's master weights into `model`. Raises: ArtifactError when names or shapes differ."""
    _copy(_read(folder, "model.safetensors"), dict(model.named_parameters()))


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's states and torch's generator. Raises: ArtifactError when names or shapes differ."""
    moments = _read(folder, "optimizer.safetensors")
    generator = moments.pop(_RNG)
    parameters = dict(model.named_parameters())
    found: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for path, value in moments.items():
        name, _, key = path.rpartition("/")
        if name not in found or (value.dim() and value.shape != parameters[name].shape):
            raise ArtifactError(f"The checkpoint's optimizer state {name[-60:]!r} does not fit this model.")
        found[name][key] = value
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in found[name].items()}
    torch.set_rng_state(generator)


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{name} of the checkpoint {folder.name!r} cannot be read: use another checkpoint.") from error


@torch.no_grad()
def _copy(stored: dict[str, Tensor], own: dict[str, nn.Parameter]) -> None:
    if {n: tuple(t.shape) for n, t in stored.items()} != {n: tuple(p.shape) for n, p in own.items()}:
        raise ArtifactError("The checkpoint's weights do not fit this configuration: use the one it was trained with.")
    for name, parameter in own.items():
        parameter.copy_(stored[name])

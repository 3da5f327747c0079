"""The work folder of a streamed run: what is done stays there, so that a killed run continues.

    <out>.stream/run.json        what the run depends on: recipe, weights, calibration windows, device
                 block-00000/    one quantised layer: block.safetensors, block.json
                 states-00000/   what leaves that layer, a file per batch of windows; kept of the last layer only

Folders are written whole or not at all (`core.storage.atomic_dir`) and are compared with their checksums before a run continues.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from core.errors import ArtifactError, InputError
from core.folders import remove
from core.models.io.quantized import save_tensors
from core.storage import atomic_dir, file_lock, verify, write_file

RUN, BLOCK, WEIGHTS, LOCK = "run.json", "block.json", "block.safetensors", "lock"


@dataclass(frozen=True)
class WorkFolder:
    """The layers of one run that are done, on the disk.

    Attributes:
        path: the folder. done: number of layers that were whole when it was opened.
    """

    path: Path
    done: int

    def keep(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any], states: dict[str, list[Tensor]]) -> None:
        """Write layer `index`.

        Args:
            tensors, facts: of the quantised layer, facts as JSON types.
            states: what the next layer needs, by name one tensor per batch; empty for the last layer.
        """
        if states:  # before the layer: a layer that is there can be continued
            with atomic_dir(self.path / f"states-{index:05d}") as stage:
                for number, batch in enumerate(zip(*states.values(), strict=True)):
                    save_tensors(stage / f"batch-{number:05d}.safetensors", dict(zip(states, batch, strict=True)))
        with atomic_dir(self.path / f"block-{index:05d}") as stage:
            save_tensors(stage / WEIGHTS, tensors)
            (stage / BLOCK).write_text(json.dumps(facts, allow_nan=False))
        remove(self.path / f"states-{index - 1:05d}")

    def states(self) -> dict[str, list[Tensor]]:
        """Read what leaves the last layer that is done."""
        batches = [load_file(path) for path in sorted((self.path / f"states-{self.done - 1:05d}").glob("*.safetensors"))]
        return {name: [batch[name] for batch in batches] for name in batches[0]}

    def facts(self, index: int) -> dict[str, Any]:
        """Read the facts of layer `index`."""
        return json.loads((self.path / f"block-{index:05d}" / BLOCK).read_text())

    def weights(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of layer `index`."""
        return load_file(self.path / f"block-{index:05d}" / WEIGHTS)

    def move_weights(self, index: int, target: Path) -> None:
        """Let the file of layer `index` have a second name, or a new one where the disk knows no second names."""
        source = self.path / f"block-{index:05d}" / WEIGHTS
        try:
            os.link(source, target)
        except OSError:
            os.rename(source, target)


@contextlib.contextmanager
def open_work(target: Path, identity: dict[str, str], count: int) -> Iterator[WorkFolder]:
    """Open or begin the work folder of the run that will write `target`; the body has it alone.

    Args:
        identity: what the result depends on: a word for people → its fingerprint. count: layers of the model.
    Raises:
        InputError E-PARAM-OUT: the folder belongs to another run, or to somebody else. ArtifactError E-CKPT-BAD: it is damaged.
        ResourceError E-TIME: another process works in it. E-DISK: the disk refuses.
    """
    path = target.with_name(f"{target.name}.stream")
    _check_own(path)
    with file_lock(path / LOCK, timeout=0):
        if (path / RUN).exists():
            _compare(path, identity)
        else:
            write_file(path / RUN, json.dumps(identity).encode())
        yield WorkFolder(path, _count_whole(path, count))


def _check_own(path: Path) -> None:
    """Refuse a folder with that name that is not a work folder."""
    if path.is_dir():
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK and not entry.name.endswith(".part"))
    else:
        foreign = [path.name] if os.path.lexists(path) else []
    if foreign and not (path / RUN).is_file():
        raise InputError(
            f"{path.name[-60:]!r} is not the work folder of a run: rename it, or choose another output folder.",
            code="E-PARAM-OUT",
        )


def _compare(path: Path, identity: dict[str, str]) -> None:
    """Refuse to continue a run that depends on something else than `identity`."""
    try:
        known = dict(json.loads((path / RUN).read_text()))
    except (OSError, ValueError, TypeError):
        raise _damaged(path, f"{RUN} cannot be read") from None
    for word, fingerprint in identity.items():
        if known.get(word) != fingerprint:
            raise InputError(
                f"{path.name[-60:]!r} holds an unfinished run with another {word}: repeat that run, delete the folder, or choose "
                "another output folder.",
                code="E-PARAM-OUT",
            )


def _count_whole(path: Path, count: int) -> int:
    """Count the layers that are whole, after checking that none is missing between them and that the last can be continued."""
    names = sorted(entry.name for entry in path.glob("block-?????") if entry.is_dir())
    done = len(names)
    if names != [f"block-{index:05d}" for index in range(done)] or done > count:
        raise _damaged(path, "a layer is missing")
    try:
        for name in names:
            verify(path / name, checksums=True)
        if 0 < done < count:
            verify(path / f"states-{done - 1:05d}", checksums=True)
    except ArtifactError as error:
        raise _damaged(path, str(error).partition(".")[0]) from error
    return done


def _damaged(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(
        f"The unfinished run {path.name[-60:]!r} is damaged ({reason[:60]}): delete that folder and run again.", code="E-CKPT-BAD"
    )

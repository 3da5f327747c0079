"""Kill writers at random moments and look at what they leave: `python -m tests.fuzz.kills [--times N] [--seed S]`.

Each kind of writer runs in a child process, which gets SIGKILL after a random part of the time that it takes undisturbed. A
second child then reads what is there: nothing, something that is refused in a sentence, or the same as an undisturbed writer's.
Anything else is wrong. What was left must not stop the next writer either.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from core.cache import sweep
from core.calibration.data import resolve_text
from core.errors import QuantscopeError
from core.models.io.bundle import pack, unpack
from core.models.io.load import load_model
from core.models.io.quantized import load_quantized, save_quantized
from core.models.io.saved import find_saved
from core.models.tiny import save_tiny
from core.recipe import Calibration, QuantRecipe
from core.workbench import Workbench
from tests.training.train_tools import tiny, write_text
from training.export import export_run
from training.loop import train

ABSENT = "absent"
TEXT = "text:" + " ".join(f"number {i} comes after number {i - 1}." for i in range(1, 400))
COPIES = 6
"""Saved models in the cache that is swept, of which two fit."""


def digest(folder: Path) -> str:
    """Hash the weights of a model folder, as they are after loading."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(load_model(str(folder)).model.state_dict().items()):
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


class Places:
    """The folder of all jobs: a tiny model, a recipe, a finished training run, and a saved quantised model."""

    def __init__(self, home: Path) -> None:
        self.home = home
        os.environ["QUANTSCOPE_CACHE"] = str(home / "cache")
        self.recipe = QuantRecipe(str(save_tiny(home / "model", "llama", seed=2)), calibration=Calibration(TEXT, 256, 32))
        write_text(home / "text.txt")
        self.config = tiny(home)

    def prepare(self) -> None:
        """Make what the jobs read; call it in a child, as it starts threads."""
        train(self.config, self.home / "trained")
        Workbench().quantize(self.recipe)

    @property
    def saved(self) -> Path:
        """The saved quantised model."""
        return find_saved(self.recipe.hash, None)

    def own_cache(self, place: Path) -> None:
        """Let the process use a cache in `place`."""
        os.environ["QUANTSCOPE_CACHE"] = str(place / "cache")

    # -- what is written, and what reading it gives

    def quantise(self, place: Path) -> None:
        """Quantise into an empty cache."""
        self.own_cache(place)
        Workbench().quantize(self.recipe)

    def quantised(self, place: Path) -> str:
        """Read the model that the cache has for the recipe."""
        self.own_cache(place)
        found = find_saved(self.recipe.hash, None)
        return ABSENT if found is None else digest(found)

    def save(self, place: Path) -> None:
        """Save a quantised model into a folder that a user named."""
        save_quantized(place / "out", load_quantized(self.saved), {"recipe": self.recipe.to_record()})

    def export(self, place: Path) -> None:
        """Export a training run as a model folder."""
        export_run(self.home / "trained", place / "out")

    def out(self, place: Path) -> str:
        """Read the folder `out`."""
        return digest(place / "out") if (place / "out").exists() else ABSENT

    def bundle(self, place: Path) -> None:
        """Pack a saved model into a zip file."""
        pack(self.saved, place / "a.zip")

    def bundled(self, place: Path) -> str:
        """Unpack the zip file."""
        if not (place / "a.zip").exists():
            return ABSENT
        with tempfile.TemporaryDirectory(dir=place) as folder:
            unpack(place / "a.zip", folder)
            return digest(Path(folder))

    def training(self, place: Path) -> None:
        """Train, or go on with a run that was interrupted."""
        train(self.config, place / "run", resume=True)

    def trained(self, place: Path) -> str:
        """Go on with the run to its end and hash its weights."""
        self.training(place)
        return hashlib.sha256((place / "run" / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()

    def swept(self, place: Path) -> None:
        """Fill a cache with copies of a saved model, then sweep it to the size of two."""
        source = self.saved
        self.own_cache(place)
        for n in range(COPIES):
            copy = place / "cache" / "quantized" / f"{self.recipe.hash}-{n:08x}-{n:08x}"
            copy.mkdir(parents=True, exist_ok=True)
            for path in source.iterdir():
                (copy / path.name).write_bytes(path.read_bytes())
            os.utime(copy, (n + 1, n + 1))
        size = sum(path.stat().st_size for path in source.iterdir())
        os.environ["QUANTSCOPE_CACHE_GB"] = str(2.5 * size / 1e9)
        sweep(keep=copy)


def in_child(work: Callable[[], object], *, kill_after: float | None = None) -> tuple[int, str, float]:
    """Run `work` in a forked child. Returns: its exit status (-9: killed), what it returned as text, and its seconds."""
    reader, writer = os.pipe()
    start, child = time.perf_counter(), os.fork()
    if not child:
        code, said = 0, ""
        try:
            torch.set_num_threads(1)
            said = str(work())
        except QuantscopeError as refused:
            said = f"refused: {refused}"
        except BaseException as error:  # noqa: BLE001 - the child's boundary: whatever it is, the parent reports it
            code, said = 1, repr(error)
        os.write(writer, said.encode()[:4000])
        os._exit(code)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said, time.perf_counter() - start


def main() -> int:
    """Kill each kind of writer so many times; print the counts. Returns: 1 if anything was wrong, or nothing was killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=200, help="kills in all (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    draw, wrong, killed = random.Random(options.seed), [], 0
    with tempfile.TemporaryDirectory() as home:
        places = Places(Path(home))
        code, said, _ = in_child(places.prepare)
        assert code == 0, said
        jobs = {
            "quantise": (places.quantise, places.quantised),
            "save": (places.save, places.out),
            "export": (places.export, places.out),
            "zip file": (places.bundle, places.bundled),
            "train": (places.training, places.trained),
            "sweep": (places.swept, places.quantised),
        }
        for index, (name, (write, read)) in enumerate(jobs.items()):
            whole = Path(home, name)
            whole.mkdir()
            code, said, seconds = in_child(lambda write=write, whole=whole: write(whole))
            assert code == 0 and not said.startswith("refused"), (name, said)
            expected = in_child(lambda read=read, whole=whole: read(whole))[1]
            left = {"dead": 0, ABSENT: 0, "refused": 0, "whole": 0, "wrong": 0}
            for turn in range(index, options.times, len(jobs)):
                place = Path(home, f"{name}-{turn}")
                place.mkdir()
                code, said, _ = in_child(lambda write=write, place=place: write(place), kill_after=draw.random() * seconds)
                left["dead"] += code == -signal.SIGKILL
                code, said, _ = in_child(lambda read=read, place=place: read(place))
                found = {expected: "whole", ABSENT: ABSENT}.get(said, "refused" if said.startswith("refused") else "wrong")
                left[found if code == 0 else "wrong"] += 1
                in_child(lambda write=write, place=place: write(place))
                code, after, _ = in_child(lambda read=read, place=place: read(place))
                if "wrong" in (found, "" if after == expected else "wrong"):
                    wrong.append(f"{name}, turn {turn}: {said}; written again: {after}")
            killed += left["dead"]
            sys.stdout.write(f"{name}: {', '.join(f'{count} {what}' for what, count in left.items())}; {seconds:.2f} s\n")
    sys.stdout.write("\n".join([*wrong, f"{killed} killed, {len(wrong)} wrong"]) + "\n")
    return int(bool(wrong) or not killed)


if __name__ == "__main__":
    resolve_text(TEXT, split="calibration")  # imports before the first fork
    raise SystemExit(main())

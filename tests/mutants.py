"""Mutation tests: small faults put into the product one by one; each must make the named tests fail.

    python -m tests.mutants                 all of them, two at a time; exit code 1 if one survives
    python -m tests.mutants --only gptq     those whose name contains a word
    python -m tests.mutants --list

Not part of the gate: a full run takes about fifteen minutes on two cores. A mutant is one replaced piece of text. One that does
not stand in its file exactly once is an error, so that the list cannot rot silently.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".toml")
T, R = TypeVar("T"), TypeVar("R")
SECONDS, TEST_SECONDS = 400, 60
"""Limits of all tests of a mutant, and of one test: a fault may make a loop endless."""
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other one (nothing collected, usage, interrupted) is an error of the list, not a verdict."""


@dataclass(frozen=True)
class Mutant:
    """One fault: in `file`, `old` becomes `new`; `tests` are pytest's arguments, separated by blanks."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def text(self) -> str:
        """Make the faulty file. Raises: ValueError if `old` does not stand there exactly once."""
        source = (ROOT / self.file).read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {source.count(self.old)} times in {self.file}")
        return source.replace(self.old, self.new)


def read() -> list[Mutant]:
    """Read tests/mutants.toml: one table per mutant with the fields of `Mutant`."""
    return [Mutant(**table) for table in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]]


def run(tree: Path, tests: str) -> int:
    """Run tests in a copy of the project. Returns: pytest's exit code; FAILED for tests that hang."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}", *tests.split()]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        return FAILED


def check(mutants: Sequence[Mutant], *, jobs: int) -> list[str]:
    """Run every mutant, and its tests on the sound tree first. Returns: one line per mutant that is not killed."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for index in range(jobs):
            trees.put(_copy(Path(scratch) / str(index)))

        def with_tree(task: Callable[[Path, T], R], argument: T) -> R:
            tree = trees.get()
            try:
                return task(tree, argument)
            finally:
                trees.put(tree)

        commands = list(dict.fromkeys(m.tests for m in mutants))
        codes = pool.map(lambda tests: with_tree(run, tests), commands)
        broken = [f"the sound tree ends with {code}: pytest {tests}" for tests, code in zip(commands, codes, strict=True) if code]
        return broken or [line for line in pool.map(lambda m: with_tree(_judge, m), mutants) if line]


def _copy(target: Path) -> Path:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def _judge(tree: Path, mutant: Mutant) -> str | None:
    start, place = time.monotonic(), tree / mutant.file
    sound = place.read_text(encoding="utf-8")
    try:
        place.write_text(mutant.text(), encoding="utf-8")
        code = run(tree, mutant.tests)
    finally:
        place.write_text(sound, encoding="utf-8")
    verdict = {FAILED: "killed", PASSED: "SURVIVED"}.get(code, f"ERROR (pytest ended with {code})")
    print(f"{verdict:10} {mutant.name} ({time.monotonic() - start:.0f} s)", flush=True)  # noqa: T201
    return None if code == FAILED else f"{verdict}: {mutant.name} in {mutant.file}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns: 0 if every mutant is killed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Check that the tests see small faults.")
    parser.add_argument("--only", default="", metavar="WORD", help="mutants whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    chosen = parser.parse_args(argv)
    mutants = [m for m in read() if chosen.only in m.name or chosen.only in m.file]
    for mutant in mutants:
        mutant.text()
    if chosen.list:
        print("\n".join(f"{m.name}: {m.file}" for m in mutants))  # noqa: T201
        return 0
    survivors = check(mutants, jobs=max(1, chosen.jobs))
    print("\n".join([*survivors, f"{len(mutants)} mutants, {len(survivors)} not killed"]))  # noqa: T201
    return 1 if survivors or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())

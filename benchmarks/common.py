"""Interleaved timing, peak memory and provenance, shared by every job."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from core.provenance import hardware, versions


@dataclass(frozen=True)
class Result:
    """One line of a report.

    Attributes:
        job: what was measured. peer: what `ratio` is relative to.
        ratio: speed relative to the peer (above 1 is faster) unless the job's name says "time over".
        seconds, peak_bytes: where the job is judged by them.
        target: the mark the project set itself, in words.
    """

    job: str
    ratio: float | None
    peer: str
    target: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None
    note: str = ""


def interleave(*functions: Callable[[], object], rounds: int = 7) -> list[float]:
    """Median seconds of each function, called in turn A B A B … after one warm-up each."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for slot, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            slot.append(time.perf_counter() - start)
    return [median(slot) for slot in times]


def commit() -> str:
    """Short commit of the working tree, with + when it has changes."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def as_json(results: list[Result]) -> dict[str, object]:
    """{"results": [...]} with hardware, versions and commit on every line."""
    where = {"hardware": hardware(), "versions": versions(), "commit": commit()}
    return {"results": [{**asdict(result), "limit_fraction": None, **where} for result in results]}


def print_results(results: list[Result]) -> None:
    """One aligned line per result."""
    print(f"{hardware()} · torch {versions().get('torch')} · commit {commit()}")
    for r in results:
        ratio = "" if r.ratio is None else f"{r.ratio:6.2f}×"
        seconds = "" if r.seconds is None else f"{r.seconds:8.2f} s"
        peak = "" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:6.2f} GiB"
        print(
            f"{r.job:64s} {ratio:>8s} {seconds:>10s} {peak:>10s}  vs {r.peer}"
            + (f"  [{r.target}]" if r.target else "")
            + (f"  {r.note}" if r.note else "")
        )

"""Functions for all benchmark jobs: interleaved timing, limits, optional peers, peak memory, provenance."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from core.provenance import hardware, versions


@dataclass(frozen=True)
class Result:
    """One line of a report.

    Attributes:
        job: what was measured. peer: what `ratio` is relative to.
        ratio: speed relative to the peer (above 1 is faster) unless the job's name says "time over".
        seconds, peak_bytes: where the job is judged by them.
        limit_fraction: share of the machine's limit, from rates measured in the same run (`limits`).
        target: the project's own target, in words.
        weight_bits, kv_bytes: stored bits per weight and bytes of one token's keys and values, where quality is measured.
        text: what it is measured on.
    """

    job: str
    ratio: float | None
    peer: str
    target: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    limit_fraction: float | None = None
    median_ratio: float | None = None
    weight_bits: float | None = None
    kv_bytes: int | None = None
    text: str = ""


@dataclass(frozen=True)
class Limits:
    """Measured rates: bytes per second read and written by a copy, operations per second of float32 and int8 products."""

    copy: float
    float32: float
    int8: float


@functools.cache
def limits() -> Limits:
    """Measure the rates of this machine with torch's number of threads, once per process."""
    source = torch.empty(2**26)  # 256 MiB, larger than most caches
    target = torch.empty_like(source)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    i, j = (t.mul(40).clamp(-127, 127).to(torch.int8) for t in (a, b))
    with torch.inference_mode():
        copy, real, integer = interleave(
            lambda: target.copy_(source), lambda: torch.mm(a, b.t()), lambda: torch._int_mm(i, j.t()), rounds=9
        )
    return Limits(2 * source.numel() * 4 / copy, 2 * 2048**3 / real, 2 * 2048**3 / integer)


def interleave(*functions: Callable[[], object], rounds: int = 7, warm_up: bool = True) -> list[float]:
    """Measure the median seconds of each function, called in turn A B A B …, after one call each where `warm_up`."""
    for function in functions if warm_up else ():
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for slot, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            slot.append(time.perf_counter() - start)
    return [median(slot) for slot in times]


def installed(package: str) -> bool:
    """Say whether a peer's package can be imported."""
    return importlib.util.find_spec(package) is not None


def absent(job: str, *packages: str) -> list[Result]:
    """Make a line for each peer that is not installed: its ratio was not measured."""
    return [Result(job, None, package, note="not measured: not installed") for package in packages if not installed(package)]


def commit() -> str:
    """Return the short commit of the working tree, with + when it has changes."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)  # noqa: S607 - any git
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def as_json(results: list[Result]) -> dict[str, object]:
    """Make {"results": [...]} with hardware, versions and commit on every line."""
    where = {"hardware": hardware(), "versions": versions(), "commit": commit()}
    return {"results": [{**asdict(result), **where} for result in results]}


def print_results(results: list[Result]) -> None:
    """Print one aligned line per result."""
    print(f"{hardware()} · torch {versions().get('torch')} · commit {commit()}")
    for r in results:
        ratio = "" if r.ratio is None else f"{r.ratio:6.2f}×"
        seconds = "" if r.seconds is None else f"{r.seconds:10.4f} s"
        peak = "" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:6.2f} GiB"
        stored = "" if r.weight_bits is None else f"  {r.text}, {r.weight_bits:.2f} weight bits, {r.kv_bytes:,} KV bytes"
        limit = "" if r.limit_fraction is None else f"{r.limit_fraction:4.0%} of the limit"
        print(
            f"{r.job:70s} {ratio:>8s} {seconds:>12s} {peak:>10s} {limit:>17s}  vs {r.peer}"
            + (f"  [{r.target}]" if r.target else "")
            + stored
            + (f"  {r.note}" if r.note else "")
        )

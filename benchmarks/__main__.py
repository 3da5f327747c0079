"""Run benchmark jobs: `python -m benchmarks [NAME …] [--model M] [--json FILE]`, all or the named ones."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Result, as_json, limits, print_results

JOBS = {
    "reorder": "C1",
    "gptq": "C2",
    "perplexity": "C3, C4",
    "decode": "C5",
    "ternary": "C6",
    "click": "C7",
    "slider": "",
    "linear": "",
    "segments": "",
    "growth": "",
    "page": "",
    "redraw": "U1, U2, U3",
    "waiting": "W1, W2, W3, W4",
    "live": "P4, P5, predict",
    "swaps": "P1, P2, P3, predict",
    "autopilot": "P6, predict",
    "estimate": "E1",
    "quality": "Q1, Q2, Q3, Q4",
    "sweep": "S3",
    "order": "R0",
    "stream": "S1, S2",
}
"""Jobs in running order, each a module `benchmarks.bench_<name>` with `run(model)`, of `BY_TOKENS` `run(model, tokens=…)`; their
numbers as targets, their group."""
ALLOWED = f"{', '.join(JOBS)}, C1 … C7, U1 … U3, W1 … W4, P1 … P6 (all of these: predict), E1, Q1 … Q4, S1, S2, S3 or R0"
BY_TOKENS = ("quality", "order")


def main() -> int:
    """Parse arguments, run, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {ALLOWED}")
    parser.add_argument("--model", default="smollm2-135m", help="model for the jobs that need one")
    parser.add_argument("--tokens", type=int, default=32_768, help=f"evaluation tokens of {' and '.join(BY_TOKENS)}")
    parser.add_argument("--neighbours", type=int, default=0, metavar="N", help="busy processes beside the jobs")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    names = []
    for name in arguments.names or JOBS:
        found = [job for job, number in JOBS.items() if name.casefold() in (job, *number.casefold().split(", ")) and name]
        if not found:
            parser.error(f"unknown job {name!r}: use {ALLOWED}")
        names += [job for job in found if job not in names]
    with beside(arguments.neighbours):
        results = measure(names, arguments)
    print_results(results)
    return 0


@contextlib.contextmanager
def beside(neighbours: int) -> Iterator[None]:
    """Keep that many other processes busy, each with one thread that never waits."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(names: list[str], arguments: argparse.Namespace) -> list[Result]:
    """Run the jobs `names`, tell their progress, and write the JSON file after each result when one is asked for."""
    rates = limits()
    print(
        f"limits: copy {rates.copy / 1e9:.1f} GB/s, float32 {rates.float32 / 1e9:.0f} GFLOP/s, int8 {rates.int8 / 1e9:.0f} GOP/s",
        flush=True,
    )
    results: list[Result] = []
    for name in names:
        start = time.perf_counter()
        own = {"tokens": arguments.tokens} if name in BY_TOKENS else {}
        for result in importlib.import_module(f"benchmarks.bench_{name}").run(arguments.model, **own):
            results.append(result)
            print(f"… {result.job}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            if arguments.json:  # after each result: some take minutes, and the run may be stopped
                arguments.json.write_text(json.dumps(as_json(results), indent=1, allow_nan=False) + "\n")
        print(f"… {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    raise SystemExit(main())

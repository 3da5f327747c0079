"""Run GPU jobs: `python -m benchmarks.gpu [G1 …] [--json FILE]`, all or the named ones."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.common import Result, as_json, print_results
from benchmarks.gpu.harness import Machine, run_job
from benchmarks.gpu.jobs import JOBS


def main() -> int:
    """Run all or the named jobs, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=gpu.__doc__)
    parser.add_argument("names", nargs="*", metavar="JOB", help="G1 … G9; none runs all")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in JOBS]
    if unknown:
        parser.error(f"unknown job {unknown[0]!r}: use {', '.join(JOBS)}")
    machine = Machine()
    where = torch.cuda.get_device_name() if machine.cuda else f"no GPU, kernels by {machine.backend}"
    print(where, " ".join(f"{name} {rate:.3g}/s" for name, rate in machine.rates.items()), flush=True)
    results: list[Result] = []
    with torch.inference_mode():
        for name in arguments.names or JOBS:
            start = time.perf_counter()
            for job in JOBS[name](machine):
                results += run_job(job, machine)
                del job
                if machine.cuda:
                    torch.cuda.empty_cache()
            print(f"… {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print_results(results)
    if arguments.json:
        report = as_json(results)
        for line in report["results"]:
            line["hardware"] = where
        arguments.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

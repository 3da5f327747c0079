"""`python -m benchmarks [NAME …] [--model M] [--json FILE]`: run all jobs or the named ones."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import bench_click, bench_cluster, bench_gptq, bench_int_linear, bench_page, bench_perplexity
from benchmarks.common import Result, as_json, print_results

JOBS = {
    "cluster": bench_cluster.run,
    "gptq": bench_gptq.run,
    "linear": bench_int_linear.run,
    "perplexity": bench_perplexity.run,
    "click": bench_click.run,
    "page": bench_page.run,
}


def main() -> int:
    """Parse arguments, run, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(JOBS)}; none runs all")
    parser.add_argument("--model", default="smollm2-135m", help="model for the jobs that need one")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in JOBS]
    if unknown:
        parser.error(f"unknown job {unknown[0]!r}: use {', '.join(JOBS)}")
    results: list[Result] = []
    for name in arguments.names or JOBS:
        print(f"… {name}", file=sys.stderr, flush=True)
        results += JOBS[name](arguments.model)
    print_results(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results), indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

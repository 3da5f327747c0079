"""Collect the logs of training runs into one file of thinned loss curves.

`python -m benchmarks.ablations RUNS --out benchmarks/results/bitnet-ablations.json`: every folder below RUNS that holds a
run, finished or diverged, becomes one entry with its configuration, tokens, corpus, hardware and versions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training.export import thin
from training.loop import LOG, read_log

POINTS = 100
LAST = 0.05
"""Share of the steps, the last ones, over which the final training loss is averaged."""


def entry(folder: Path) -> dict[str, Any]:
    """Collect one run: configuration, last step, and curve."""
    document = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    log = read_log(folder / LOG)
    config, tail = document["config"], log[-max(1, round(LAST * len(log))) :]
    steps = config["tokens"] // (config["batch"] * config["seq"])
    held_out = [e["held_out_loss"] for e in log if "held_out_loss" in e]
    return {
        "name": config["name"],
        "finished": log[-1]["step"] == steps,
        "tokens": log[-1]["tokens"],
        "final_loss": sum(e["loss"] for e in tail) / len(tail),
        "final_held_out_loss": held_out[-1] if held_out else None,
        "seconds": round(sum(e["seconds"] for e in log)),
        "curve": thin(log, POINTS),
        **{name: document[name] for name in ("config", "corpus", "parameters", "hardware", "versions", "date")},
    }


def main() -> int:
    """Collect the runs, write the file, and print a line per run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("runs", type=Path, help="folder whose subfolders are runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    folders = [path.parent for path in sorted(arguments.runs.glob("*/run.json")) if (path.parent / LOG).stat().st_size]
    if not folders:
        parser.error(f"no runs below {arguments.runs}")
    entries = [entry(folder) for folder in folders]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"runs": entries}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for e in sorted(entries, key=lambda e: e["final_loss"]):
        held_out = "" if e["final_held_out_loss"] is None else f"  held out {e['final_held_out_loss']:.3f}"
        state = "" if e["finished"] else "  stopped"
        print(f"{e['name']:30s} {e['tokens']:>12,} tokens  loss {e['final_loss']:.3f}{held_out}{state}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

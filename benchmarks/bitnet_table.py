"""Perplexity and sparsity of training runs on text that they never saw.

`python -m benchmarks.bitnet_table RUN … --out FILE`: RUN is the --out folder of `python -m app.cli train`. Every BitNet run is
scored under its own activation rules and, with the same weights and no further training, under the others. Masters are float32,
windows are as long as the training context. Sparsity is counted on the packed model in its own mode.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from core.evaluation.sparsity import measure_sparsity
from core.methods.bitnet.bitlinear import set_mode
from core.methods.bitnet.config import TrainConfig
from core.methods.bitnet.corpus import load_corpus
from core.methods.bitnet.export import load_run, measure
from core.models.bitnet_io import save_bitnet
from core.models.load import load_model
from core.provenance import provenance
from core.quant.bitnet import MODES

SPARSITY_WINDOWS = 16
CARD = {"title": "measured", "description": "measured", "licence": "none"}


def rows(run: Path, windows: int) -> list[dict[str, Any]]:
    """One row per mode: name, trained (mode), mode, tokens, parameters, measured; sparsity in the trained mode."""
    config, document, model, tokenizer = load_run(run)
    trained = config.mode_at(config.steps)
    made = []
    for mode in [trained] if config.architecture != "bitnet" else [trained, *(m for m in MODES if m not in (trained, "fp"))]:
        if config.architecture == "bitnet":
            set_mode(model, mode, inputs=config.inputs if mode == trained else None)
        made.append(
            {
                "name": config.name,
                "trained": trained,
                "mode": mode,
                "tokens": config.steps * config.batch * config.seq,
                "parameters": document["parameters"],
                "measured": measure(model, tokenizer, config, windows=windows),
            }
        )
    if config.architecture == "bitnet":
        with tempfile.TemporaryDirectory() as folder:
            save_bitnet(folder, model, tokenizer, mode=trained, keep=config.keep, card=CARD)
            made[0]["sparsity"] = _sparsity(folder, config)
    return made


def _sparsity(folder: str, config: TrainConfig) -> dict[str, Any]:
    tail = load_corpus(config.texts, vocab=config.vocab).held_out
    windows = tail[: len(tail) // config.seq * config.seq].view(-1, config.seq)[:SPARSITY_WINDOWS]
    return measure_sparsity(load_model(folder), windows, "held-out tail of the files").to_dict()


def main() -> int:
    """Measure, write, and print a line per row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bitnet_table", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--windows", type=int, default=64, help="at most so many windows of each text (default 64)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    table = []
    for run in arguments.runs:
        for row in rows(run, arguments.windows):
            table.append(row)
            scores = ", ".join(f"{name} {m['perplexity']:.2f} ± {m['stderr']:.2f}" for name, m in row["measured"].items())
            print(f"{row['name']:30s} {row['mode']:10s} {scores}", flush=True)
            if "sparsity" in row:
                shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in row["sparsity"]["total"].items())
                print(f"{'':30s} {'zeros':10s} {shares}", flush=True)
    arguments.out.write_text(json.dumps({"rows": table, "provenance": provenance()}, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

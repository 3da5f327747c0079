"""Measure the quality tables of docs/results.md: `python -m benchmarks.quality_table --out FILE`. Finished rows are kept in FILE.

WikiText-2 raw test text, non-overlapping windows of 512 tokens, calibration on 8,192 tokens of its validation text. RPTQ
and round-to-nearest at the bits of the six schemes, and g = 1, 8, 32 and per channel for W4A4 and its strict variant.
Divergence only for RPTQ's six schemes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from core import PER_CHANNEL, SCHEMES, Calibration, Clusters, QuantRecipe, Workbench
from core.provenance import provenance

WINDOW = 512


def recipes(model: str) -> list[QuantRecipe]:
    """List the rows in the order of the table."""
    calibration = Calibration("wikitext2", 8192, WINDOW)

    def recipe(scheme: str, **options: object) -> QuantRecipe:
        return QuantRecipe(model=model, scheme=scheme, calibration=calibration, **options)

    rows = [recipe(scheme) for scheme in SCHEMES]
    rows += [recipe(scheme, method="rtn", weights="rtn") for scheme in SCHEMES]
    for variant in ("default", "strict"):
        counts = [c for c in (1, 8, 32, PER_CHANNEL) if (variant, c) != ("default", 32)]
        rows += [recipe("W4A4", variant=variant, clusters=Clusters.uniform(count)) for count in counts]
    return rows


def main() -> int:
    """Run what is missing in the output file, then print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_table", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32_768, help="evaluation tokens")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows already in it are not run again")
    arguments = parser.parse_args()
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    bench = Workbench()
    options = {"text": "wikitext2", "tokens": arguments.tokens, "window": WINDOW}
    if "base" not in data:
        data["base"] = bench.evaluate(arguments.model, **options).to_dict()
    for recipe in recipes(arguments.model):
        if recipe.hash in data["rows"]:
            continue
        made = bench.quantize(recipe)
        compared = recipe.method == "rptq" and recipe.clusters == Clusters() and recipe.variant == "default"
        report = bench.evaluate(made.key, reference=arguments.model if compared else None, **options)
        data["rows"][recipe.hash] = {
            "recipe": recipe.to_dict(),
            "label": recipe.label(),
            **report.to_dict(),
            "effective_weight_bits": made.effective_weight_bits,
            "quantize_seconds": made.seconds,
        }
        data["provenance"] = provenance()
        arguments.out.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        print(f"{report.perplexity:12.2f} ± {report.perplexity_stderr:.2f}  {recipe.label()}", flush=True)
    print(markdown(data))
    return 0


def markdown(data: dict) -> str:
    """Format the table of a finished file."""
    base = data["base"]
    lines = [
        "| configuration | perplexity ± | KL to float32 | same top token | bits per weight | model bytes | KV bytes/token |",
        "|---|---|---|---|---|---|---|",
        f"| float32 | {base['perplexity']:.2f} ± {base['perplexity_stderr']:.2f} | – | – | 32 | {_mb(base['weight_bytes'])} "
        f"| {base['kv_bytes_per_token']:,} |",
    ]
    for row in data["rows"].values():
        divergence = ("–", "–")
        if row["kld_mean"] is not None:
            divergence = (f"{row['kld_mean']:.3f}", f"{100 * row['same_top_token']:.1f} %")
        lines.append(
            f"| {row['label']} | {_number(row['perplexity'])} ± {_number(row['perplexity_stderr'])} | {' | '.join(divergence)} "
            f"| {row['effective_weight_bits']:.2f} | {_mb(row['weight_bytes'])} | {row['kv_bytes_per_token']:,} |"
        )
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


if __name__ == "__main__":
    raise SystemExit(main())

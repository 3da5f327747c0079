"""Measure the quality tables of docs/results.md: `python -m benchmarks.quality_table`, resumable.

Rows, all at the bits of the published schemes: RPTQ; RTN matched (RPTQ's groups, clip search and first token, without reordering)
with GPTQ and with rounded weights; RTN plain; then g = 1, 8, 32 and per channel for W4A4 and its strict variant.
`PROTOCOLS` says which texts and windows each model is calibrated and measured on; divergence is against the unquantised model.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

from core import PER_CHANNEL, SCHEMES, Calibration, Clusters, QuantRecipe, Workbench
from core.errors import InputError
from core.provenance import provenance

MATCHED = {"method": "rtn", "variant": "matched"}
STORIES = "train/tinystories_mix.txt"
STORY_BYTES = 1_000_000


@dataclass(frozen=True)
class Protocol:
    """The texts and windows that a model is calibrated and measured on.

    Attributes:
        name: of the model in results.
        calibration, evaluation: texts as `resolve_text` takes them, or a file of $QUANTSCOPE_DATA, of which the first million
            bytes are evaluated on and the next million calibrated on.
        window: tokens per window, of both; text: what the table calls the texts.
    """

    name: str
    calibration: str
    evaluation: str
    window: int
    text: str


PROTOCOLS = {
    "smollm2-135m": Protocol("smollm2-135m", "wikitext2", "wikitext2", 512, "WikiText-2 raw, validation and test"),
    "quantscope-llama-6m": Protocol("quantscope-llama-6m", "sotu", "sotu", 512, "sotu, other years and held-out years"),
    "quantscope-opt-6m": Protocol("quantscope-opt-6m", "sotu", "sotu", 512, "sotu, other years and held-out years"),
    "whisper-tiny-en-as-opt": Protocol("whisper-tiny-en-as-opt", STORIES, STORIES, 448, "TinyStories, second and first MB"),
}
"""Protocols by the last part of a model's name; a model that is not listed gets the first one."""


def protocol_of(model: str) -> Protocol:
    """Choose the protocol of a model by the last part of its name or path."""
    name = os.path.basename(model.rstrip("/"))
    known = PROTOCOLS.get(name)
    return known or Protocol(name, "wikitext2", "wikitext2", 512, PROTOCOLS["smollm2-135m"].text)


def text_of(name: str, part: int) -> str:
    """Resolve a protocol's text: a name of `resolve_text` is itself, a file becomes the text of its first or second part.

    Raises: InputError if the file is not there.
    """
    if name != STORIES:
        return name
    path = Path(os.environ.get("QUANTSCOPE_DATA", ".")) / name
    if not path.is_file():
        raise InputError(f"The text {name} is not here: set QUANTSCOPE_DATA to the folder that holds it.", code="E-PARAM-TEXT")
    with open(path, "rb") as file:
        file.seek(part * STORY_BYTES)
        return "text:" + file.read(STORY_BYTES).decode("utf-8", errors="ignore").replace("<|endoftext|>", "")


def recipes(model: str, calibration: Calibration) -> list[QuantRecipe]:
    """List the recipes in the order of the table."""

    def recipe(scheme: str, **options: object) -> QuantRecipe:
        return QuantRecipe(model=model, scheme=scheme, calibration=calibration, **options)

    rows = [recipe(scheme) for scheme in SCHEMES]
    rows += [recipe(scheme, **MATCHED) for scheme in SCHEMES]
    rows += [recipe(scheme, method="rtn", weights="rtn") for scheme in SCHEMES]
    rows += [recipe(scheme, weights="rtn", **MATCHED) for scheme in SCHEMES]
    for variant in ("default", "strict"):
        counts = [c for c in (1, 8, 32, PER_CHANNEL) if (variant, c) != ("default", 32)]
        rows += [recipe("W4A4", variant=variant, clusters=Clusters.uniform(count)) for count in counts]
    return rows


def main() -> int:
    """Run the recipes that are missing in the output file, then print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_table", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or folder; PROTOCOLS says what it is measured on")
    parser.add_argument("--tokens", type=int, default=32_768, help="evaluation tokens")
    parser.add_argument("--only", default="", help="run the rows alone whose label begins so")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows already in it are not run again")
    arguments = parser.parse_args()
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    protocol, bench = protocol_of(arguments.model), Workbench()
    options = {"text": text_of(protocol.evaluation, 0), "tokens": arguments.tokens, "window": protocol.window}
    data |= {"model": protocol.name, "texts": protocol.text}
    own = {"text_name": protocol.text}
    if "base" not in data:
        data["base"] = bench.evaluate(arguments.model, **options).to_dict() | own | {"key": protocol.name, "label": protocol.name}
    for recipe in recipes(arguments.model, Calibration(text_of(protocol.calibration, 1), 8192, protocol.window)):
        if recipe.hash in data["rows"] or not recipe.label().startswith(arguments.only):
            continue
        made = bench.quantize(recipe)
        report = bench.evaluate(made.key, reference=arguments.model, **options).to_dict() | own | {"reference": protocol.name}
        data["rows"][recipe.hash] = {
            "recipe": recipe.to_record() | {"model": protocol.name},
            **report,
            "label": recipe.label(),
            "effective_weight_bits": made.effective_weight_bits,
            "quantize_seconds": made.seconds,
        }
        data["provenance"] = provenance()
        arguments.out.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        print(f"{report['perplexity']:12.2f} ± {report['perplexity_stderr']:.2f}  {recipe.label()}", flush=True)
    print(markdown(data))
    return 0


def markdown(data: dict) -> str:
    """Format the rows of a results file as a Markdown table."""
    base = data["base"]
    lines = [
        "| configuration | perplexity ± | ln ratio ± | KL to float32 ± | same top, % ± | bits/weight | model bytes | KV |",
        "|---|---|---|---|---|---|---|---|",
        f"| float32 | {base['perplexity']:.2f} ± {base['perplexity_stderr']:.2f} | – | – | – | 32 | {_mb(base['weight_bytes'])} "
        f"| {base['kv_bytes_per_token']:,} |",
    ]
    for row in data["rows"].values():
        compared = [
            _figure(row.get("ln_ratio"), row.get("ln_ratio_stderr"), 4),
            _figure(row["kld_mean"], row.get("kld_stderr"), 4),
            _figure(row["same_top_token"], row.get("same_top_stderr"), 1, 100),
        ]
        lines.append(
            f"| {row['label']} | {_number(row['perplexity'])} ± {_number(row['perplexity_stderr'])} | {' | '.join(compared)} "
            f"| {row['effective_weight_bits']:.2f} | {_mb(row['weight_bytes'])} | {row['kv_bytes_per_token']:,} |"
        )
    return "\n".join(lines)


def _figure(value: float | None, error: float | None, places: int, factor: int = 1) -> str:
    """Format a figure with its standard error; a dash where it was not measured."""
    if value is None:
        return "–"
    return f"{factor * value:.{places}f}" + ("" if error is None else f" ± {factor * error:.{places}f}")


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


if __name__ == "__main__":
    raise SystemExit(main())

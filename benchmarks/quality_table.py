"""Measure the quality tables of docs/results.md: `python -m benchmarks.quality_table`, resumable.

Rows, all at the bits of the published schemes: RPTQ; RTN matched (RPTQ's groups, clip search and first token, without reordering)
with GPTQ and with rounded weights; RTN plain; then g = 1, 8, 32 and per channel for W4A4 and its strict variant.
`--rows ablation` measures the ingredients of the method rotation one by one in their place, then those of RPTQ+ one by one and
together, on C4 too where pyarrow is installed.
`PROTOCOLS` says which texts and windows each model is calibrated and measured on; divergence is against the unquantised model.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.common import installed
from core import PER_CHANNEL, SCHEMES, Calibration, Clusters, QuantRecipe, Workbench
from core.errors import InputError
from core.provenance import provenance
from core.recipe import PlusOptions, RotationOptions

MATCHED = {"method": "rtn", "variant": "matched"}
STORIES = "train/tinystories_mix.txt"
STORY_BYTES = 1_000_000
C4 = "c4/c4_validation_2k.parquet"
CALIBRATION_TOKENS = 8192


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
    with open(_file(name), "rb") as file:
        file.seek(part * STORY_BYTES)
        return "text:" + file.read(STORY_BYTES).decode("utf-8", errors="ignore").replace("<|endoftext|>", "")


def evaluation_texts(protocol: Protocol) -> dict[str, str]:
    """Resolve what a model is measured on, by name: its protocol's text, and C4 where pyarrow is installed to read it.

    Raises: InputError if a file is not there.
    """
    texts = {protocol.text: text_of(protocol.evaluation, 0)}
    return texts | ({"C4 validation": str(_file(C4))} if installed("pyarrow") else {})


def _file(name: str) -> Path:
    """Find a file of $QUANTSCOPE_DATA. Raises: InputError if it is not there."""
    path = Path(os.environ.get("QUANTSCOPE_DATA", ".")) / name
    if not path.is_file():
        raise InputError(f"The text {name} is not here: set QUANTSCOPE_DATA to the folder that holds it.", code="E-PARAM-TEXT")
    return path


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


def ablations(model: str, calibration: Calibration) -> list[QuantRecipe]:
    """List the method rotation, W4A4 strict, then with each ingredient off or otherwise in turn, and RPTQ at the same bits, then
    with each part of RPTQ+ alone, with those of its default together, and with others."""

    def recipe(weights: str = "gptq", **options: object) -> QuantRecipe:
        own = RotationOptions(**options)
        return QuantRecipe(model, method="rotation", variant="strict", weights=weights, calibration=calibration, rotation=own)

    switches = [entry.name for entry in fields(RotationOptions) if isinstance(entry.default, bool)]
    others = ({"block": 64}, {"group": 64}, {"group": 128}, {"kv": "token"})
    rows = [recipe(), *(recipe(**{name: False}) for name in switches), *(recipe(**each) for each in others), recipe("rtn")]
    none = PlusOptions(**dict.fromkeys(("scale", "key_mean", "clip", "halfway"), False), group=0, dynamic="none", rotate="none")
    alone = [{name: True} for name in ("scale", "key_mean", "clip", "halfway")]
    alone += [{"group": size} for size in (32, 64, 128)] + [{"dynamic": "q"}, {"rotate": "down_in"}]
    added = [none, *(replace(none, **part) for part in alone), PlusOptions(), PlusOptions(dynamic="none")]
    added += [PlusOptions(rotate="none"), PlusOptions(scale=False), PlusOptions(rotate="mlp_in+down_in")]
    return [*rows, *(QuantRecipe(model, variant="strict", calibration=calibration, plus=plus) for plus in (None, *added))]


ROWS = {"schemes": recipes, "ablation": ablations}


def main() -> int:
    """Run the recipes that are missing in the output file, then print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_table", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or folder; PROTOCOLS says what it is measured on")
    parser.add_argument("--tokens", type=int, default=32_768, help="evaluation tokens")
    parser.add_argument("--only", default="", help="run the rows alone whose label begins so")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows already in it are not run again")
    parser.add_argument("--rows", default="schemes", choices=ROWS, help="the schemes, or the ingredients of the method rotation")
    arguments = parser.parse_args()
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    protocol, bench = protocol_of(arguments.model), Workbench()
    texts = evaluation_texts(protocol) if arguments.rows == "ablation" else {protocol.text: text_of(protocol.evaluation, 0)}
    data |= {"model": protocol.name, "texts": protocol.text}

    def measure(model: str, reference: str | None = None) -> dict[str, Any]:
        """Measure a model on the first text, with its figures on the others under "elsewhere", by name."""
        options = {"tokens": arguments.tokens, "window": protocol.window, "reference": reference}
        first, *others = (
            bench.evaluate(model, text=text, **options).to_dict() | {"text_name": name} for name, text in texts.items()
        )
        return first | ({"elsewhere": {each["text_name"]: each for each in others}} if others else {})

    if "base" not in data:
        data["base"] = measure(arguments.model) | {"key": protocol.name, "label": protocol.name}
    calibration = Calibration(text_of(protocol.calibration, 1), CALIBRATION_TOKENS, protocol.window)
    for recipe in ROWS[arguments.rows](arguments.model, calibration):
        if recipe.hash in data["rows"] or not recipe.label().startswith(arguments.only):
            continue
        made = bench.quantize(recipe)
        report = measure(made.key, arguments.model) | {"reference": protocol.name}
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
    others = base.get("elsewhere", {})
    heads = [*(f"{name}: perplexity ± | KL ±" for name in others), "bits/weight", "model bytes", "KV", "seconds"]
    lines = [f"| configuration | perplexity ± | ln ratio ± | KL to float32 ± | same top, % ± | {' | '.join(heads)} |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for row in (base, *data["rows"].values()):
        figures = [
            _perplexity(row),
            _figure(row.get("ln_ratio"), row.get("ln_ratio_stderr"), 4),
            _figure(row.get("kld_mean"), row.get("kld_stderr"), 4),
            _figure(row.get("same_top_token"), row.get("same_top_stderr"), 1, 100),
        ]
        for own in (row["elsewhere"][name] for name in others):
            figures += [_perplexity(own), _figure(own.get("kld_mean"), own.get("kld_stderr"), 4)]
        stored = f"{row.get('effective_weight_bits', 32):.2f} | {_mb(row['weight_bytes'])} | {row['kv_bytes_per_token']:,}"
        seconds = _figure(row.get("quantize_seconds"), None, 0)
        lines.append(f"| {'float32' if row is base else row['label']} | {' | '.join(figures)} | {stored} | {seconds} |")
    return "\n".join(lines)


def _figure(value: float | None, error: float | None, places: int, factor: int = 1) -> str:
    """Format a figure with its standard error; a dash where it was not measured."""
    if value is None:
        return "–"
    return f"{factor * value:.{places}f}" + ("" if error is None else f" ± {factor * error:.{places}f}")


def _perplexity(row: dict) -> str:
    """Format a perplexity with its standard error, large ones by their power of ten."""
    form = ".2f" if row["perplexity"] < 1e4 else ".1e"
    return f"{row['perplexity']:{form}} ± {row['perplexity_stderr']:{form}}"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    raise SystemExit(main())

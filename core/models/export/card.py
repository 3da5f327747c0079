"""Write the model card of an exported folder: origin, recipe, numbers, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.models.io.catalog import catalogue
from core.models.loaded import LoadedModel

_LOADING = {
    "compressed-tensors": "`pip install compressed-tensors`, then `AutoModelForCausalLM.from_pretrained(FOLDER)`. vLLM takes the "
    "folder with `--dtype half`, if its kernels serve it (below).",
    "gguf": "`llama-cli -m model.gguf`, or any program built on llama.cpp.",
    "bitnet": "`AutoModelForCausalLM.from_pretrained(FOLDER)` of transformers.",
    "transformers": "`AutoModelForCausalLM.from_pretrained(FOLDER)`: plain float32 weights.",
}


def read_numbers(path: str, label: str | None) -> dict[str, Any]:
    """Read what `evaluate --json FILE` measured, for the card.

    Args: label: of the model that is exported; numbers of another one are refused.
    Raises: InputError E-PARAM-NUMBERS.
    """
    try:
        numbers = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {name: numbers[name] for name in ("label", "perplexity", "perplexity_stderr", "protocol")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path[-60:]!r} holds no numbers: name a file that evaluate --json wrote.", code="E-PARAM-NUMBERS"
        ) from error
    if label is not None and known["label"] != label:
        raise InputError(
            f"{path[-60:]!r} holds numbers of another model ({str(known['label'])[:60]}): evaluate this one.",
            code="E-PARAM-NUMBERS",
        )
    return numbers


def model_card(
    loaded: LoadedModel,
    fmt: str,
    *,
    facts: Mapping[str, Any],
    differences: Sequence[str],
    loads: Mapping[str, str],
    numbers: Mapping[str, Any] | None,
) -> str:
    """Write the card as Markdown with the front matter of the Hugging Face Hub.

    Args:
        facts: of `read_description`, empty for a model that was not quantised here.
        differences: between the exported model and this one. loads: of `loads_in`.
        numbers: of `read_numbers`, None where nothing was measured.
    """
    origin, report, rules = loaded.origin, facts.get("report") or {}, loaded.model.blocks[0].rules
    name = loaded.name if origin is None else origin.name
    licence = next((entry.licence for entry in catalogue() if entry.name == name), None)
    head = {"base_model": name} if origin is not None and origin.place == "Hub" and "/" in name else {}
    head |= {"license": licence.lower()} if licence is not None and licence.lower() == "apache-2.0" else {}
    head |= {"base_model_relation": "quantized", "tags": ["quantization", "quantscope", fmt]}
    lineage = {
        "base model": f"{name}: {loaded.source if origin is None else origin.sentence}",
        "recipe": report.get("label") or loaded.label or (rules and rules.fidelity),
        "calibration": report.get("calibration"),
        "format": fmt,
        "licence of the base": licence or "not known here: see the base model",
    }
    rows = "".join(f"- {title}: {value}\n" for title, value in lineage.items() if value)
    notes = "".join(f"- {note}\n" for note in differences) or "- nothing\n"
    answers = "".join(f"- {program}: {answer}\n" for program, answer in loads.items())
    recipe = f"\n```json\n{json.dumps(facts['recipe'], indent=1)}\n```\n" if facts.get("recipe") else ""
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    return (
        f"---\n{front}---\n# {Path(name).name}, {fmt}\n\nWritten by Quantscope.\n\n{rows}{recipe}\n"
        f"## Measured\n\n{_measured(numbers)}\n"
        f"## Load\n\n{_LOADING[fmt]}\n\nThis model loads in\n\n{answers}\nIt differs from the model in Quantscope in\n\n{notes}"
    )


def _measured(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return "Nothing: run `evaluate --json FILE`, and export with `--numbers FILE`.\n"
    rows = [f"- perplexity: {numbers['perplexity']:.4g} ± {numbers['perplexity_stderr']:.2g}"]
    if numbers.get("kld_mean") is not None:
        rows.append(f"- KLD from {numbers.get('reference')}: {numbers['kld_mean']:.3g} nats per token")
        rows.append(f"- same likeliest token: {numbers['same_top_token']:.1%}")
    return "\n".join([*rows, f"\n{numbers['protocol']}. Measured in Quantscope, before the export.\n"])

"""Make short names of runs from what differs between them; hovering shows the full name.

A quantised run is called by its bits and clusters, "W4A4 g32", "RTN W4A4" or "BitNet a4.8". Every other choice of its recipe is
named only where a run of the same short name chose otherwise, the calibration text where any run did: "W4A4 g32 · WikiText-2".
A baseline is called by its title and its library's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING

from app.view import texts
from core.privacy import PASTED, PASTED_DIGEST
from core.recipe import PER_CHANNEL, SCHEMES, Clusters, QuantRecipe

if TYPE_CHECKING:
    from app.session import Run

MOST_BITS = 3
"""Number of tensors with bits of their own up to which they are named; more are counted."""


def short_name(recipe: QuantRecipe, label: str) -> str:
    """Return the bits and clusters of a recipe. `label`: the run's full name, which ends with a BitNet run's fidelity."""
    if recipe.bitnet is not None:
        worth = label.removeprefix(recipe.label()).strip(" ·").rpartition(": ")[2]
        return " · ".join(filter(None, (f"BitNet {recipe.bitnet.describe()}", worth)))
    scheme = recipe.scheme if recipe.bits is None else _nearest_scheme(recipe)
    own = f", {recipe.overrides.describe(1)}" if recipe.overrides.entries else ""
    if recipe.method == "rtn":
        return (f"RTN matched {scheme} {_clusters(recipe.clusters)}" if recipe.variant == "matched" else f"RTN {scheme}") + own
    if recipe.rotation is not None:
        return f"Rotation {scheme} {recipe.rotation.describe()}{own}"
    return f"{'RPTQ+ ' if recipe.plus else ''}{scheme} {_clusters(recipe.clusters)}{own}"


def _clusters(clusters: Clusters) -> str:
    """Return the g that gives these clusters, or else all five counts."""
    if clusters == Clusters.uniform(clusters.R1):
        return clusters.describe() if clusters.R1 >= PER_CHANNEL else f"g{clusters.R1}"
    return "g" + "/".join(map(str, asdict(clusters).values()))


def _nearest_scheme(recipe: QuantRecipe) -> str:
    """Write bits of single tensors as the scheme that differs in the fewest tensors, and these tensors."""
    own = asdict(recipe.tensor_bits)
    different = {name: {k: v for k, v in own.items() if asdict(bits)[k] != v} for name, bits in SCHEMES.items()}
    nearest = min(different, key=lambda name: len(different[name]))
    named = [f"{texts.BIT_LABELS[k]} {v}" for k, v in different[nearest].items()]
    more = [f"{len(named) - MOST_BITS} more"] if len(named) > MOST_BITS else []
    return ", ".join([nearest, *named[:MOST_BITS], *more])


def choices_of(recipe: QuantRecipe) -> dict[str, str]:
    """Return every choice that a short name leaves out, in words."""
    calibration = recipe.calibration
    chosen = {
        "text": text_name(calibration.text),
        "tokens": f"{calibration.tokens:,} tokens",
        "window": f"windows of {calibration.window}",
        "seed": f"seed {recipe.seed}",
        "revision": recipe.revision or "",
    }
    if recipe.method != "bitnet":
        chosen |= {"weights": f"{recipe.weights.upper()} weights", "variant": recipe.variant}
    if recipe.method == "rptq":
        chosen |= {"segments": recipe.segments, "order": "" if recipe.order == "layer" else recipe.order}
    chosen["plus"] = recipe.plus.describe() if recipe.plus else ""
    chosen["distill"] = recipe.distill.describe() if recipe.distill else ""
    chosen["overrides"] = recipe.overrides.describe(8)
    return chosen


def names_of(runs: Sequence[Run]) -> list[str]:
    """Name runs by what differs between them, and nothing else. A run that the visitor named keeps that name."""
    made = {run.key: (run.model, short_name(run.recipe, run.label)) for run in runs if run.recipe is not None}
    chosen = {run.key: choices_of(run.recipe) for run in runs if run.recipe is not None}
    several = len({run.model for run in runs}) > 1
    names = []
    for run in runs:
        lead = model_name(run.model) if several else ""
        if run.name or run.recipe is None:
            own = " · ".join(filter(None, (lead, run.label))) if run.baseline else model_name(run.label)
            names.append(run.name or own)
            continue
        alike = [other for key, other in chosen.items() if made[key] == made[run.key]]
        differing = [
            words
            for choice, words in chosen[run.key].items()
            if any(other[choice] != words for other in (chosen.values() if choice == "text" else alike))
        ]
        names.append(" · ".join(filter(None, (lead, made[run.key][1], *differing))))
    return names


def full_name(run: Run) -> str:
    """Return a run's name with everything that its recipe says."""
    if run.recipe is None:
        return f"{run.model} · {run.label}" if run.baseline else run.label
    calibration = run.recipe.calibration
    where = f"{calibration.tokens:,} tokens of {text_name(calibration.text)} in windows of {calibration.window}"
    return f"{run.model} · {run.label} · {where}, seed {run.recipe.seed}"


def text_name(text: str) -> str:
    """Return a text's name for people: of a pasted text its first letters, unless a digest stands for it; of a file its name."""
    if text.startswith(PASTED):
        return texts.YOUR_TEXT.format(text.removeprefix(PASTED)[:12])
    return texts.PRIVATE_TEXT if text.startswith(PASTED_DIGEST) else texts.TEXT_NAMES.get(text) or PurePath(text).name


def model_name(model: str) -> str:
    """Return a model's name; of a folder or file its last part."""
    return PurePath(model).name if model.startswith(("/", ".", "~")) else model

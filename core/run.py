"""Run one recipe whole: quantise, evaluate against the float model, return a row."""

from __future__ import annotations

from core.progress import Progress, silent
from core.provenance import provenance
from core.recipe import QuantRecipe
from core.report import Row
from core.workbench import Workbench


def run(
    recipe: QuantRecipe,
    *,
    text: str = "sotu",
    tokens: int = 4096,
    window: int = 512,
    bench: Workbench | None = None,
    progress: Progress = silent,
) -> Row:
    """Quantise by recipe, evaluate against the float model, and return one row with its provenance.

    It is a function of its arguments that can be pickled, for pools and other machines.

    Args: bench: that keeps models from one run to the next; None makes a new one.
    """
    bench = bench or Workbench()
    quantized = bench.quantize(recipe, progress=progress)
    against = {"reference": recipe.model, "reference_revision": recipe.revision}
    report = bench.evaluate(quantized.key, text=text, tokens=tokens, window=window, progress=progress, **against)
    return Row(recipe.to_record(), recipe.hash, report.to_dict(), quantized.to_dict(), provenance())

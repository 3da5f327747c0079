"""Load, observe, quantise and evaluate models. `import core` loads neither torch nor transformers.

Shapes used everywhere: `B` batch, `T` tokens, `M = B·T` rows, `K` in features, `N` out features, `C` observed channels, `G`
clusters, `H` query heads, `Hkv` key/value heads, `E` head dimension, `D` hidden, `F` feed-forward, `L` layers, `V` vocabulary,
`S` windows (samples) or cached positions.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Bits": "core.recipe",
    "Calibration": "core.recipe",
    "Clusters": "core.recipe",
    "PER_CHANNEL": "core.recipe",
    "QuantRecipe": "core.recipe",
    "REORDERS": "core.recipe",
    "SCHEMES": "core.recipe",
    "SITES": "core.recipe",
    "VARIANTS": "core.recipe",
    "parse_bits": "core.recipe",
    "Workbench": "core.workbench",
    "observe": "core.stages",
    "observe_in_bases": "core.stages",
    "quantize": "core.stages",
    "quantize_streamed": "core.stream.run",
    "evaluate": "core.stages",
    "evaluate_streamed": "core.stream.evaluate",
    "estimate": "core.stages",
    "run": "core.run",
    "load_model": "core.models.io.load",
    "LoadedModel": "core.models.io.load",
    "catalogue": "core.models.io.catalog",
    "embedded_cards": "core.models.io.catalog",
    "recluster": "core.methods.rptq.explore",
    "grid_noise": "core.methods.rptq.explore",
    "error_curve": "core.methods.rptq.explore",
    "paired": "core.evaluation.paired",
    "protocol_problem": "core.evaluation.paired",
    "memory_grid": "core.evaluation.memory",
    "model_shape": "core.evaluation.shapes",
    "find_shape": "core.evaluation.shapes",
    "SHAPES": "core.evaluation.shapes",
    "RangesReport": "core.calibration.report",
    "SiteRanges": "core.calibration.report",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]

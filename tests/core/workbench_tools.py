"""What the tests of the workbench share: a text, a recipe of few tokens, and what every report is."""

from __future__ import annotations

import json
import pickle

from core.recipe import Calibration, QuantRecipe

TEXT = "text:" + " ".join(f"number {i} comes after number {i - 1}." for i in range(1, 400))
CALIBRATION = Calibration(TEXT, 256, 32)
SEEN = {"text": TEXT, "tokens": 128, "window": 32}


def recipe_of(folder: str, **options) -> QuantRecipe:
    return QuantRecipe(folder, **({"calibration": CALIBRATION, "weights": "rtn"} | options))


def plain(report) -> None:
    """Reports are picklable and JSON."""
    assert pickle.loads(pickle.dumps(report)) == report
    json.dumps(report.to_dict(), allow_nan=False)

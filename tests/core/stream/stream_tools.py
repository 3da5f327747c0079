"""Shared by the tests of streamed runs: a recipe of a tiny model's folder, and what two saved models have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from core.models.io.quantized import read_description
from core.recipe import Calibration, QuantRecipe

TEXT = "text:" + "Rivers carry sand and gravel to the sea, where waves sort them by weight and lay them down in beds. " * 40


def recipe_of(folder: Path, **options: Any) -> QuantRecipe:
    """A recipe on 192 tokens of a text that needs no file."""
    return QuantRecipe(str(folder), calibration=Calibration(TEXT, 192, 32), **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, whatever files they are in."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def facts_of(folder: Path) -> dict[str, Any]:
    """What a saved model says of itself, but for times and places."""
    facts = read_description(folder)
    facts["report"] = {name: value for name, value in facts["report"].items() if name not in ("seconds", "stages", "folder")}
    return facts

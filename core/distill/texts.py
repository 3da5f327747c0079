"""Choose the windows of a distillation: what it trains on, what it is judged on, and text of another kind."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from core.calibration.data import calibration_windows, fit_window, require_embedded, resolve_text
from core.errors import TextError
from core.models.loaded import LoadedModel, prefix_ids
from core.privacy import PUBLIC_TEXTS
from core.recipe import QuantRecipe

POOL_TOKENS = 2**17
"""Tokens of all windows, held-out ones included; more steps read them again."""
HELD_OUT = 4
"""Windows that judge the steps, and of the other text."""


@dataclass(frozen=True)
class DistillTexts:
    """Windows [S, T] int64.

    Attributes:
        train: in the order of reading. held_out: of the same texts, never trained on. names: of these texts.
        other: of a text that is not among them, evaluation split, and its name; None where no such text is here.
    """

    train: Tensor
    held_out: Tensor
    names: tuple[str, ...]
    other: Tensor | None
    other_name: str | None


def distill_texts(loaded: LoadedModel, recipe: QuantRecipe, allow_local: bool) -> DistillTexts:
    """Draw the windows by the recipe's texts and seed, equally many of each text; they do not depend on the number of steps.

    Raises: TextError as `resolve_text`, and E-TEXT-SHORT where a text has less than two windows; ModelError E-MODEL-ARCH for a
        mixture of experts.
    """
    loaded.require_dense("distilled")
    own = recipe.calibration
    chosen = list(dict.fromkeys(own.text if name == "calibration" else name for name in recipe.distill.texts.split("+")))
    window = fit_window(loaded, own.window)

    def draw(text: str, split: str, count: int) -> tuple[Tensor, str]:
        source = resolve_text(text, split=split, allow_local=allow_local)
        # another seed than the calibration's, which would choose the windows that the weights were rounded on
        options = {"tokens": count * window, "window": window, "seed": recipe.seed + 1, "prefix": prefix_ids(loaded)}
        found = calibration_windows(source, loaded.tokenizer, **options)
        require_embedded(found, loaded.model, loaded.tokenizer)
        return found, source.name

    train, held, names = [], [], []
    for text in chosen:
        found, name = draw(text, "calibration", max(2, POOL_TOKENS // window // len(chosen)))
        if len(found) < 2:
            rule = f"A distillation needs two windows of {window:,} tokens of {name}: give more text, or lower the window."
            raise TextError(rule, code="E-TEXT-SHORT")
        kept = min(max(1, HELD_OUT // len(chosen)), len(found) // 2)
        held.append(found[:kept])
        train.append(found[kept:])
        names.append(name)
    rows = torch.cat(train)
    order = random.Random(recipe.seed).sample(range(len(rows)), len(rows))  # noqa: S311 - repeatable by its seed
    other, other_name = None, None
    for text in PUBLIC_TEXTS:
        if text not in chosen and other is None:
            try:
                other, other_name = draw(text, "evaluation", HELD_OUT)
            except TextError as error:  # it is not installed or cannot be fetched: the report then says that there was none
                if error.code != "E-TEXT-OFFLINE":
                    raise
    return DistillTexts(rows[order], torch.cat(held), tuple(names), other, other_name)

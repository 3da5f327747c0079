"""A text as the token windows of one model: those it is calibrated on, those it is scored on."""

from __future__ import annotations

import torch
from torch import Tensor

from core.calibration.data import TextSource, calibration_windows, resolve_text, tokenize, windows
from core.config import Calibration
from core.errors import InputError
from core.models.load import LoadedModel, prefix_ids


def calibration_tokens(loaded: LoadedModel, calibration: Calibration, seed: int, allow_local: bool) -> tuple[Tensor, TextSource]:
    """The windows of a text's calibration split that `calibration` and `seed` choose, [S, T] int64."""
    _check_window(loaded, calibration.window)
    source = resolve_text(calibration.text, split="calibration", allow_local=allow_local)
    tokens = calibration_windows(
        source, loaded.tokenizer, tokens=calibration.tokens, window=calibration.window, seed=seed, prefix=prefix_ids(loaded)
    )
    return tokens, source


def evaluation_windows(
    loaded: LoadedModel, text: str, *, tokens: int, window: int, allow_local: bool = True
) -> tuple[Tensor, TextSource]:
    """The first windows of a text's evaluation split that cover `tokens` tokens (fewer if the text ends), [S, T] int64."""
    calibration = Calibration(text, max(tokens, window), window)
    source = resolve_text(text, split="evaluation", allow_local=allow_local)
    prefix = prefix_ids(loaded)
    body = calibration.window - len(prefix)
    count = max(1, calibration.tokens // calibration.window)
    _check_window(loaded, window)
    found = windows(tokenize(source.text, loaded.tokenizer, max_tokens=count * body), window=body, purpose="Evaluation")[:count]
    if prefix:
        found = torch.cat([torch.tensor(prefix).expand(len(found), -1), found], dim=1)
    return found, source


def _check_window(loaded: LoadedModel, window: int) -> None:
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    if longest and window > longest:
        raise InputError(
            f"The window is {window} tokens, this model's context is {longest}: use at most that.", code="E-PARAM-WINDOW"
        )

"""Cut a text into the token windows that one model is scored on."""

from __future__ import annotations

import torch
from torch import Tensor

from core.calibration.data import TextSource, fit_window, require_embedded, resolve_text, tokenize, windows
from core.checks import require_int, require_text
from core.models.loaded import LoadedModel, prefix_ids

MAX_TOKENS, MAX_WINDOW = 2**20, 8192


def evaluation_windows(
    loaded: LoadedModel, text: str, *, tokens: int, window: int, allow_local: bool = True
) -> tuple[Tensor, TextSource]:
    """Cut the windows that a model is scored on from the start of a text's evaluation split.

    Args:
        text: sotu, wikitext2, a file, or text: followed by the text itself, as `resolve_text` takes it.
        tokens: how many to cover; at least one window is cut, and fewer than asked for where the text ends.
        window: tokens per window, including the prefix that this model's windows start with; shortened to the model's context.
    Returns: (windows [S, T] int64, the text's source).
    Raises: InputError E-PARAM-TEXT, -TOKENS, -WINDOW for values out of range; TextError for an unusable text.
    """
    require_text("text", text, "No readable evaluation text was named: use sotu, wikitext2, a file or text:….")
    window = require_int("window", window, 8, MAX_WINDOW, f"use 8 to {MAX_WINDOW} tokens")
    tokens = require_int("tokens", tokens, 1, MAX_TOKENS, f"use 1 to {MAX_TOKENS}")
    window = fit_window(loaded, window)
    source = resolve_text(text, split="evaluation", allow_local=allow_local)
    prefix, count = prefix_ids(loaded), max(1, tokens // window)
    body = window - len(prefix)
    found = windows(tokenize(source.text, loaded.tokenizer, max_tokens=count * body), window=body, purpose="Evaluation")[:count]
    if prefix:
        found = torch.cat([torch.tensor(prefix).expand(len(found), -1), found], dim=1)
    require_embedded(found, loaded.model, loaded.tokenizer)
    return found, source

"""Show where two models differ on one text: divergence at each token, and what both find likeliest.

    KLD_t = Σ_v p_ref(v | x_<t) (log p_ref(v | x_<t) - log p(v | x_<t))        nats

Both models read the same tokens (teacher forcing), so position t compares predictions made from the same past. The confidence of
the reference at t is its largest probability: where it is sure, a quantised model has something to lose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.checks import require_int
from core.errors import InputError
from core.evaluation.token_report import LIKELIEST, ConfidenceGroup, TokenDivergence, TokensReport
from core.evaluation.windows import evaluation_windows
from core.models.loaded import LoadedModel
from core.progress import Progress, silent

if TYPE_CHECKING:
    from core.calibration.data import TextSource

MAX_TOKENS = 512
CONFIDENCE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Limits of the groups of tokens by the reference's confidence."""


@torch.inference_mode()
def token_divergences(
    loaded: LoadedModel,
    reference: LoadedModel,
    text: str,
    *,
    tokens: int = 128,
    key: str = "",
    allow_local: bool = True,
    progress: Progress = silent,
) -> TokensReport:
    """Compare two models token by token on the start of a text.

    Args:
        text: as `resolve_text` takes it; the evaluation split of a corpus.
        tokens: how many, 8 to MAX_TOKENS, as one window; fewer where a model's context is shorter.
        key: name of the model in the report; empty for its own.
    Raises: InputError for a number out of range, or for models of different vocabularies.
    """
    tokens = require_int("tokens", tokens, 8, MAX_TOKENS, f"use 8 to {MAX_TOKENS}")
    if loaded.model.config.vocab_size != reference.model.config.vocab_size:
        raise InputError("The two models have different vocabularies: compare models of one family.", code="E-PARAM-REFERENCE")
    windows, source = evaluation_windows(loaded, text, tokens=tokens, window=tokens, allow_local=allow_local)
    ids = windows[:1]
    progress("Reading the text with the reference", 0.0)
    expected = _log_probabilities(reference, ids)
    progress("Reading the text with the model", 0.5)
    return _report(loaded, reference, source, ids[0], _log_probabilities(loaded, ids), expected, key)


def _log_probabilities(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Compute log p(v | x_<t) for t = 1 … T - 1: [T - 1, V] float32 on the CPU."""
    hidden = loaded.model.decoder(ids.to(loaded.model.device))[0, :-1]
    return torch.log_softmax(loaded.model.get_output_embeddings()(hidden).float(), dim=-1).cpu()


def _report(
    loaded: LoadedModel, reference: LoadedModel, source: TextSource, ids: Tensor, found: Tensor, expected: Tensor, key: str
) -> TokensReport:
    divergence = (expected.exp() * (expected - found)).sum(-1).clamp_min(0)  # rounding may give -1e-8
    best, best_expected = found.topk(LIKELIEST), expected.topk(LIKELIEST)
    flips = best.indices[:, 0] != best_expected.indices[:, 0]
    right = ids[1:, None]
    decode = loaded.tokenizer.decode

    def likeliest(top: tuple[Tensor, Tensor], place: int) -> tuple[tuple[str, float], ...]:
        values, indices = (part[place].tolist() for part in top)
        return tuple((decode([index]), float(torch.tensor(value).exp())) for value, index in zip(values, indices, strict=True))

    shown = [TokenDivergence(decode(ids[:1].tolist()), None)]
    probability, known = (x.gather(1, right)[:, 0].exp().tolist() for x in (found, expected))
    for place, token in enumerate(ids[1:].tolist()):
        shown.append(
            TokenDivergence(
                decode([token]),
                float(divergence[place]),
                probability[place],
                known[place],
                likeliest(best, place),
                likeliest(best_expected, place),
                bool(flips[place]),
            )
        )
    confidence = best_expected.values[:, 0].exp()
    return TokensReport(
        key or loaded.name,
        reference.name,
        source.name,
        tuple(shown),
        _groups(confidence, divergence, flips),
        float(divergence.mean()),
    )


def _groups(confidence: Tensor, divergence: Tensor, flips: Tensor) -> tuple[ConfidenceGroup, ...]:
    made = []
    for low, high in zip(CONFIDENCE, CONFIDENCE[1:], strict=False):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        if count := int(inside.sum()):
            mean, share = (float(x[inside].float().mean()) for x in (divergence, flips))
            made.append(ConfidenceGroup(low, high, count, mean, share))
    return tuple(made)

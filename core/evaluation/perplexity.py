"""Perplexity, divergence from a reference model, and same-top-token rate, in one pass over windows.

Protocol (fixed): the text is one token stream cut into non-overlapping windows; in each window every token but the first
is predicted from those before it; perplexity = exp(total negative log-likelihood / number of predicted tokens).
Its standard error is that of the mean over windows, carried through exp: windows, not tokens, are independent.

    KL(reference || model) = Σ p_ref (log p_ref - log p_model), mean over predicted tokens, nats

The reference enters as the hidden states before its head: [T, D] instead of [T, V] per window.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core.errors import NumericError
from core.models.shell import final_hidden
from core.progress import Progress, silent


@dataclass(frozen=True)
class LanguageScore:
    """Scores of a model on windows.

    Attributes:
        nll: mean negative log-likelihood, nats per predicted token.
        perplexity, perplexity_stderr: exp(nll) and its standard error (0 for a single window).
        kld_mean, same_top_token: against the reference, None without one.
        tokens: predicted tokens. seconds: time of the model's own forward passes and head.
    """

    nll: float
    perplexity: float
    perplexity_stderr: float
    kld_mean: float | None
    same_top_token: float | None
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens processed per second, window by window, the head included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@torch.inference_mode()
def hidden_windows(
    model: PreTrainedModel, windows: Tensor, *, progress: Progress = silent, title: str = "Running"
) -> list[Tensor]:
    """Hidden states before the head for each window of [S, T]: S tensors [T, D]."""
    result = []
    for i, window in enumerate(windows):
        progress(f"{title}: window {i + 1} of {len(windows)}", i / len(windows))
        result.append(final_hidden(model, window[None])[0])
    return result


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    reference: list[Tensor] | None = None,
    reference_head: torch.nn.Module | None = None,
    progress: Progress = silent,
    title: str = "Evaluating",
) -> LanguageScore:
    """Score a model on windows [S, T] int64.

    Args:
        reference: hidden states of the reference model on the same windows (`hidden_windows`), or None.
        reference_head: its output embedding; needed with `reference`.
    Raises: NumericError if the model's loss is not finite.
    """
    head, windows = model.get_output_embeddings(), windows.to(model.device)
    losses, divergences, agreements, seconds = [], [], [], 0.0
    for i, window in enumerate(windows):
        progress(f"{title}: window {i + 1} of {len(windows)}", i / len(windows))
        start = time.perf_counter()
        log_p = torch.log_softmax(head(final_hidden(model, window[None])[0, :-1]).float(), dim=-1)  # [T - 1, V]
        loss = -float(log_p.gather(1, window[1:, None]).mean())  # a number: what runs on a GPU has ended
        seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            raise NumericError(
                f"The loss is not finite in window {i + 1}: the quantised model produced NaN or infinity; "
                "use more bits or more clusters.",
                code="E-NUM-NAN",
            )
        losses.append(loss)
        if reference is not None:
            log_q = torch.log_softmax(reference_head(reference[i][:-1]).float(), dim=-1).to(log_p.device)
            agreements.append(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
            divergences.append(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()))
    return _summary(losses, divergences, agreements, len(windows) * (windows.shape[1] - 1), seconds)


def _summary(
    losses: list[float], divergences: list[float], agreements: list[float], tokens: int, seconds: float
) -> LanguageScore:
    count = len(losses)
    nll = math.fsum(losses) / count
    variance = math.fsum((x - nll) ** 2 for x in losses) / (count - 1) if count > 1 else 0.0
    perplexity = math.exp(min(nll, 700.0))
    return LanguageScore(
        nll,
        perplexity,
        perplexity * math.sqrt(variance / count),
        math.fsum(divergences) / count if divergences else None,
        math.fsum(agreements) / count if agreements else None,
        tokens,
        seconds,
    )

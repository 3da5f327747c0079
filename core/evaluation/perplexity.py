"""Score a model on windows of a text: perplexity, and its distance from a reference model, in one pass.

Protocol (fixed): the text is one token stream cut into non-overlapping windows; in each window every token but the first
is predicted from those before it; perplexity = exp(total negative log-likelihood / number of predicted tokens).

    KL(reference || model) = Σ p_ref (log p_ref - log p_model)          nats, per predicted token
    Δp = p_model(right token) - p_ref(right token)
    same top = whether both find the same token likeliest

Standard errors are those of means over windows, sd / √S: windows, not tokens, are independent. Those of the perplexity and of
the root mean square follow by the derivative: ± PPL = PPL · ± mean nll; ± RMS = ± mean(Δp²) / (2 RMS).
Source: llama.cpp, tools/perplexity/perplexity.cpp (`--kl-divergence`): the same quantities, but it takes tokens as independent.

The reference is given as the hidden states before its head: [T, D] instead of [T, V] per window.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import NumericError
from core.evaluation.paired import mean_and_error
from core.models.decoder import CausalModel
from core.progress import Progress, silent
from core.report import Scores

QUANTILES = ("50", "90", "95", "99", "99.9", "100")
"""Percentages of the divergence's distribution that are reported; "100" is its largest value."""


@dataclass(frozen=True)
class Reference:
    """A model to compare with, as it ran on the windows.

    Attributes:
        name: for reports. head: its output embedding. hidden: its states before the head, S tensors [T, D] (`hidden_windows`).
    """

    name: str
    head: torch.nn.Module
    hidden: list[Tensor]


@torch.inference_mode()
def hidden_windows(
    model: CausalModel, windows: Tensor, *, progress: Progress = silent, title: str = "Running"
) -> list[Tensor]:
    """Run a model on windows [S, T] and keep the hidden states before its head: S tensors [T, D]."""
    result = []
    for i, window in enumerate(windows):
        progress(f"{title}: window {i + 1} of {len(windows)}", i / len(windows))
        result.append(model.decoder(window[None])[0])
    return result


@torch.inference_mode()
def score(
    model: CausalModel,
    windows: Tensor,
    *,
    reference: Reference | None = None,
    hidden: list[Tensor] | None = None,
    seconds: float = 0.0,
    progress: Progress = silent,
    title: str = "Evaluating",
) -> Scores:
    """Score a model on windows [S, T] int64, against a reference that ran on the same windows where one is given.

    Args: hidden: what the model's head reads, S tensors [T, D], where it ran before, and the seconds of that; else it runs.
    Raises: NumericError if the model's loss is not finite.
    """
    head, windows = model.get_output_embeddings(), windows.to(model.device)
    losses, comparisons = [], []

    def states(i: int) -> Tensor:
        return model.decoder(windows[i][None])[0] if hidden is None else hidden[i]

    for i, window in enumerate(windows):
        progress(f"{title}: window {i + 1} of {len(windows)}", i / len(windows))
        start = time.perf_counter()
        log_p = torch.log_softmax(head(states(i)[:-1]).float(), dim=-1)  # [T - 1, V]; no name keeps the states
        right = log_p.gather(1, window[1:, None])[:, 0]
        loss = -float(right.mean())  # float() waits for the GPU, so that the time is complete
        seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            raise NumericError(
                f"The loss is not finite in window {i + 1}: the quantised model produced NaN or infinity; "
                "use more bits or more clusters.",
                code="E-NUM-NAN",
            )
        losses.append(loss)
        if reference is not None:
            log_q = torch.log_softmax(reference.head(reference.hidden[i][:-1]).float(), dim=-1).to(log_p.device)
            right_q = log_q.gather(1, window[1:, None])[:, 0]
            divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
            same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
            comparisons.append(torch.stack([divergence, right.exp() - right_q.exp(), same, -right_q]).double().cpu())
    nll, error = mean_and_error(losses)
    perplexity, predicted = math.exp(min(nll, 700.0)), windows.shape[0] * (windows.shape[1] - 1)
    return Scores(
        nll=nll,
        window_nll=losses,
        perplexity=perplexity,
        perplexity_stderr=perplexity * (error or 0.0),
        seconds=seconds,
        tokens_per_second=predicted / seconds if seconds > 0 else 0.0,
        windows_id=hashlib.sha256(str(tuple(windows.shape)).encode() + windows.cpu().numpy().tobytes()).hexdigest()[:16],
        **(_against(losses, torch.stack(comparisons)) if comparisons else {}),
    )


def _against(losses: list[float], found: Tensor) -> dict[str, Any]:
    """Compute the fields of `Scores` that compare with the reference.

    Args:
        losses: of the model, one per window.
        found: [S, 4, T - 1] float64: divergence, Δp, same top and the reference's loss of every predicted token.
    """
    divergence, delta, same, reference = found.unbind(1)
    names = ("ln_ratio", "kld", "delta_p", "delta_p_rms", "same_top")
    ratio = torch.tensor(losses, dtype=torch.float64) - reference.mean(1)
    by_window = (ratio, *(x.mean(1) for x in (divergence, delta, delta.square(), same)))
    means: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    for name, values in zip(names, by_window, strict=True):
        means[name], errors[f"{name}_stderr"] = mean_and_error(values.tolist())
    square, rms = errors["delta_p_rms_stderr"], math.sqrt(means["delta_p_rms"])
    errors["delta_p_rms_stderr"] = square / (2 * rms) if square else square  # of the mean square -> of its root
    quantiles = np.quantile(divergence.numpy(), [float(q) / 100 for q in QUANTILES])
    return {
        **errors,
        "ln_ratio": means["ln_ratio"],
        "kld_mean": means["kld"],
        "kld_quantiles": dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
        "delta_p_mean": means["delta_p"],
        "delta_p_rms": rms,
        "same_top_token": means["same_top"],
    }

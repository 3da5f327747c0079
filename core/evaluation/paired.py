"""Compare two measured models on the windows they share, as `llama-perplexity --kl-divergence` does.

    ln ratio = ln(PPL_a / PPL_b) = mean over windows of d_w,        d_w = nll_a,w - nll_b,w
    ±        = sd(d_w) / √S                                          S windows, sd with S - 1

Both models predict the same tokens, so windows that are hard for both cancel in d_w: the paired error is often a tenth of the
errors of the two perplexities. Two models differ where |ln ratio| exceeds ± times the 95 % quantile of Student's t with S - 1
degrees of freedom.

Source: llama.cpp, tools/perplexity/perplexity.cpp, "Mean ln(PPL(Q)/PPL(base))". It takes tokens as independent,
√(var(d_t) / (T - 1)) over T tokens; here windows are, because neighbouring tokens share their context. No torch is needed, as
the page calls these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import InputError
from core.report import EvalReport, Report

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t with 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class PairedRatio(Report):
    """Perplexity of one model over that of another on shared windows.

    Attributes:
        ln_ratio: natural logarithm of the ratio; below 0 the first model is better.
        stderr: standard error of `ln_ratio` over windows; None for a single window, which has none.
        windows: how many are shared.
    """

    ln_ratio: float
    stderr: float | None
    windows: int

    @property
    def ratio(self) -> float:
        """Perplexity of the first model divided by that of the second."""
        return math.exp(min(self.ln_ratio, 700.0))

    @property
    def differs(self) -> bool | None:
        """Whether the two models differ at 95 %; None for a single window, which cannot tell."""
        if self.stderr is None:
            return None
        return abs(self.ln_ratio) > t_quantile(self.windows - 1) * self.stderr

    def verdict(self) -> str:
        """Describe the result in one clause, such as "1.99 times the perplexity (ln ratio 0.6871 ± 0.0143): worse"."""
        words = {None: "one window tells nothing of the error", False: "not told apart"}
        found = words.get(self.differs, "worse" if self.ln_ratio > 0 else "better")
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        return f"{self.ratio:.4g} times the perplexity (ln ratio {self.ln_ratio:.4f}{error}): {found}"


def t_quantile(freedom: int) -> float:
    """Compute the two-sided 95 % quantile of Student's t to within 0.3 %; `freedom`: degrees of freedom, at least 1."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    return 1.95996 + 2.3722 / freedom + 2.8225 / freedom**2  # Cornish-Fisher expansion about the normal quantile


def paired(a: EvalReport, b: EvalReport) -> PairedRatio:
    """Compare the perplexity of `a` with that of `b`, window by window.

    Raises: InputError E-PARAM-PROTOCOL if the two were not measured on the same windows of tokens.
    """
    if problem := protocol_problem(a, b):
        raise InputError(f"{problem}: measure both on the same text, tokens and window.", code="E-PARAM-PROTOCOL")
    return PairedRatio(*mean_and_error([x - y for x, y in zip(a.window_nll, b.window_nll, strict=True)]), len(a.window_nll))


def against_reference(report: EvalReport) -> PairedRatio:
    """Return the comparison that a report holds of its model with the reference it was measured against."""
    return PairedRatio(report.ln_ratio, report.ln_ratio_stderr, len(report.window_nll))


def protocol_problem(a: EvalReport, b: EvalReport) -> str | None:
    """Say why two reports cannot be compared; None where they were measured on the same windows of tokens."""
    if not a.windows_id or not b.windows_id:
        return "One of the runs was measured before losses were kept by window"
    if a.windows_id == b.windows_id:
        return None
    seen = [f"{r.tokens:,} tokens of {r.text_name} in windows of {r.window}" for r in (a, b)]
    return f"The runs were measured on {seen[0]} and on {seen[1]}" if seen[0] != seen[1] else "The runs read different tokens"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute the mean of one value per window, and its standard error sd / √S; None for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (count - 1) / count)

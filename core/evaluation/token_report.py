"""Hold what a comparison of two models token by token found, without the numerical libraries that find it."""

from __future__ import annotations

from dataclasses import dataclass

from core.report import Report

LIKELIEST = 5


@dataclass(frozen=True)
class TokenDivergence(Report):
    """One token and how the two models predicted it.

    Attributes:
        text: of the token. kld: KL(reference ‖ model) of the prediction at its place, nats; None for the first token, which
            nothing predicts.
        probability, reference_probability: of this token; 0 for the first one.
        likeliest, reference_likeliest: the LIKELIEST most probable tokens, (text, probability), the most probable first.
        flips: whether the two find different tokens likeliest.
    """

    text: str
    kld: float | None
    probability: float = 0.0
    reference_probability: float = 0.0
    likeliest: tuple[tuple[str, float], ...] = ()
    reference_likeliest: tuple[tuple[str, float], ...] = ()
    flips: bool = False


@dataclass(frozen=True)
class ConfidenceGroup(Report):
    """Tokens where the reference's largest probability lies in [low, high): their number, mean KLD, and share of flips."""

    low: float
    high: float
    tokens: int
    kld: float
    flips: float


@dataclass(frozen=True)
class TokensReport(Report):
    """A text as two models predict it.

    Attributes:
        key, reference: names of the two models. text_name: of the text.
        tokens: in their order. groups: by the reference's confidence, only those with tokens.
        kld: mean over all predicted tokens, nats.
    """

    key: str
    reference: str
    text_name: str
    tokens: tuple[TokenDivergence, ...]
    groups: tuple[ConfidenceGroup, ...]
    kld: float

"""Observed ranges as plain arrays: drawn by the page, printed by the CLI, kept in a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from core.recipe import SITES


@dataclass(frozen=True)
class SiteRanges:
    """Exact ranges of one site of one layer, and the published code's moving averages over the windows.

    Attributes:
        site: "layers.3.down_in"; kind: one of SITES.
        low, high: [C] float32, in the original channel order.
        block: width inside which channels may be reordered: a head's for q, k, v, o_in, an expert's for down_in, else C.
        ema_low, ema_high: [C] float32, the moving averages; None where only the exact ranges are known.
    """

    site: str
    layer: int
    kind: str
    low: np.ndarray
    high: np.ndarray
    block: int
    ema_low: np.ndarray | None = None
    ema_high: np.ndarray | None = None

    def averaged(self) -> SiteRanges:
        """Return the same site with its moving averages as `low` and `high`, where they are known."""
        return self if self.ema_low is None else replace(self, low=self.ema_low, high=self.ema_high)

    @property
    def is_average(self) -> bool:
        """Whether `low` and `high` are the moving averages, as in what `averaged` returns."""
        return self.ema_low is not None and self.low is self.ema_low

    @property
    def outlier_ratio(self) -> float:
        """The site's largest absolute value over the width of its median channel."""
        largest = max(abs(float(self.low.min())), abs(float(self.high.max())))
        return largest / max(float(np.median(self.high - self.low)), 1e-12)

    def to_dict(self) -> dict[str, list[float]]:
        """Return the ranges as JSON types, one number per channel."""
        arrays = {"min": self.low, "max": self.high, "ema_min": self.ema_low, "ema_max": self.ema_high}
        return {name: values.tolist() for name, values in arrays.items() if values is not None}


@dataclass(frozen=True)
class Outlier:
    """A channel much wider than its site's median channel; `ratio` is how many times."""

    site: str
    layer: int
    kind: str
    channel: int
    low: float
    high: float
    ratio: float


@dataclass(frozen=True)
class TokenExtreme:
    """A token at which a channel is extreme, or all channels of a site together, with the text around it."""

    value: float
    token_text: str
    context_before: str
    context_after: str
    position: int


@dataclass(frozen=True)
class TokenPeaks:
    """The size of tokens at one site: a token's peak is the largest absolute value of its channels.

    Attributes:
        tokens: their number. median: of their peaks.
        power: mean square of the values of a token, the median over all tokens.
        massive: number of tokens whose peak is more than `MASSIVE` times the median.
        largest: the tokens of the largest peaks, the largest first; `value` is the peak.
    """

    tokens: int
    median: float
    power: float
    massive: int
    largest: list[TokenExtreme]

    def ratio(self, token: TokenExtreme) -> float:
        """Return the peak of a token over that of the median token."""
        return token.value / max(self.median, 1e-12)


@dataclass(frozen=True)
class RangesReport:
    """Ranges of every site on one text.

    Attributes:
        calibration: the Calibration as a dict; text_name, tokens, window: what was really observed.
        sites: by name, in layer order.
        groups: query heads per key/value head, needed to cluster R2 and R3.
        basis: of the channels, a name of `core.options.BASES`. peaks: of the tokens by site, empty where they were not observed.
    """

    model: str
    revision: str | None
    calibration: dict[str, Any]
    text_name: str
    tokens: int
    window: int
    seconds: float
    device: str
    groups: int
    sites: dict[str, SiteRanges]
    basis: str = "original"
    peaks: dict[str, TokenPeaks] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return 1 + max(entry.layer for entry in self.sites.values())

    def outliers(self, n: int = 20) -> list[Outlier]:
        """List the `n` channels with the largest width relative to their site's median width."""
        found = []
        for entry in self.sites.values():
            width = entry.high - entry.low
            ratio = width / max(float(np.median(width)), 1e-12)
            for channel in np.argsort(-ratio)[:n]:
                found.append(
                    Outlier(
                        entry.site,
                        entry.layer,
                        entry.kind,
                        int(channel),
                        float(entry.low[channel]),
                        float(entry.high[channel]),
                        float(ratio[channel]),
                    )
                )
        return sorted(found, key=lambda o: -o.ratio)[:n]

    def massive_tokens(self, n: int = 20) -> list[tuple[SiteRanges, TokenExtreme, float]]:
        """List the `n` tokens with the largest peak relative to their site's median token: (site, token, ratio)."""
        found = [(self.sites[name], t, entry.ratio(t)) for name, entry in self.peaks.items() for t in entry.largest]
        return sorted(found, key=lambda row: -row[2])[:n]

    def heatmap(self, kind: str, orders: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Return log10 of each channel's largest absolute value, [L, C] float32; with `orders` new = old[order] in each layer."""
        rows = [np.maximum(np.abs(e.low), np.abs(e.high)) for e in self.sites.values() if e.kind == kind]
        rows = rows if orders is None else [row[order] for row, order in zip(rows, orders, strict=True)]
        return np.log10(np.maximum(np.stack(rows), 1e-12)).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: {"sites": {name: {"min", "max", "ema_min", "ema_max"}}} plus how it was measured."""
        return {
            "model": self.model,
            "revision": self.revision,
            "calibration": self.calibration,
            "text": self.text_name,
            "tokens": self.tokens,
            "window": self.window,
            "seconds": self.seconds,
            "device": self.device,
            "basis": self.basis,
            "site_kinds": list(SITES),
            "sites": {name: entry.to_dict() for name, entry in self.sites.items()},
            "tokens_at": {name: asdict(entry) for name, entry in self.peaks.items()},
        }


@dataclass(frozen=True)
class ChannelDetail:
    """One channel over the calibration tokens: moments, a histogram, and the tokens at its extreme values.

    Attributes:
        mean_size: mean of the absolute values.
    """

    site: str
    channel: int
    low: float
    high: float
    mean: float
    std: float
    mean_size: float
    counts: list[int]
    edges: list[float]
    extremes: list[TokenExtreme]

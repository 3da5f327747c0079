"""What the probe reads and tells: frozen dataclasses of plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.checks import require_int
from core.report import Report, jsonable

if TYPE_CHECKING:
    import numpy as np

MAX_PROBE_TOKENS = 4096

SATURATED = 0.5
"""Nats per token above which the quadratic form reads too low: a prediction beyond is only known to be large."""


@dataclass(frozen=True)
class ProbeText:
    """The text that a probe reads.

    Attributes:
        text: name or path of a text, or "text:" and a pasted one, as `core.evaluation.windows.evaluation_windows` takes it.
        tokens: how many of its first tokens, 8 to `MAX_PROBE_TOKENS`.
    Raises: InputError for another number.
    """

    text: str = "sotu"
    tokens: int = 512

    def __post_init__(self) -> None:
        tokens = require_int("probe tokens", self.tokens, 8, MAX_PROBE_TOKENS, f"use 8 to {MAX_PROBE_TOKENS}")
        object.__setattr__(self, "tokens", tokens)


PROBE_TEXT = ProbeText()
"""What a probe reads unless something else is asked for."""

CONTEXT, MAX_CONTEXT = 2048, 10**7
"""Tokens whose keys and values a budget counts, if nothing else is said, and the most."""


def require_context(value: object) -> int:
    """Check a number of tokens whose keys and values a budget counts. Raises: InputError."""
    return require_int("context", value, 1, MAX_CONTEXT, f"use 1 to {MAX_CONTEXT} tokens")


@dataclass(frozen=True)
class ProbeInfo(Report):
    """What a probe consists of.

    Attributes:
        tokens, window: how much of the text it has read. draws: labels drawn at every position.
        noise_floor: KLD of the model run in bfloat16 against float32 on these tokens, nats per token.
        seconds: what it took. nbytes: what it keeps.
    """

    model: str
    text: str
    tokens: int
    window: int
    draws: int
    noise_floor: float
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Prediction(Report):
    """Predicted divergence of a recipe from the model it starts from, nats per token.

    Attributes:
        cells: by "layers.<i>.<cell>", a cell being a site, "softmax" or a linear layer (qkv, o, up, down).
        total: their sum.
        estimated: cells that were not computed in the time allowed but read off neighbours (other clusters or bits).
        unknown: cells about which nothing is known yet; they are missing from `cells` and `total`.
        noise_floor: see `ProbeInfo`.
        seconds: what the prediction took.
    """

    cells: dict[str, float]
    total: float
    estimated: tuple[str, ...]
    unknown: tuple[str, ...]
    noise_floor: float
    seconds: float

    @property
    def saturated(self) -> bool:
        """Whether the total lies beyond where the quadratic form holds."""
        return self.total > SATURATED

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, with `saturated`."""
        return super().to_dict() | {"saturated": self.saturated}


@dataclass(frozen=True)
class Measurement(Report):
    """Measured divergence of a fake-quantised pass over the probe's tokens, nats per token.

    Attributes:
        kld: mean over the tokens. stderr: its standard error over the windows, None for a single window.
        same_top: share of tokens whose likeliest next token stayed.
        noise_floor: see `ProbeInfo`.
        seconds: what the pass took.
    """

    kld: float
    stderr: float | None
    same_top: float
    noise_floor: float
    seconds: float


@dataclass(frozen=True)
class CostCurve(Report):
    """Predicted divergence of one site by its number of clusters, everything else in float, nats per token.

    Attributes:
        site: one of `core.recipe.SITES`; layers: in which it is quantised; bits: to how many.
        g: clusters, per head for q, k, v, o_in.
        kmeans, equal: with KMeans, and with equal groups of channels sorted by range, for each g.
        per_tensor, per_channel: with one grid for the whole tensor, and with one for every channel.
        knee: the g of `kmeans` beyond which more gain little (`core.methods.rptq.explore.knee`); None without one.
        noise_floor: see `ProbeInfo`.
    """

    site: str
    layers: tuple[int, ...]
    bits: int
    g: tuple[int, ...]
    kmeans: tuple[float, ...]
    equal: tuple[float, ...]
    per_tensor: float
    per_channel: float
    knee: int | None
    noise_floor: float


WIDER = 1.1
"""Ratio of two ranges from which one counts as wider."""


@dataclass(frozen=True)
class SiteShift(Report):
    """How one site of one layer differs between calibration A and calibration B.

    Attributes:
        widths: [2, C] float32, the width of every channel's range with A and with B.
        moved: channels that change cluster, clusters being matched such that these are as few as possible.
        rand: adjusted Rand index of the two clusterings, 1 for equal ones and about 0 for unrelated ones; mean over the heads.
    """

    widths: np.ndarray
    moved: int
    rand: float

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return self.widths.shape[1]

    @property
    def wider(self) -> int:
        """Channels whose range with B is more than `WIDER` times that with A."""
        return int((self.widths[1] > WIDER * self.widths[0]).sum())

    @property
    def narrower(self) -> int:
        """Channels whose range with A is more than `WIDER` times that with B."""
        return int((self.widths[0] > WIDER * self.widths[1]).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the index; the widths of single channels are what `inspect` writes."""
        return {name: getattr(self, name) for name in ("channels", "wider", "narrower", "moved", "rand")}


@dataclass(frozen=True)
class CalibrationPair(Report):
    """What two calibrations, A and B, make of one recipe, judged on one text.

    Attributes:
        texts, tokens: names of the two calibration texts, and how much of each was observed.
        judge: name of the text that the probe reads; judged: its tokens.
        sites: by "layers.<i>.<site>".
        predicted, measured: divergence of the recipe with A and with B on that text, nats per token.
    """

    texts: tuple[str, str]
    tokens: tuple[int, int]
    judge: str
    judged: int
    sites: dict[str, SiteShift]
    predicted: tuple[Prediction, Prediction]
    measured: tuple[Measurement, Measurement]

    def share(self, name: str) -> float:
        """Return the share of all sites' channels that are "wider", "narrower" or "moved"."""
        sites = self.sites.values()
        return sum(getattr(site, name) for site in sites) / sum(site.channels for site in sites)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        own = {name: getattr(self, name) for name in ("texts", "tokens", "judge", "judged")}
        costs = {name: [found.to_dict() for found in getattr(self, name)] for name in ("predicted", "measured")}
        return jsonable(own | {"sites": {name: site.to_dict() for name, site in self.sites.items()}} | costs)


@dataclass(frozen=True)
class Uniform(Report):
    """A recipe with one number of bits for all weights and one for all keys and values (None: as in the recipe).

    Attributes: nbytes, predicted: as in `Allocation`.
    """

    weights: int | None
    cache: int | None
    nbytes: int
    predicted: float

    @property
    def bits(self) -> dict[str, int]:
        """The bits that it differs in, by tensor."""
        return {name: own for name, own in (("weights", self.weights), ("k", self.cache), ("v", self.cache)) if own is not None}


@dataclass(frozen=True)
class Allocation(Report):
    """Bits for single layers, chosen for a budget.

    Attributes:
        overrides: what the recipe gets, as `Overrides.from_dict` reads it.
        bits: of every part that was chosen, also where they equal the recipe's: by "layers.<i>.<cell>".
        predicted: divergence, nats per token, activations included.
        nbytes: of the model and of the keys and values of `context` tokens, as stored.
        budget: bytes allowed, or None; bound: divergence allowed, or None. One of the two is given.
        uniform: recipes of the same activations with uniform bits, by rising bytes.
        rival: of these the one with the least predicted divergence within the budget, or the fewest bytes within the bound; None
            where none fits.
    """

    overrides: dict[str, int]
    bits: dict[str, int]
    predicted: float
    nbytes: int
    context: int
    budget: float | None
    bound: float | None
    uniform: tuple[Uniform, ...]
    rival: Uniform | None


@dataclass(frozen=True)
class GroupCount(Report):
    """The smallest cluster count that costs at most `within` (a share) more than one cluster per channel, both predicted."""

    g: int
    predicted: float
    per_channel: float
    within: float


@dataclass(frozen=True)
class SiteMove(Report):
    """How far the activations of one site of one layer moved at one position, as shares of squares (`core.probe.moved`).

    Attributes:
        moved: in all; None where the run's channels cannot be put into the model's order.
        came: what came in with the residual stream. rounded: what rounding the site adds, in the run's own channels.
        channels: the largest differences, the largest first: (channel, the original's value, the run's); where `moved` is None,
            the value that came in.
    """

    layer: int
    site: str
    moved: float | None
    came: float
    rounded: float
    channels: tuple[tuple[int, float, float], ...]

    @property
    def size(self) -> float:
        """What moved in all, or the sum of its two parts where that is not known."""
        return self.came + self.rounded if self.moved is None else self.moved


@dataclass(frozen=True)
class MovedReport(Report):
    """Where a quantised run's activations moved when one token was predicted.

    Attributes:
        key, reference: names of the two models. text_name: of the text.
        place: of the predicted token in the text, from 1. token: its text. after: the text of the token before, where it is
            predicted and where the sites were compared.
        sites: every site of every layer, the farthest moved first.
    """

    key: str
    reference: str
    text_name: str
    place: int
    token: str
    after: str
    sites: tuple[SiteMove, ...]

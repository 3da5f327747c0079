"""Words of the switch of bases on the tabs Explore and Reorder."""

from __future__ import annotations

SHOWN = "Channels shown"
VIEWS = {
    "original": "as they are",
    "reordered": "reordered",
    "scaled": "scaled",
    "rotated": "rotated",
    "all": "side by side",
}
INFO = {
    "original": "",
    "reordered": "Channels in the order of their clusters, g of them: see tab 2.",
    "scaled": "Every channel is divided by √(its RMS / the RMS of the weights that read it), as the method Rotation does.",
    "rotated": "Scaled channels are mixed by a Hadamard matrix; keys lose their mean. A channel is now a mixture of all of them.",
    "all": "Four charts with the same axes. Click a point to see its basis alone.",
}
JOB = "Observing in other bases"
WAIT = "The channels are being observed in the other bases…"
RATIO = "Largest value over the width of the median channel: {original} as the channels are, {scaled} scaled, {rotated} rotated."
NOISE = (
    "Rounding noise of one grid of {bits} bits for the whole site, as a multiple of the median token's power: {original} as the "
    "channels are, {scaled} scaled, {rotated} rotated."
)
STAY = (
    "Massive tokens: after the rotation, {count} of {tokens} tokens are more than {limit} times as large as the median token; "
    "the largest is {times} times as large. A rotation spreads a token over all channels but does not shorten it: only a range "
    "for each token, or a token left in float, helps."
)
GONE = (
    "After the rotation no token of {tokens} is more than {limit} times as large as the median token; the largest is {times} "
    "times as large."
)
TABLE = "This site in every basis; noise is predicted at {bits} bits, as a multiple of the median token's power"
HEADERS = [
    "basis",
    "largest value / median width",
    "noise, one grid",
    "noise, {} clusters",
    "noise, grid per channel",
    "largest token / median",
    "tokens above 10 ×",
]
TOKENS = "Largest tokens of the whole model, relative to the median token of their site"
TOKENS_HERE = "Largest tokens of this site, in the basis: {}"
TOKENS_ALL = "Largest tokens of the whole model, in the basis: {}"
TOKEN_HEADERS = ["layer", "site", "token", "position", "largest value", "× median"]
NOISE_CAPTION = "rounding noise by number of clusters, over the median token's power"
NOISE_TITLE = "noise, median token = 1"
NATS_ORIGINAL = "The cost in nats is predicted for channels as they are."
SCATTERS = "a point is a channel: its smallest value (across) and its largest (up); the axes are the same"
HEATMAPS = "largest value of every channel (across) by layer (up); the colours are the same"
LEARN_TITLE = "Learn: scaling, rotating, massive tokens"
LEARN = """
**Three ways to deal with an outlier channel.** *Reordering* leaves values as they are and gives similar channels a grid of
their own. *Scaling* divides loud channels and multiplies the weights that read them: what the layer computes stays the same.
*Rotating* multiplies every token by a Hadamard matrix, whose entries all have the same size: what stood in one channel is
spread over all, and the weights are rotated back.

**What a rotation cannot do.** It keeps the length of every token. A few tokens, often the first one, are hundreds of times as
long as the others ([arXiv 2402.17762](https://arxiv.org/abs/2402.17762)). They stay *massive* in every basis and widen the
range of every rotated channel. So the method Rotation gives each token a range of its own, and keeps the first in float.

**How the noise is predicted.** A grid with steps of size Δ rounds with a noise of Δ² / 12. It is compared with the mean square
of the median token, which no rotation changes. In scaled channels both are measured after the scaling.
"""

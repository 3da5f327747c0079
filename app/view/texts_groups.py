"""Labels and explanations of costs by number of clusters, and of two calibration texts beside each other."""

from __future__ import annotations

# the curve in nats, on the tab Reorder
NATS_LABEL = "Predicted divergence of this site against the number of clusters"
NATS_CAPTION = "predicted KLD of this site alone, nats per token"
NATS_WAIT = "The cost in nats is predicted when the controls rest."
NATS_JOB = "Predicting the cost of this site"
EVERYWHERE = "The same g in every layer"
CURVE_CAPTION = "squared error by number of clusters"
KMEANS = "KMeans"
EQUAL = "equal groups"
PER_CHANNEL = "one grid per channel"
PER_TENSOR = "one grid for the tensor"
KNEE = "knee, g = {}"
HERE = "now, g = {}"
CURVE_HEADERS = ["g", "error, KMeans", "error, equal groups", "nats, KMeans", "nats, equal groups"]
CURVE_TABLE = "Squared error (one grid for the tensor = 1) and predicted KLD by number of clusters"
WHOLE = "one grid"
CHANNEL = "per channel"
KNEE_ERROR = "Squared error: the knee is at g = {g}, which saves {share} % of all that clusters can save."
KNEE_NATS = "Predicted divergence: the knee is at g = {g}, {cost} nats."
NO_KNEE_ERROR = "Squared error: the curve has no knee."
NO_KNEE_NATS = "Predicted divergence: the curve has no knee."
LEVELS = "One grid for the tensor costs {tensor} nats, one for every channel {channel}."
EQUAL_NEEDS = "Equal groups need g = {g} to cost no more."
EQUAL_NEVER = "Up to g = {g}, equal groups never cost as little."
BELOW_FLOOR = "All of it lies below the noise floor of {floor} nats."
CURVE_NOTE = (
    "In nats: clusters and grids as in a run, the first token in float, and gradients on a short text. Squared error: from the "
    "ranges shown. Equal groups: channels sorted by range, cut into g groups of one size. Of queries, keys, values and attention "
    "out, g counts clusters of one head."
)

# two calibrations, on the tab Quantise
PAIR = "Compare two calibration texts"
PAIR_INFO = (
    "A is the calibration of this recipe: the text at the side, and its tokens. B is chosen here. Both give ranges, clusters and "
    "a cost. The cost is read on a part of a text that neither A nor B is calibrated on."
)
PAIR_TEXT = "Text B"
PAIR_TOKENS = "Tokens of B"
PAIR_JUDGE = "Judged on"
PAIR_START = "Compare A and B"
PAIR_WIDER = (
    "With B, ranges are more than a tenth wider in {wider} % of channels and narrower in {narrower} %; {moved} % of channels "
    "change cluster."
)
PAIR_COST = "{recipe} costs {a} nats with A and {b} with B, measured on {tokens:,} tokens of {judge}."
PAIR_BARS = {"predicted": "{}, predicted", "measured": "{}, measured on the probe"}
PAIR_TOLD = "A: {tokens[0]:,} tokens of {texts[0]} · B: {tokens[1]:,} tokens of {texts[1]}"
PAIR_MAP_LABEL = "Heat map of the share of channels that change cluster, by layer and site"
PAIR_MAP = "channels that change cluster, %; click a cell to see its channels"
PAIR_SCATTER_LABEL = "Scatter of channels: width of the range with A against the width with B"
PAIR_SCATTER = "layer {layer}, {site}: width of every channel's range"
PAIR_SAME = "as wide with both"
PAIR_HEADERS = ["layer", "site", "change cluster", "adjusted Rand index", "wider with B", "narrower with B"]
PAIR_TABLE = "The ten sites that differ most. Click a row, or press Enter on it, to see its channels."
PAIR_NONE = "Nothing was compared yet: press the button above."
PAIR_SITE = "This site does not exist: click a cell or a row."

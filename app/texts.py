"""Every label, help line and explanation of the page."""

from __future__ import annotations

TITLE = "Quantscope"
TAGLINE = "See why activations are hard to quantise, and what each choice costs."

SITE_LABELS = {
    "attn_in": "attention in",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o_in": "attention out",
    "mlp_in": "MLP in",
    "down_in": "MLP hidden",
}
SITE_HELP = {
    "attn_in": "output of the norm before attention, input of the q, k and v projections",
    "q": "queries, after position encoding",
    "k": "keys, as the KV cache keeps them",
    "v": "values, as the KV cache keeps them",
    "o_in": "output of attention, input of its output projection",
    "mlp_in": "output of the norm before the MLP",
    "down_in": "inside of the MLP, input of the down projection",
}
SITE_REORDER = {"attn_in": "R1", "q": "R2", "k": "R2", "v": "R3", "o_in": "R3", "mlp_in": "R4", "down_in": "R5"}


def site_label(kind: str) -> str:
    """A site's name for people, with RPTQ's name of its reordering."""
    return f"{SITE_LABELS.get(kind, kind)} · {SITE_REORDER.get(kind, '')}"


# sidebar
MODEL = "Model"
MODEL_INFO = "A name from the list, a Hub id (owner/name), a local folder or a .gguf file. Safetensors only; no code is run."
MODEL_INFO_SPACE = "A name from the list or a Hub id (owner/name). Safetensors only; no code from a model is ever run."
TEXT = "Calibration text"
TEXT_PASTE = "Paste my own…"
TEXT_NAMES = {"sotu": "State of the Union speeches", "wikitext2": "WikiText-2"}
PASTE_LABEL = "Your text"
PASTE_INFO = "Used for your session only, never stored or shared. At least 512 tokens, about 2,500 characters."
TOKENS = "Calibration tokens"
OBSERVE = "Observe ranges"
METHOD = "Method"
METHODS = {"rptq": "RPTQ: grouped channels", "rtn": "RTN: plain rounding", "bitnet": "BitNet a4.8: ternary models"}
SCHEME = "Bits"
SCHEME_INFO = "W = weights, A = activations, KV = key/value cache only."
SCHEME_CUSTOM = "own bits, set in the Quantise tab"
CLUSTERS = "Clusters g"
QUANTIZE = "Quantise"
STOP = "Stop"
LINK = "Copy link"
SAVE = "Share and save"
LINK_LABEL = "Link to this model and recipe"
SAVE_RECIPE = "Recipe (JSON)"
SAVE_RANGES = "Ranges (CSV)"
SAVE_REPORT = "Report (JSON)"

# explore
EXPLORE = "1 · Explore"
LAYER = "Layer"
SITE = "Site"
LINEAR = "Linear axes"
SAME_AXES = "One scale for all layers"
AVERAGED = "Moving average over windows"
SCATTER_LABEL = "Scatter of channels: minimum against maximum. The channel number below selects the same points by keyboard."
HEATMAP_LABEL = "Heat map of the largest absolute value by layer and channel"
HISTOGRAM_LABEL = "Histogram of the chosen channel's values"
CHANNEL = "Channel"
CHANNEL_EMPTY = (
    "Click a point of the chart: here you see the channel's range, its histogram and the tokens behind its extreme values."
)
CHANNEL_JOB = "Reading the channel"
CHANNEL_LATER = "Release the slider, or press Enter in the field above, to read this channel's values and tokens."
CHANNEL_WAIT = "Looking for the tokens behind the extremes…"
OUTLIERS = "Widest channels of the whole model, relative to their site. Click a row to go there."
OUTLIER_HEADERS = ["layer", "site", "channel", "min", "max", "× median"]
TO_REORDER = "Next: group these channels →"
LEARN_EXPLORE_TITLE = "Learn: what these pictures show"
LEARN_EXPLORE = """
**What a point is.** A layer's input is a vector with one number per *channel*, for every token. Over the calibration
text each channel has a smallest and a largest value: that is its point here. Round points close to the origin are quiet
channels; far away are the loud ones.

**Why it matters.** Four bits are sixteen steps. One scale for the whole tensor must reach the widest channel, so its
steps are as wide as the outlier demands, and quiet channels fall into one or two of them. That is why activations are
harder to quantise than weights.

**How to read the axes.** They are logarithmic on both sides of zero (linear close to it), because ranges span decades.
Switch to linear to see how far out the outliers really are. *Moving average* shows what RPTQ's published code calibrates
with: bounds averaged over the windows, so that one loud token counts little.
"""

# reorder
REORDER = "2 · Reorder"
CLUSTER_SLIDER = "Clusters g"
STRIPS_LABEL = "Two strips of channel ranges, before and after reordering"
CURVE_LABEL = "Predicted error against the number of clusters"
CLUSTER_SCATTER_LABEL = "Scatter of channels coloured by cluster"
CLUSTER_TABLE = "Clusters as a table"
CLUSTER_HEADERS = ["cluster", "channels", "low", "high", "scale", "zero point"]
BITS_PREVIEW = "Bits"
TO_QUANTIZE = "Next: quantise with this →"
LEARN_REORDER_TITLE = "Learn: clusters and reordering"
LEARN_REORDER = """
**The idea of RPTQ** ([arXiv 2304.01089](https://arxiv.org/abs/2304.01089)). Channels with similar ranges are put into g
clusters (k-means on their minimum and maximum). Each cluster gets one scale and zero point of its own, so quiet
channels get fine steps and loud ones coarse steps.

**Reordering.** Channels of a cluster are moved next to each other, so that a matrix product reads each cluster as one
block. The move is folded into the weights before and after: without quantisation the model's output does not change.

**How many?** The curve on the right falls quickly and then flattens: beyond its knee more clusters cost parameters and
gain little. Queries, keys and values are grouped within each head, with an eighth of g per head.
"""

# quantise
QUANTIZE_TAB = "3 · Quantise"
VARIANT = "Variant"
VARIANTS = {
    "default": "Default: the better rules",
    "official": "Official: as published code",
    "strict": "Strict: norm outputs low too",
}
WEIGHTS = "Weights"
WEIGHT_METHODS = {"gptq": "GPTQ: second order, slower, better", "rtn": "Round to nearest: at once"}
CALIBRATION_TOKENS = "Calibration tokens"
MEASURE = "Measure afterwards"
BITS_PANEL = "Bits of every tensor"
BITS_INFO = "2 to 8, or 16 for not quantised. Changing one makes the scheme your own."
BIT_LABELS = {
    "weights": "weights",
    "attn_in": "attention in",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "softmax": "softmax",
    "o_in": "attention out",
    "mlp_in": "MLP in",
    "down_in": "MLP hidden",
}
CLUSTER_PANEL = "Clusters of every reordering"
CLUSTER_LABELS = {
    "R1": "R1 attention in",
    "R2": "R2 queries, keys (per head)",
    "R3": "R3 values (per head)",
    "R4": "R4 MLP in",
    "R5": "R5 MLP hidden",
}
SQNR_LABEL = "Signal-to-noise of each layer's output"
SITES_LABEL = "Signal-to-noise by layer and site"
RUN_EMPTY = "No run yet. Press Quantise: every layer is calibrated, reordered and rounded, then measured beside the original."
TO_COMPARE = "Next: read what it writes →"
DETAILS = "Stages, fallbacks and kernels of the last run"
LEARN_QUANTIZE_TITLE = "Learn: what quantising does"
LEARN_QUANTIZE = """
**What happens.** Layer by layer: the calibration text runs through the layers already quantised, ranges are observed,
channels grouped and reordered, weights rounded (GPTQ corrects each column's error in the columns after it) and packed.
The original model is never changed.

**SQNR** is the ratio of signal to rounding noise in decibels: 20 dB is an error of a tenth, 40 dB of a hundredth. It
falls from layer to layer, because errors add up.

**Fallbacks.** If a layer's statistics are unusable for GPTQ it is rounded to nearest instead; it is then listed here
and marked in the chart.
"""

# compare
COMPARE = "4 · Compare"
RUNS = "Compare"
PROMPT = "Prompt"
PROMPT_DEFAULT = "The state of the union is"
GENERATE = "Write"
NEW_TOKENS = "New tokens"
TEMPERATURE = "Temperature"
CHAT = "Chat format"
MEASURE_NOW = "Measure"
EVAL_TOKENS = "Tokens"
BYTES_LABEL = "Measured bytes by part"
TEXTS_EMPTY = "Press Write: each model continues the same prompt, one after the other."
NUMBERS_EMPTY = "Press Measure to compare perplexity, divergence, bytes and speed on the same text."
NO_RUNS = "Nothing to compare yet: the base model appears when it is loaded, a quantised one after Quantise."
MEMORY = "Project memory to any size"
MEMORY_INFO = "By formula, nothing is loaded: these are estimates."
SHAPE = "Size"
BATCH = "Batch"
SEQUENCE = "Sequence length"
MEMORY_LABEL = "Projected memory by scheme"
LEARN_COMPARE_TITLE = "Learn: what the numbers mean"
LEARN_COMPARE = """
**Perplexity** is how many tokens the model is torn between, on average: lower is better. **KLD** is how far the
quantised model's next-token distribution is from the original's, in nats: 0 is identical. **Same top token** is how
often both would pick the same next token.

**± is a standard error** over the tokens measured. Two runs closer than that are not told apart by this text; measure
more tokens.

**Measured and estimated.** Bytes in upright figures were counted on the tensors in memory. Figures with ≈ in italics
come from a formula.
"""

# states
STARTING = "Starting: the model is being loaded and observed for the first time."
NO_RANGES = "No ranges yet. Choose a model and a text at the side, then press “Observe ranges”."
BUG = "Something broke on our side; your inputs are kept. Try again or report id {}."

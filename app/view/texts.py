"""Every label, help line and explanation of the page."""

from __future__ import annotations

from dataclasses import fields

from core import recipe

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


def site_label(kind: str) -> str:
    """Return a site's name for people, with RPTQ's name of its reordering."""
    return f"{SITE_LABELS[kind]} · {recipe.REORDER_OF[kind]}"


# sidebar
MODEL = "Model"
MODEL_INFO = "A name from the list, a Hub id (owner/name), a local folder or a .gguf file. Safetensors only; no code is run."
MODEL_INFO_SPACE = "A name from the list or a Hub id (owner/name). Safetensors only; no code from a model is ever run."
TEXT = "Calibration text"
TEXT_PASTE = "Paste my own…"
TEXT_NAMES = {"sotu": "State of the Union", "wikitext2": "WikiText-2"}
YOUR_TEXT = "your text “{}…”"
PRIVATE_TEXT = "a private text"
PASTE_LABEL = "Your text"
PASTE_INFO = "Used for your session only, never stored or shared. At least 512 tokens, about 2,500 characters."
TOKENS = "Tokens to observe"
OBSERVE = "Observe ranges"
METHOD = "Method"
METHODS = {
    "rptq": "RPTQ: grouped channels",
    "rotation": "Rotation: scaled and rotated channels",
    "rtn": "RTN: rounding, the baseline",
    "bitnet": "BitNet a4.8: ternary models",
}
SCHEME = "Bits"
SCHEME_INFO = "W weights, A activations, KV only the cache. W4A4 keeps norm outputs and softmax at 8 bits."
SCHEME_CUSTOM = "custom: see tab 3"
CLUSTERS = "Clusters g"
OWN_CLUSTERS = "own counts, see tab 3"
BITNET_MODE = "Inputs of the projections"
BITNET_MODE_INFO = "Weights are ternary, 2 bits; this decides what they are multiplied with."
BITNET_MODES = {
    "w1.58a8": "b1.58: 8-bit inputs",
    "a4.8": "a4.8: 4 bits, sparse 8 bits",
    "a4.8-fp4": "a4.8 FP4: 4-bit floats",
    "int4": "full INT4", "fp4": "full FP4",
    "v2-a8": "v2, 8 bits: Hadamard before Out and Down", "v2": "v2: 4 bits, Hadamard before Out and Down",
}
QUANTIZE = "Quantise"
STOP = "Stop"
LINK = "Copy link"
SAVE = "Share and save"
LINK_COPIED = "Copied."
LINK_NOT_COPIED = "Copy it from the field above."
LINK_PASTED = "The text you pasted is not in the link: whoever opens it must paste the text too, or choose another."
LINK_FOREIGN = (
    "This link names a calibration text that is not here: its author pasted it, or it was a file. Paste it at the side, or "
    "choose another. The ranges shown are from {}."
)
LINK_RUN = "The run {} of the link is not kept here: set its recipe and press Quantise. Everything else of the link is shown."
OPEN_RECIPE = "Open a recipe (JSON)"
RECIPE_TITLE = "Recipe opened"
RECIPE_OPENED = "The fields are set to it: press Quantise to run it, or Observe for the ranges of its model."
RECIPE_PASTED = "The fields are set to it. Its calibration text is not in the file: paste it at the side, or choose another."
PAPERS = "Papers:"
PROGRAMS = "Use this page from a program"
LINKS = (
    ("RPTQ", "https://arxiv.org/abs/2304.01089"),
    ("BitNet a4.8", "https://arxiv.org/abs/2411.04965"),
    ("GPTQ", "https://arxiv.org/abs/2210.17323"),
)
LINK_LABEL = "Link to this view"
SAVE_RECIPE = "Recipe (JSON)"
SAVE_RANGES = "Ranges (CSV)"
SAVE_REPORT = "Report (JSON)"

# what this is
INTRO_TITLE = "Why four bits are hard, on a real model"
INTRO = (
    "Every point below is one channel of a layer's input. A few channels are far wider than the rest, and sixteen steps must "
    "reach them too: that is what makes models of four bits worse. <b>RPTQ</b> groups channels of similar range; <b>BitNet</b> "
    "trains models that need only three different weights."
)
INTRO_TOY = (
    "This model is part of the page: {size} M parameters, for a quick look. A real one is one choice away: choose "
    "{other} or type a Hub id at the side."
)
FOOTER = "Every version with its tested range, every backend with the reason"
FOOTER_COMMAND = "The same without a browser:"
BACKENDS = "Backends that run here: {}"
NO_BACKENDS = ". Not here: {}"
PACKAGE_HEADERS = ["package", "installed", "tested range", ""]
BACKEND_HEADERS = ["backend", "here", "why"]
PACKAGE_STATES = {True: "tested", False: "NOT TESTED"}
BACKEND_STATES = {True: "runs", False: "does not run"}
OPEN_TERNARY = "Open {} (BitNet a4.8, part of this page)"
SIDE = "Model and recipe"

# explore
EXPLORE = "1 · Explore"
LAYER = "Layer"
SITE = "Site"
LINEAR = "Linear axes"
SAME_AXES = "One scale for all layers"
AVERAGED = "Moving average"
AVERAGE_RANGE = "average range"
POINTS = "a point is a channel: its smallest and largest value"
POINTS_AVERAGED = "a point is a channel: its smallest and largest value in a window, averaged over the windows"
POINTS_CLUSTERED = "channels by cluster"
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

**How many?** The curve below the points falls quickly and then flattens: beyond its knee more clusters cost parameters and
gain little. Queries, keys and values are grouped within each head, with an eighth of g per head.
"""

# quantise
QUANTIZE_TAB = "3 · Quantise"
VARIANT = "Variant"
VARIANTS = {
    "default": "Default: the better rules",
    "official": "Official: as published code",
    "strict": "Strict: norm outputs low too",
    "matched": "Matched: as RPTQ, no reordering",
    "sorted": "Sorted: groups of equal size",
}
RTN_PLAIN = "Plain: one range per tensor"
WEIGHTS = "Weights"
WEIGHT_METHODS = {"gptq": "GPTQ: second order, better", "rtn": "Round to nearest: at once"}
CALIBRATION_TOKENS = "Calibration tokens"
TOPK = "TopK keeps"
KV_BITS = "KV cache"
BOS_BITS = "First token's KV"
Q_BITS = "Queries"
NOT_QUANTISED = "16: off"
MEASURE = "Measure afterwards"
BITS_PANEL = "Bits of every tensor"
BITS_INFO = "2 to 8, or 16 for not quantised. Changing one makes the scheme your own."
BIT_LABELS = {entry.name: SITE_LABELS.get(entry.name, entry.name) for entry in fields(recipe.Bits)}
"""Tensors of `Bits`: the sites by their labels, weights and softmax by their own names."""
CLUSTER_PANEL = "Clusters of every reordering"
CLUSTER_LABELS = {
    "R1": "R1 attention in",
    "R2": "R2 queries, keys (per head)",
    "R3": "R3 values (per head)",
    "R4": "R4 MLP in",
    "R5": "R5 MLP hidden",
}
ORDER_LABEL = "Order of the stream between the layers"
ORDERS = {"layer": "Each layer its own: R1 and R4", "shared": "One for all layers"}
ORDER_INFO = "One order is folded into the weights: no norm reorders. It costs perplexity: measure both and compare."
SEGMENTS_LABEL = "Integer accumulators"
SEGMENTS = {
    "exact": "Exact: one for each cluster",
    "aligned": "Aligned: clusters merged to 4 at most",
    "pow2": "Power of two: one, scales rounded up",
}
SEGMENTS_INFO = "Fewer are faster and cost perplexity: measure both and compare."
EXACT = "The output of every layer is exactly that of the original: there is no curve to draw."
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

**BitNet** has weights of -1, 0 and 1 and needs no calibration: every token gets its own scale. It works for models
*trained* that way. What a run is worth is always written beside it: a model trained in full precision and rounded to
three values writes noise, and that is the expected result.

**Fallbacks.** If a layer's statistics are unusable for GPTQ it is rounded to nearest instead; it is then listed here
and marked in the chart.
"""

# compare
COMPARE = "4 · Compare"
RUNS = "Compare"
PROMPT = "Prompt"
PROMPT_DEFAULT = "The state of the union is"
PROMPT_STORY = "Once upon a time"
"""Prompt for the embedded models, which were trained on stories."""
GENERATE = "Write"
NEW_TOKENS = "New tokens"
TEMPERATURE = "Temperature"
CHAT = "Chat format"
NO_CHAT = " · this model has no chat format: the prompt was continued as plain text"
WHOLE_WINDOWS = " ({asked:,} asked for, in whole windows of {window})"
MEASURE_NOW = "Measure"
EVAL_TOKENS = "Tokens"
EVAL_TEXT = "Measure on"
EVAL_TEXT_OWN = "my calibration text"
EVAL_TEXT_NONE = "The ranges are not from a pasted text: paste one at the side and press Observe, or measure on a named text."
SEED = "Seed"
KEEP = "Name, remove, download or open runs"
KEEP_RUN = "Run"
KEEP_NAME = "Name (empty: the page's own)"
KEEP_RENAME = "Rename"
KEEP_REMOVE = "Remove"
KEEP_PACK = "Make a zip file"
KEEP_PACKING = "Writing the zip file"
KEEP_FILE = "Download"
KEEP_NO_FOLDER = (
    "This run has no saved folder: an unquantised model is not copied, and one that the disk had no room for is only in memory. "
    "The command below writes a folder."
)
KEEP_COMMAND = "The command that repeats this run:"
LOADS = "Other programs that load it, by the verb export of the command line:"
OPEN_PATH = "Quantised folder on this machine"
OPEN_SAVED = "Open the folder"
OPEN_ZIP = "Open a zip file (up to {})"
OPENING = "Opening a saved model"
RUN_OPENED = "This model is quantised already: it is the run “{}” of tab {}. The charts show {}, which it was made from."
BYTES_LABEL = "Measured bytes by part"
TEXTS_EMPTY = "Press Write: each model continues the same prompt, one after the other."
NUMBERS = "Numbers of the measured runs"
NUMBERS_EMPTY = "Press Measure to compare perplexity, divergence, bytes and speed on the same text."
NO_RUNS = "Nothing to compare yet: the base model appears when it is loaded, a quantised one after Quantise."
SPEED_HEADERS = ["run", "measured", "limit of the memory", "reached", "read per token", "memory, measured"]
SPEED_CAPTION = "writing one text, token by token"
SPEED_NOTE = (
    "a token reads all weights once and the KV cache; the limit is the speed of a copy of 64 MiB on {threads}, divided by these "
    "bytes. A model smaller than the processor's cache can be faster than it. Bytes read are those of the kernels that run here: "
    "without a kernel for packed weights a quantised model is read as a float copy, and fewer bits save memory but no time."
)
EMBEDDINGS_PART = "embeddings and head (float)"
FORMULA_NOTE = (
    "By formula: the layers' weights at their bits, without scales, and embeddings and head in float, as they are kept. "
    "Measured: all tensors, with scales and norms."
)
CAUTION = "Caution: {}"
WEIGHTS_FROM = "Weights of {}."
NOT_TOLD_APART = "No loss that this text can tell:"
PAIRED_NOTE = (
    "Against float: the ratio of perplexities on the same windows, with its logarithm ± standard error over windows. A window "
    "that is hard for one model is hard for the other, so this error is much smaller than that of either perplexity. Δp: change "
    "of the right token's probability, root mean square. Hover over a figure for its verdict and percentiles."
)
MIXED_PROTOCOLS = (
    "† was measured on another text, number of tokens or window: its perplexity does not compare with the other rows. "
    "Tick it and press Measure to measure all of them in one way."
)
SEVERAL_MODELS = "Runs of several models: KLD and same top token compare each run with its own float model, never across models."
SAME_VOCABULARY = "They share a vocabulary size of {size:,}, so their perplexities compare, if their tokenizers are the same."
OTHER_VOCABULARY = "Their vocabularies differ ({sizes}): perplexity is per token, so it does not compare between them."
LEARN_COMPARE_TITLE = "Learn: what the numbers mean"
LEARN_COMPARE = """
**Perplexity** is how many tokens the model is torn between, on average: lower is better. **KLD** is how far the
quantised model's next-token distribution is from the original's, in nats: 0 is identical. **Same top token** is how
often both would pick the same next token.

**± is a standard error.** That of the perplexity is over the windows of the text: it says how much another text would
change the figure. Two runs measured on the *same* windows share that chance, so they are compared window by window: the
ratio to the unquantised model has a much smaller error of its own.

**Several models.** Open another model at the side: earlier runs stay and can be ticked beside it. Perplexities
compare between models of one tokenizer only; KLD is always against the run's own unquantised model.

**The limit of the memory.** Writing one token reads every weight once, so bytes divided by the memory's speed bound
the tokens per second. Fewer bits raise the bound where a kernel reads the packed weights; the table's bytes say whether
one does.

**Measured and estimated.** Bytes in upright figures were counted on the tensors in memory. Figures with ≈ in italics
come from a formula.
"""

# bitnet
BITNET = "5 · BitNet"
TERNARY_RUN = "Ternary model"
TERNARY_EMPTY = (
    "No ternary model yet. Choose the method BitNet at the side and press Quantise, or open a BitNet model: "
    "its zeros, weights and inputs are shown here."
)
TERNARY_READ = "Read the model"
TERNARY_JOB = "Reading the ternary model"
TERNARY_WAIT = "Press “Read the model”: zeros are counted and inputs sampled on the text of the side."
TERNARY_TOKENS = "Tokens"
PROJECTION_LABELS = {"qkv": "QKV", "out": "Out", "up": "Up", "gate": "Gate", "down": "Down"}
PROJECTION_INPUTS = {"attn_in": "QKV", "o_in": "Out", "mlp_in": "Up and Gate", "down_in": "Down"}
INPUT_KINDS = {
    "fp": "not quantised",
    "int8": "INT8, step max / 127", "int4": "INT4, step mean / √7",
    "int4x2": "INT4, step 2 · mean / √7",
    "fp4": "FP4, step max / 12",
    "topk8": "TopK, then INT8",
    "h-int8": "Hadamard, then INT8, step max / 127", "h-int4": "Hadamard, then INT4, step mean / √7",
}
SPARSITY_HEADERS = ["zeros at the input of", "QKV", "Out", "Up", "Gate", "Down", "overall", "active parameters"]
SPARSITY_LAYER_HEADERS = ["layer", *PROJECTION_LABELS.values(), "overall"]
SPARSITY_CAPTION = "Share of zero codes by projection (table 2 of BitNet a4.8)"
SPARSITY_PAPER = {
    "w1.58a8": ("b1.58, 7B, as published", ("1.7", "11.2", "1.4", "1.4", "24.2", "7.3"), "6.0 B"),
    "a4.8": ("a4.8, 7B, as published", ("12.1", "50.0", "71.4", "12.0", "84.2", "44.5"), "3.4 B"),
}
"""Rows of table 2 of arXiv:2411.04965, percent."""
SPARSITY_LABEL = "Share of zero codes by layer and projection"
SPARSITY_TABLE = "Zeros of every layer as a table"
SPARSITY_PROTOCOL = "zero codes on {tokens:,} tokens of {text}, in windows of 256; active parameters = Σ parameters · (1 − zeros)"
WEIGHTS_LABEL = "Share of weights −1, 0 and 1 by projection"
INPUT_LABEL = "Distribution of the input of {}, and of its codes"
CURVES_LABEL = "Training loss of the embedded models"
ABLATION_LABELS = {"figure4": "Training loss by number format", "figure5": "Training loss by input of the down projection"}
DOWN_INPUTS = {"": "ReLU², INT8", "silu": "Swish, INT8", "fp4": "ReLU², FP4", "int4x2": "ReLU², INT4"}
CURVES_TITLE = "How such models are trained"
CURVES_EMPTY = "No trained models are part of this installation, so there are no training curves to show."
LEARN_BITNET_TITLE = "Learn: ternary weights and sparse inputs"
LEARN_BITNET = """
**Three weights.** BitNet ([arXiv 2411.04965](https://arxiv.org/abs/2411.04965)) keeps -1, 0 and 1 with one scale per
matrix: a product becomes additions. The bars show how the weights of each projection divide; about a third are zero.

**Two kinds of inputs.** The inputs of QKV, Up and Gate look like a bell: four bits with steps from the *mean* size fit
them, and clip the few beyond. The inputs of Out and Down have long tails, where clipping would hurt: they keep eight
bits, but only the larger half (Out), or what the squared ReLU leaves (Down).

**Zeros are saved work.** A zero code adds nothing, so its weights need not be read. *Active parameters* count what is
left. For QKV and Gate zeros are mere rounding and scattered: no kernel here skips them. A closed gate closes a whole row of Up.

**What the fidelity means.** *Trained*: the rules the model learned with. *Training-free: approximate*: a ternary model, but
other rules or bits than in training. *Simulated*: a full-precision model rounded to three values; expect noise.
"""

# states
STARTING = "Starting: the model is being loaded and observed for the first time."
STOPPED = "Earlier results are still there."
NO_RANGES = "No ranges yet. Choose a model and a text at the side, then press “Observe ranges”."
BUG = "Something broke on our side; your inputs are kept. Try again or report id {}."
LOST = "This visit has ended: nothing was done for long, or the server was restarted. The page starts anew now."
FULL = "Too many visits are open from your network or in all. Close a tab of this page, or come back in {} minutes."
NO_COOKIE = "This browser sends no cookie, so your results cannot be kept apart. Allow cookies, or open the page in its own tab."

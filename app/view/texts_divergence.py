"""Labels and explanations of what shows where two models differ."""

from __future__ import annotations

from app.view.texts import BIT_LABELS

TOKENS = "Where do they differ? The text, token by token"
TOKENS_RUN = "Quantised run"
TOKENS_COUNT = "Tokens"
TOKENS_READ = "Read the text with both"
TOKENS_NONE = "No quantised run yet: press Quantise first, then read a text with it and with its unquantised model."
TOKENS_READY = "Press the button: a quantised run and its original read the text, and every token shows how far apart they are."
TOKENS_NOTE = (
    "Colour: KLD of the prediction at this token, in nats; underlined: the two find different tokens likeliest (a flip). "
    "Hover a token, or reach it with the Tab key, for the five likeliest of both. "
    "Click it, or press Enter on it, to see which activations moved most there."
)
TOKENS_FIRST = "the first token is not predicted"
TOKENS_LEGEND = ("below 0.01", "0.01", "0.05", "0.2", "0.5", "1 nat and more")
CONFIDENCE_HEADERS = ["reference's largest probability", "tokens", "mean KLD, nats", "flips"]
CONFIDENCE_CAPTION = "By the confidence of the unquantised model"

# what moved at one token
MOVED_JOB = "Looking inside at this token"
MOVED_AT = "Predicted token:"
MOVED_AFTER = "behind"
MOVED_MOST = "Moved most: {site} of layer {layer}, by {share} % of its square. Channel {channel}: {before} became {after}."
MOVED_ROUNDED = "Rounded most: {site} of layer {layer}, by {share} %."
MOVED_NOTHING = "Nothing moved: the run computes what the original does."
MOVED_TABLE = "The ten sites that moved farthest"
MOVED_HEADERS = ["layer", "site", "moved, %", "came in, %", "rounded here, %", "channels: original → run"]
MOVED_FIGURES = {"moved": "moved in all", "came": "came in", "rounded": "rounded here"}
MOVED_CAPTION = "squared difference from the original, % of the original's squares, by site and layer"
MOVED_LABEL = "Chart of the sites that moved farthest at the chosen token, by layer"
MOVED_JSON = "All sites (JSON)"
MOVED_NONE = "No token was chosen: click one of the coloured text first."
MOVED_NOTE = (
    "Each figure is a sum over the channels of one site of one layer, at the token before the chosen one, where it is predicted. "
    "Came in: the layer of the original reads what enters this layer in the quantised run. Rounded here: what rounding this site "
    "adds. Moved: everything together, rounded weights of this layer too. Channels have the numbers of the tab Explore."
)
MOVED_MIXED = (
    "Where “moved” is a dash, the run scales or rotates the channels inside its layers, or their order is not known: they have "
    "no counterpart in the original, and the channels listed show what came in."
)

# texts written side by side
FIRST_DIFFERENCE = "token {} is the first that differs from the original's text"
SAME_TEXT = "the same text as the original's"
TEXT_END = "∎"
HALF_CHARACTER = "�"
"""Shown for a token that is only a part of a character."""

# bytes against divergence
PARETO_LABEL = "Chart of bytes against divergence of every run that was measured like the newest ones, the best joined by a line"
PARETO_CAPTION = "runs measured like the newest: divergence ± standard error against bytes; no run lies below the line"
PARETO_SIZE = "Bytes of"
PARETO_SIZES = {"weight_bytes": "weights", "kv_bytes_per_token": "KV cache per token"}
SAVE_CSV = "Numbers (CSV)"
SAVE_JSON = "Numbers (JSON)"

# what a recipe costs
COST = "What this recipe costs"
COST_WAIT = "The cost is predicted as soon as the model is open: change bits, clusters or the method and watch it."
COST_READING = "the model reads a short text forwards and backwards, once"
COST_LINE = "Waiting"
COST_MEASURING = "measuring…"
COST_ROWS = {
    "predicted": ("predicted", "from gradients on the probe, no pass of the quantised model"),
    "measured": ("measured on the probe", "one pass of the model with every tensor rounded, weights to nearest"),
    "verified": ("verified", "the packed model of a finished run"),
}
COST_FLOOR = "noise floor: the model itself in bfloat16"
COST_SATURATED = "Above 0.5 nats the prediction only says that the cost is large; trust the measurement."
COST_ESTIMATED = "{count} of {all} parts are read off neighbouring choices until the slider rests."
COST_OFF = "The prediction was {ratio} times what was measured: that factor is its error here."
COST_NOTHING = "This recipe quantises nothing: it costs nothing."
BEFORE = "Before you start"
BEFORE_WAIT = "What a run takes is estimated as soon as the model is open: one of its layers is timed."
BEFORE_TIME = "to quantise, on {tokens:,} calibration tokens"
BEFORE_MEASURE = "to measure it and the original on {tokens:,} tokens"
BEFORE_PEAK = "memory at the peak, {alone} without measuring"
BEFORE_BYTES = "saved model; {packed} of it packed weights"
BEFORE_NOTE = "Estimated from the shapes and from one layer, timed on this machine in {seconds}."
BEFORE_SAVED = "This run was made before: it is only loaded, at once."
BEFORE_SHORT = "It needs {lacking} more memory than are free: use fewer calibration tokens or a smaller model."
WHERE = "Where it hurts"
WHERE_LABEL = "Heat map of the divergence that each part of each layer causes, predicted, and measured where it was"
WHERE_CAPTION = "KLD that each part causes alone, nats per token (log scale); click a cell to see its channels"
WHERE_ROWS = {name: label for name, label in BIT_LABELS.items() if name != "weights"} | {
    "qkv": "weights q, k, v",
    "o": "weights attention out",
    "up": "weights gate, up",
    "down": "weights down",
}
"""Rows of the heat map: sites, the softmax output, and the weights of the four linear layers."""
SWAPS = "Measure each part alone"
SWAPS_NOTE = (
    "{count} of {all} parts measured alone: predicted / measured is {ratio} at the median. "
    "Control (nothing swapped): {control} nats. "
    "Sum of the parts over all at once: {additive}."
)
WHERE_HEADERS = ["layer", "part", "predicted, nats", "measured alone, nats", "share"]
WHERE_TABLE = "The ten most expensive parts"
WHERE_PICK = "Click a row, or press Enter on it, to see its channels in the tab Explore. Weights show the site that they read."
WHERE_NONE = "This part has no channels to show: click a cell of a site or of a weight."
WHERE_OTHER = "The observed ranges are not those of this recipe's model: press Observe ranges first."
LEARN_COST_TITLE = "Learn: how a cost is predicted"
LEARN_COST = """
**KLD** (Kullback–Leibler divergence) says how far the quantised model's next-token predictions are from the original's, in nats
per token; 0 is the same model. The tab Compare shows a text token by token, coloured by it.

**Predicted.** The model reads a short text once, forwards and backwards. The gradients at each part (an activation of a layer, or
a weight matrix) tell how much an error *there* moves the predictions. Rounding that part to the chosen bits and clusters gives
its error; the two together give its cost, without running the quantised model. The costs of parts add up while they are small.

**Measured on the probe.** The same text, read once with everything rounded. It starts by itself when you stop changing things.

**Verified.** What *Quantise* measured with the packed model on its own text, if you ran this recipe.

The **noise floor** is what merely computing in bfloat16 costs: below it, a choice costs nothing that matters.
"""

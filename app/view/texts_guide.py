"""Labels and explanations for newcomers: the guide, the diagram of reorderings, grids of a channel."""

from __future__ import annotations

# grids over a channel
GRID = "Grid over the channel"
GRIDS = {"none": "none", "tensor": "INT4, whole tensor", "cluster": "INT4, its cluster", "fp4": "FP4", "ternary": "ternary"}
GRID_INFO = {
    "tensor": "{used} of {count} levels are in reach: one scale must cover every channel of this input",
    "cluster": "{used} of {count} levels are in reach: the scale covers the channels of this cluster only",
    "fp4": "{used} of {count} levels are in reach: steps grow with size, and the channel's largest value is the last",
    "ternary": "{used} of {count} levels are in reach: 0 and ± the mean size of this channel's values",
}
"""What a grid does to the chosen channel: used and count of levels."""

# the reorderings of a layer
FUSED = "The five reorderings of this layer"
FUSED_LABEL = "Diagram of a layer with its reorderings; a button on each shows its channels in the charts above"
FUSED_SAID = "Layer {layer} of {model}, {recipe}: {count} of 5 reorderings are on. Click one to see its channels above."
FUSED_NOTE = (
    "No reordering is a step of its own: each is folded into what writes the channels and into the weights that read them, and "
    "the stream between the layers keeps its order."
)
FUSED_SHARED_NOTE = (
    "No reordering is a step of its own: each is folded into what writes the channels and into the weights that read them. The "
    "stream between the layers has one order for all layers, which embedding, norms, weights and head share."
)
FUSED_SHARED = (
    "The channels come in the order that all layers share; the clusters are runs of it. The charts above show the clusters that "
    "this layer would have in an order of its own."
)
FUSED_FLOW = (
    ("norm", ("attn_in",), "q, k, v weights", ("q", "k", "v"), "attention", ("o_in",), "output weights", "back to the stream"),
    ("norm", ("mlp_in",), "gate, up weights", ("down_in",), "down weights", "back to the stream"),
)
"""The two halves of a layer: names of operations, and between them the sites whose channels are reordered."""
FUSED_WHERE = {
    "R1": "The norm before attention writes its channels in the new order; the columns of the q, k and v weights follow.",
    "R2": "Inside each head, one order for queries and keys: their product stays the same. The rotation of the position encoding "
    "writes it; models without rotation have it in the rows of their weights.",
    "R3": "Inside each head: the rows of the v weights and the columns of the output weights.",
    "R4": "The norm before the MLP writes its channels in the new order; the columns of the gate and up weights follow.",
    "R5": "The rows of the gate and up weights and the columns of the down weights.",
}
FUSED_CLUSTERS = "{} clusters"
FUSED_PER_HEAD = "{} clusters in each head"
FUSED_WIDTH = "{channels:,} channels, {bits} bits"
FUSED_HEADS = "{heads} heads of {channels} channels, {bits} bits"
OFF = "off"
OFF_METHOD = "Off: the method {} reorders nothing."
OFF_ONE = "Off: with one cluster there is nothing to reorder."
OFF_FLOAT = "Off: this recipe does not quantise queries and keys."

# the guide
GUIDE = "Guide: what this page does, in five steps"
GUIDE_OFFER = "New here? Five short steps show what this page does, on this model."
GUIDE_START = "Start the guide"
GUIDE_LATER = "Not now"
GUIDE_AGAIN = "Guide in five steps"
GUIDE_BACK = "Back"
GUIDE_NEXT = "Next step"
GUIDE_GO = "Go to the control"
GUIDE_END = "End the guide"
GUIDE_STEP = "Step {number} of {count}: {title}"
GUIDE_DO = "Do:"
GUIDE_SEE = "See:"
GUIDE_STEPS = {
    "scatter": (
        "find a loud channel",
        "Click a point far from the others. With the keyboard, the arrow keys walk from point to point and Enter chooses one.",
        "The panel of the channel says how many times wider it is than the median channel, and which words of the text cause its "
        "extreme values. The lines in its chart are the levels that four bits can represent.",
    ),
    "clusters": (
        "group the channels",
        "Move the slider g to 1, then up again.",
        "With one cluster all channels share one scale. With more, only channels of similar range do: the strips show them "
        "sorted, and the large figure says how much less rounding error that gives.",
    ),
    "quantize": (
        "quantise the model",
        "Press Quantise, and wait for the progress line to end.",
        "A sentence says how much the perplexity rose, and a table how many bytes are left. The map above shows which layers the "
        "cost comes from.",
    ),
    "write": (
        "read both models",
        "Press Write.",
        "The original and the quantised model continue the same prompt, side by side. Below are the numbers that were measured.",
    ),
    "real": (
        "take a real model",
        "Open the larger model with the button above the tabs, or name any supported model of the Hub at the side.",
        "The same charts for that model: its outliers are much farther out. The last panel at the side makes a link to what "
        "you see.",
    ),
}
"""Title, what to do, and what to see of every step."""

# models that are one click away
OPEN_LARGER = "Open {name}: a real model, {size} to download once"

LANGUAGE = "Language"

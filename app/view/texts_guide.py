"""Labels and explanations of what helps a newcomer: the guide, the diagram of the reorderings, grids over a channel."""

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
    "No reordering is a step of its own: each is folded into what writes the channels and into the weights that read them, and the "
    "stream between the layers keeps its order."
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
FUSED_CLUSTERS = "{count} clusters, {channels:,} channels"
FUSED_HEADS = "{count} clusters, {channels:,} channels in each of {heads} heads"
FUSED_BITS = "{} bits"
OFF = "off"
OFF_METHOD = "Off: the method {} reorders nothing."
OFF_ONE = "Off: with one cluster there is nothing to reorder."
OFF_FLOAT = "Off: this recipe does not quantise queries and keys."

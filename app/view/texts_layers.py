"""Labels and explanations of bits and clusters of single layers."""

from __future__ import annotations

PANEL = "One layer or site"
LABEL = "Bits or clusters of single layers"
INFO = (
    "Parts separated by commas. k: a tensor (attn_in, q, k, v, softmax, o_in, mlp_in, down_in); weights, or weights.down of one "
    "matrix (qkv, o, up, down); R1 to R5: clusters. 16 bits: not quantised; layers.7=16 leaves a whole layer as it is."
)
EXAMPLE = "layers.7.k=3, layers.0-3.weights=8"
MEANS = "Parts set: {count}, in {layers} of the layers. They replace what is chosen for all layers."

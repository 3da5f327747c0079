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

# the autopilot
AUTOPILOT = "Spend a budget"
AUTOPILOT_INFO = (
    "Gives every layer's weights, keys and values their own number of bits, so that the predicted cost is least for a number of "
    "bytes: the model as stored, and the cache of the tokens named. Activations take no stored bytes: they keep their bits, or "
    "share them."
)
BY_LABEL = "The budget is"
BY = {"bytes": "bytes", "kld": "a divergence"}
BYTES_LABEL = "Budget, MB"
MARKS_LABEL = "As much as a uniform scheme takes"
KLD_LABEL = "Largest divergence, nats per token"
CONTEXT_LABEL = "Tokens in the cache"
SPREAD = "Share the bits of activations among layers too, as many per token in all"
SPEND = "Spend it"
USE = "Use this recipe"
USED = "The recipe is in the fields: Quantise makes the packed model and verifies it."
SPEND_FIRST = "Nothing was allocated yet: spend a budget first."
OPEN_FIRST = "The model is not open yet: wait for the first chart."
SPENT_TITLE = "What the budget was spent on"
SPENT = "{bytes} with the keys and values of {context:,} tokens ({limit}) · {predicted} nats predicted"
SPENT_MEASURED = " · {} nats measured on the probe, weights rounded to nearest"
WITHIN_BYTES = "{} allowed"
WITHIN_KLD = "{} nats allowed"
NO_RIVAL = "No recipe with one number of bits for all layers and the same activations fits this budget."
RIVAL_WEIGHTS = "{}-bit weights"
RIVAL_CACHE = "{}-bit keys and values"
BY_PREDICTION = "predicted"
BY_MEASUREMENT = "measured on the probe"
BETTER = "{less} % less divergence than {rival} everywhere ({bytes}): {own} against {other} nats, {how}."
UNIFORM_BETTER = "{rival} everywhere ({bytes}) are better here: {other} against {own} nats, {how}. Keep the uniform recipe."
SMALLER = "{less} % fewer bytes than {rival} everywhere ({bytes}): {own} against {other} nats, {how}."
RANK = (
    "Verified by a run: {own} nats, rank {place} of {count} among this run and the uniform ones on the same text. At {bytes} or "
    "less, {best}."
)
RANK_BEST = "no uniform run is better"
RANK_BEATEN = "the uniform run {rival} is better: {kld} nats"
WITHIN = "At most so many % above one cluster per channel"
SMALLEST = "Find the smallest g"
SMALLEST_FOUND = (
    "g = {g} is the smallest within {within} % of one cluster per channel: {own} against {other} nats, predicted for this "
    "recipe. Set it at the side."
)
MAP_LABEL = "Bits of every part of every layer"
MAP_CAPTION = "Bits of every part, layer by layer"
LAYER = "layer"

"""Labels and explanations of what shows where two models differ."""

from __future__ import annotations

TOKENS = "Where do they differ? The text, token by token"
TOKENS_RUN = "Quantised run"
TOKENS_COUNT = "Tokens"
TOKENS_READ = "Read the text with both"
TOKENS_NONE = "No quantised run yet: press Quantise first, then read a text with it and with its unquantised model."
TOKENS_EMPTY = "Both models read the same text. Colour shows how far their predictions are apart at each token."
TOKENS_NOTE = (
    "Colour: KLD of the prediction at this token, in nats; underlined: the two find different tokens likeliest (a flip). "
    "Hover a token, or reach it with the Tab key, for the five likeliest of both."
)
TOKENS_FIRST = "the first token is not predicted"
TOKENS_LEGEND = ("below 0.01", "0.01", "0.05", "0.2", "0.5", "1 nat and more")
CONFIDENCE_HEADERS = ["reference's largest probability", "tokens", "mean KLD, nats", "flips"]
CONFIDENCE_CAPTION = "By the confidence of the unquantised model"

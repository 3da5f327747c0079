"""Words of the controls of a distillation, on the tab Quantise."""

PANEL = "Distillation"
ON = "Train the quantised model towards the original"
INFO = "Takes minutes. Stop keeps the best so far, and Quantise with the same settings goes on from there."
NUMBERS = {"steps": "Steps", "tokens": "Tokens per step", "lr": "Step size"}
"""Numbers of `DistillOptions`."""
TEXTS_LABEL = "Texts to train on"
TEXTS_INFO = "It is judged on parts that it is not trained on. Text of another kind is measured beside them."
TEXTS = {"calibration": "The calibration text", "sotu": "State of the Union", "wikitext2": "WikiText-2"}
TABLE = ("perplexity on", "original", "before", "after", "divergence before", "after")
CAPTION = "what the distillation changed"
HELD_OUT = "{names}, held out"

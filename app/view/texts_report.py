"""Labels of the HTML report."""

from __future__ import annotations

SAVE = "Report (HTML)"
OWN_TEXT = "Put the text I pasted into the HTML report"
TITLE = "Quantscope report"
MODELS = ("model", "architecture", "parameters", "bytes in memory", "weights were", "from")
FALLBACKS = "rounded to nearest instead of GPTQ"
EMPTY = "There is no run to report on: open a model or quantise one first."

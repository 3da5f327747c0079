"""Labels and explanations of memory projected to any size, and of the roofline."""

from __future__ import annotations

MEMORY = "Project memory to any size"
MEMORY_INFO = (
    "By formula, nothing is loaded: these are estimates. Choose a size, or type a model of the Hub as owner/name (only its "
    "config.json is fetched), a folder, or numbers as layers=32,hidden=4096,heads=32."
)
SIZE = "Model or size"
SCHEME = "Scheme"
BATCH = "Batch"
SEQUENCE = "Sequence"
UNIT = "Unit"
UNITS = {"GB": 10**9, "GiB": 2**30}
"""Bytes of each unit that tables are shown in."""
GPU = "GPU"
THIS_MODEL = "this model"
NO_MODEL = "No model is loaded yet: wait for it, or choose one of the sizes."
BARS_LABEL = "Projected memory by scheme"
BARS_CAPTION = "memory by formula, not measured"
MAP_LABEL = "Heat map of projected memory by batch and sequence length"
MAP_CAPTION = "{scheme}: memory by batch and sequence length, {unit}; the square is the chosen place"
GRID = "All schemes at usual places, as a table"
GRID_CAPTION = "{unit} in all, by formula; columns: batch × sequence length"
FITS = "Where it fits"
FIT_HEADERS = ["GPU", "memory", "one card", "largest batch on one"]
FITS_CAPTION = "{scheme}, batch {batch}, {sequence:,} tokens: {total}, against one card, its GB taken as 10⁹ bytes"
FITS_YES = "fits, {share} of it"
FITS_NO = "needs {cards} cards"
ROOF = "What bounds the speed: the roofline"
ROOF_LABEL = "Roofline: operators by arithmetic intensity and reachable rate"
ROOF_CAPTION = "{scheme} on one {gpu}: decode ○ and prefill ◇; left of a roof's knee memory bounds, right of it arithmetic"
ROOF_HEADERS = ["operator", "FLOPs", "bytes", "FLOPs / byte", "least time", "bound by"]
PHASES = {"decode": "decode: one new token", "prefill": "prefill: the whole prompt"}
ROOF_ALL = "all"
DECODE_SPEED = "{seconds} at the least, so {rate} tokens per second in all at the most"
PREFILL_SPEED = "{seconds} at the least, so {rate} tokens per second at the most"
ROOF_NOTE = (
    "By formula, on the maker's peak rates without sparsity ({source}): real kernels reach a part of them. Attention is fused, "
    "all scores are counted; norms, activation functions, scales and launches are left out."
)
CLAIM = (
    "RPTQ's “{said}” ({model}, batch {batch}, {sequence:,} tokens, {before} → {after}): weights and cache fall from {old} to "
    "{new}, by {saved} ({saved_gib}), {share} %; with one layer's activations by {whole} ({whole_gib}), {whole_share} %."
)

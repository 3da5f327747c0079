"""Words of the controls of RPTQ+, on the tab Quantise."""

PANEL = "RPTQ+"
ON = "Add what helps RPTQ"
INFO = "Parts of the method rotation that go with clusters. Each can be switched off, to measure what it is worth."
SWITCHES_LABEL = "Parts"
SWITCHES = {
    "scale": "Scale channels",
    "key_mean": "Subtract the keys' mean",
    "clip": "Search clipped ranges of weights",
    "halfway": "Half-way target",
}
"""Switches of `PlusOptions`."""
GROUP = "Columns per weight scale"
CLUSTERS = "the clusters of the input"
ROTATE = "Rotated, with a range for each token in place of clusters"
DYNAMIC = "Not rotated, with a range for each token in place of clusters"

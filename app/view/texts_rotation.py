"""Words of the controls of the method rotation, on the tab Quantise."""

PANEL = "Scaling and rotation"
INFO = "Each part can be switched off, to measure what it is worth."
SWITCHES = {
    "scale": "Scale channels",
    "rotate": "Rotate channels",
    "key_mean": "Subtract the keys' mean",
    "dynamic": "A range for each token",
    "clip": "Search clipped ranges",
    "halfway": "Half-way target",
}
"""Switches of `RotationOptions`."""
BLOCK = "Channels rotated together"
GROUP = "Columns per weight scale"
KV = "Ranges of keys and values"
KV_RANGES = {"static": "Per channel, known in advance", "token": "Per token, stored with it"}
ALL_CHANNELS = "all"

"""Models of every kind that the tests of exports write, each made once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from core.models.tiny import tiny_model
from core.options import RotationOptions
from core.overrides import Overrides
from core.recipe import Bits, Clusters
from tests.core.tools import Quantised, quantised

ROUNDED = {"method": "rtn", "weights": "rtn"}
PLAIN = {"scale": True, "rotate": False, "clip": False}
INPUTS = {"attn_in": 8, "o_in": 8, "mlp_in": 8, "down_in": 8}
ONE = Clusters(1, 1, 1, 1, 1)
RECIPES: dict[str, dict[str, Any]] = {
    "W4A16": {**ROUNDED, "scheme": "W4A16"},
    "W3A16": {**ROUNDED, "scheme": "custom", "bits": Bits(weights=3)},
    "W2A16": {**ROUNDED, "scheme": "custom", "bits": Bits(weights=2)},
    "W6A16": {**ROUNDED, "scheme": "custom", "bits": Bits(weights=6)},
    "W8A16": {**ROUNDED, "scheme": "custom", "bits": Bits(weights=8)},
    "groups": {"method": "rotation", "scheme": "W4A16", "rotation": RotationOptions(**PLAIN, group=32)},
    "one cluster": {"method": "rptq", "scheme": "W4A16", "clusters": ONE},
    "W8A8 static": {**ROUNDED, "scheme": "custom", "bits": Bits(weights=8, **INPUTS)},
    "W4A8 static": {**ROUNDED, "scheme": "custom", "bits": Bits(weights=4, **INPUTS)},
    "reordered static": {
        "method": "rptq",
        "variant": "official",
        "segments": "aligned",
        "scheme": "custom",
        "bits": Bits(weights=4, **INPUTS),
    },
    "W4A8 by token": {
        "method": "rotation",
        "scheme": "custom",
        "bits": Bits(weights=4, **INPUTS),
        "rotation": RotationOptions(**PLAIN, group=0),
    },
    "mixed": {
        **ROUNDED,
        "scheme": "custom",
        "bits": Bits(weights=3),
        "overrides": Overrides.parse("layers.1.weights.down=6,layers.0.weights.up=16"),
    },
    "clusters": {"method": "rptq", "scheme": "W4A16"},
    "one order": {"method": "rptq", "scheme": "W4A16", "order": "shared"},
    "rotated": {"method": "rotation", "scheme": "W4A16"},
    "rotated W4A4": {"method": "rotation", "scheme": "W4A4"},
    "keys": {**ROUNDED, "scheme": "W3A3KV"},
    "4-bit inputs": {**ROUNDED, "scheme": "custom", "bits": Bits(weights=4, attn_in=4)},
    "static clusters": {
        "method": "rptq",
        "scheme": "custom",
        "bits": Bits(weights=4, down_in=8),
        "clusters": Clusters(1, 1, 1, 1, 32),
    },
    "official": {"method": "rptq", "variant": "official", "scheme": "W4A16", "clusters": ONE},
    "ternary": {"method": "bitnet"},
}
WIDE = {"hidden_size": 256, "intermediate_size": 256}


@lru_cache
def made(recipe: str, architecture: str = "llama") -> Quantised:
    """A tiny model quantised by one of `RECIPES`; "ternary" by b1.58's rules."""
    fields = dict(RECIPES[recipe])
    if recipe == "ternary":
        from core.options import BitNetOptions

        fields["bitnet"] = BitNetOptions("w1.58a8")
    overrides = WIDE if recipe == "ternary" and architecture == "llama" else {}
    return quantised(architecture, base=tiny_model(architecture, **overrides), **fields)

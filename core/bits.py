"""Bits and clusters of the tensors of a decoder layer, and the schemes of the published results.

A *scheme* names the bits of every tensor as the paper's tables do. W4A4 keeps the outputs of the two norms and of
softmax at 8 bits (published code: max(8, activation bits)); the name shown to people says so: see `QuantRecipe.describe_bits`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from core.checks import FLOAT_BITS, parse_int, require_bits, require_int
from core.errors import InputError

SITES = ("attn_in", "q", "k", "v", "o_in", "mlp_in", "down_in")
"""Observed tensors of one decoder layer, in the order they appear in it."""

REORDERS = {"R1": ("attn_in",), "R2": ("q", "k"), "R3": ("v", "o_in"), "R4": ("mlp_in",), "R5": ("down_in",)}
REORDER_OF = {site: name for name, sites in REORDERS.items() for site in sites}
"""RPTQ's reorderings with the sites that share each order, and the reordering of each site."""

INPUT_SITE = {"qkv": "attn_in", "o": "o_in", "up": "mlp_in", "down": "down_in"}
"""The site that each fused linear layer of a decoder block reads from."""


def expert_site(name: str, index: int) -> str:
    """Name the site, or the linear layer, of one expert of a mixture: down_in.3, up.3."""
    return f"{name}.{index}"


def kind_of(name: str) -> str:
    """Return the name of a site or a linear layer without the expert that it belongs to: down_in of down_in.3."""
    return name.partition(".")[0]


def input_site(linear: str) -> str:
    """Name the site that a linear layer of a block reads: experts read one mlp_in, and each its own down_in."""
    kind, _, expert = linear.partition(".")
    return f"down_in.{expert}" if expert and kind == "down" else INPUT_SITE[kind]


PER_CHANNEL = 65536
"""A cluster count at least as large as any width: one cluster per channel."""


@dataclass(frozen=True)
class Bits:
    """Bits per tensor: 2 to 8, or 16 for not quantised. `weights` also allows 16."""

    weights: int = 16
    attn_in: int = 16
    q: int = 16
    k: int = 16
    v: int = 16
    softmax: int = 16
    o_in: int = 16
    mlp_in: int = 16
    down_in: int = 16

    def __post_init__(self) -> None:
        for entry in fields(self):
            require_bits(f"bits of {entry.name}", getattr(self, entry.name))

    def site(self, name: str) -> int:
        """Return the bits of one of `SITES`."""
        return getattr(self, name)

    def weight(self, linear: str) -> int:
        """Return the bits of the weights of one linear layer of `INPUT_SITE`."""
        return self.weights

    @property
    def quantizes_weights(self) -> bool:
        """Whether the weights of any linear layer are below 16 bits."""
        return any(self.weight(name) < FLOAT_BITS for name in INPUT_SITE)

    @property
    def quantizes_activations(self) -> bool:
        """Whether any activation is below 16 bits."""
        return any(self.site(s) < FLOAT_BITS for s in (*SITES, "softmax"))


@dataclass(frozen=True)
class LayerBits(Bits):
    """Bits of one layer whose linear layers have weights of their own bits; `weights` is what other layers have."""

    qkv: int = 16
    o: int = 16
    up: int = 16
    down: int = 16

    def weight(self, linear: str) -> int:
        """Return the bits of the weights of one linear layer of `INPUT_SITE`."""
        return getattr(self, linear)


def _full(weights: int, activations: int, norms: int) -> Bits:
    return Bits(weights, norms, activations, activations, activations, 8, activations, norms, activations)


SCHEMES: dict[str, Bits] = {
    "W4A16": Bits(weights=4),
    "W4A8": _full(4, 8, 8),
    "W4A4": _full(4, 4, 8),
    "W4A4KV": Bits(weights=4, k=4, v=4),
    "W4A3KV": Bits(weights=4, k=3, v=3),
    "W3A3KV": Bits(weights=3, k=3, v=3),
}
"""The six configurations of the published results (arXiv:2304.01089, README of its code)."""


@dataclass(frozen=True)
class Clusters:
    """Cluster counts: R1, R4, R5 over the whole width, R2 and R3 per key/value head. Defaults are the published code's."""

    R1: int = 32
    R2: int = 4
    R3: int = 4
    R4: int = 32
    R5: int = 32

    def __post_init__(self) -> None:
        rule = f"use 1 to {PER_CHANNEL}; a count above the width means one per channel"
        for entry in fields(self):
            count = require_int(f"clusters of {entry.name}", getattr(self, entry.name), 1, PER_CHANNEL, rule)
            object.__setattr__(self, entry.name, count)  # 4.0 becomes 4: equal recipes have equal hashes

    @classmethod
    def uniform(cls, count: int) -> Clusters:
        """Derive the five counts from one number g: g for R1, R4 and R5; g / 8 per head for R2 and R3.

        g / 8 is rounded, a half to the even number (g = 20, 36, 52 give 2, 4, 6), and is at least 1.
        """
        require_int("cluster count g", count, 1, PER_CHANNEL, "use 1 or more")
        per_head = PER_CHANNEL if count == PER_CHANNEL else max(1, round(count / 8))
        return cls(count, per_head, per_head, count, count)

    @classmethod
    def parse(cls, text: str) -> Clusters:
        """Read "32", "channel" or "R1=32,R2=4" (missing ones keep their default).

        Raises: InputError naming the part that does not fit.
        """
        text = text.strip()
        if not text:
            return cls()
        if text.lower() == "channel":
            return cls.uniform(PER_CHANNEL)
        if text.isascii() and text.isdigit() and len(text) < 7:
            return cls.uniform(int(text))
        chosen = {}
        for part in text.split(","):
            key, _, value = (p.strip() for p in part.partition("="))
            if key not in REORDERS or not (value.isascii() and value.isdigit() and len(value) < 7):
                rule = f"Clusters {part.strip()[:40]!r} is not understood: write one number, or R1=32,R2=4,R3=4,R4=32,R5=32."
                raise InputError(rule, code="E-PARAM-CLUSTERS")
            chosen[key] = int(value)
        return cls(**chosen)

    def describe(self) -> str:
        """Write the counts shortly: "g=32/4", "per channel" or the five numbers."""
        names = {r: "channel" if count >= PER_CHANNEL else str(count) for r, count in asdict(self).items()}
        if self.R1 == self.R4 == self.R5 and self.R2 == self.R3:
            return "per channel" if min(self.R1, self.R2) >= PER_CHANNEL else f"g={names['R1']}/{names['R2']}"
        return ",".join(f"{r}={name}" for r, name in names.items())


def parse_bits(text: str) -> Bits:
    """Read "weights=4,k=3,v=3": tensors left out stay at 16. Raises InputError naming the part that does not fit."""
    names = {entry.name for entry in fields(Bits)}
    chosen = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = part.partition("=")
        if key.strip() not in names:
            known = ", ".join(sorted(names))
            raise InputError(f"Bits {part[:40]!r} is not understood: write name=bits with names {known}.", code="E-PARAM-BITS")
        chosen[key.strip()] = parse_int(f"bits of {key.strip()}", value)
    return Bits(**chosen)

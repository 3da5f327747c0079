"""The rules by which a model with ternary weights runs: mode, share kept by TopK, bits of attention."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.checks import FLOAT_BITS
from core.quant.dynamic import MODES
from core.quant.kv_grid import RowGrid
from core.recipe import BITNET_MODES


@dataclass(frozen=True)
class AttentionBits:
    """Bits of keys and values, of the first token's, and of queries: 2 to 8, or 16 for not quantised."""

    kv: int = FLOAT_BITS
    bos: int = 4
    q: int = FLOAT_BITS

    @property
    def kv_grid(self) -> RowGrid | None:
        """The grid of keys and values, None where they stay in float."""
        return RowGrid(self.kv, self.bos) if self.kv < FLOAT_BITS else None


@dataclass(frozen=True)
class BitNetRules:
    """The rules that a model with ternary weights runs by, and those that it was trained for.

    Attributes:
        mode: one of BITNET_MODES.
        keep: share of o_in that TopK keeps.
        trained: the mode of the training; None if weights were rounded to ternary after it.
        attention: bits of keys, values and queries; never part of the training.
        trained_keep: the share in the training.
    Raises: ValueError for an unknown mode.
    """

    mode: str
    keep: float = 0.5
    trained: str | None = None
    attention: AttentionBits = field(default_factory=AttentionBits)
    trained_keep: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in BITNET_MODES or self.trained not in (None, *BITNET_MODES):
            raise ValueError(f"BitNet mode {self.mode[:20]!r} is unknown: use one of {', '.join(BITNET_MODES)}")

    def kind(self, site: str) -> str:
        """Return the quantiser of a projection input: attn_in, o_in, mlp_in or down_in."""
        return MODES[self.mode][site]

    @property
    def fidelity(self) -> str:
        """Text that says how close the rules are to the training: trained, approximate (with every difference), or simulated."""
        if self.trained is None:
            return f"{self.mode} simulated on a model that was not trained for it: expect noise"
        changes = []
        if self.mode != self.trained:
            changes.append(f"{self.mode} rules")
        elif "topk8" in MODES[self.mode].values() and self.keep != self.trained_keep:
            changes.append(f"keep {self.keep:g} instead of {self.trained_keep:g}")
        for name, bits in (("KV", self.attention.kv), ("Q", self.attention.q)):
            if bits < FLOAT_BITS:
                changes.append(f"{name} {bits} bits")
        if not changes:
            return f"trained {self.mode}"
        return f"{', '.join(changes)} applied training-free to a {self.trained} model: approximate"

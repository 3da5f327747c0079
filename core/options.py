"""Options of single methods, of the parts added to RPTQ, and of the distillation that may follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from core.bits import Bits
from core.checks import (
    FLOAT_BITS,
    parse_float,
    parse_int,
    require_bits,
    require_choice,
    require_float,
    require_int,
    require_keys,
    require_text,
)
from core.errors import InputError

_INPUT_BITS = {
    "w1.58a8": (8, 8, 8, 8),
    "a4.8": (4, 8, 4, 8),
    "a4.8-fp4": (4, 4, 4, 8),
    "int4": (4,) * 4,
    "fp4": (4,) * 4,
    "v2-a8": (8, 8, 8, 8),
    "v2": (4,) * 4,
}
BITNET_MODES = tuple(_INPUT_BITS)
"""Activation rules of BitNet, all with ternary weights: `core.quant.dynamic.MODES` says what each does."""
ROTATED_MODES = ("v2-a8", "v2")
"""Those that rotate the inputs of o and down: their ternary weights serve no other mode."""
KV_RANGES = ("static", "token")
"""Ranges of rotated keys and values: one per channel known in advance, or one per token and head stored with it."""
GROUPS = (16, 24, 32, 64, 128)
"""Numbers of neighbouring columns that may share a weight's scale in the method "rotation"; 0 stands for a whole row."""
BLOCKS = (16, 32, 64, 128, 256)
"""Numbers of channels that a Hadamard matrix may rotate together in the method "rotation"; 0 stands for all of a site."""

TOKEN_SITES = ("attn_in", "q", "o_in", "mlp_in", "down_in")
"""Sites of RPTQ that may have a range of each token in place of static ranges of clusters: all but those that are stored."""
ROTATED_SITES = ("attn_in", "mlp_in", "down_in")
"""Those of them that may be rotated over their whole width, which leaves no clusters."""

DISTILL_TEXTS = ("calibration", "sotu", "wikitext2")
"""Texts that a distillation may read; a text of one's own is read as the calibration's."""


def same_weights(mode: str, other: str) -> bool:
    """Return whether ternary weights of one BitNet mode serve another: both rotate inputs, or neither."""
    return (mode in ROTATED_MODES) == (other in ROTATED_MODES)


@dataclass(frozen=True)
class BitNetOptions:
    """Options of the method "bitnet", which ignores scheme, bits, clusters and weights of the recipe.

    Attributes:
        mode: one of BITNET_MODES; keep: share of o_in that TopK keeps, above 0 and up to 1.
        kv_bits, bos_bits, q_bits: of keys and values, of the first token's, and of queries; 2 to 8, or 16 for not quantised.
    """

    mode: str = "a4.8"
    keep: float = 0.5
    kv_bits: int = 16
    bos_bits: int = 4
    q_bits: int = 16

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, BITNET_MODES)
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise InputError(f"keep is {str(self.keep)[:40]!r}: use a share above 0 and up to 1.", code="E-PARAM-KEEP")
        object.__setattr__(self, "keep", float(self.keep))
        for name in ("kv_bits", "bos_bits", "q_bits"):
            require_bits(name, getattr(self, name))

    def describe(self) -> str:
        """Describe the options shortly: "a4.8 · KV 3 bits, first token 4 · Q 4 bits"."""
        parts = [self.mode if self.keep == 0.5 else f"{self.mode} (keeps {self.keep:g})"]
        if self.kv_bits < FLOAT_BITS:
            first = "" if self.bos_bits == self.kv_bits else f", first token {self.bos_bits}"
            parts.append(f"KV {self.kv_bits} bits{first}")
        if self.q_bits < FLOAT_BITS:
            parts.append(f"Q {self.q_bits} bits")
        return " · ".join(parts)

    @property
    def tensor_bits(self) -> Bits:
        """Bits of every tensor as stored or multiplied; ternary weights take 2."""
        attn_in, o_in, mlp_in, down_in = _INPUT_BITS[self.mode]
        return Bits(2, attn_in, self.q_bits, self.kv_bits, self.kv_bits, o_in=o_in, mlp_in=mlp_in, down_in=down_in)


def _require_switches(options: object, code: str) -> None:
    """Refuse switches that are neither on nor off."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        if isinstance(entry.default, bool) and not isinstance(value, bool):
            raise InputError(f"{entry.name} is {str(value)[:40]!r}: use on or off.", code=f"E-PARAM-{code}")


def _require_size(options: object, name: str, sizes: tuple[int, ...], none: str, code: str) -> None:
    """Refuse a number of channels or columns that is not offered, and store it as a whole number; 0 stands for `none`."""
    rule = f"use 0 for {none}, or {', '.join(map(str, sizes))}"
    value = require_int(name, getattr(options, name), 0, sizes[-1], rule)
    if value not in (0, *sizes):
        raise InputError(f"{name} is {value}: {rule}.", code=f"E-PARAM-{code}")
    object.__setattr__(options, name, value)


@dataclass(frozen=True)
class RotationOptions:
    """Options of the method "rotation": each ingredient is a switch.

    Attributes:
        scale: divide each channel by √(its RMS / the RMS of the weights that read it), folded into norms and weights.
        rotate: rotate channels by Hadamard matrices; block: how many together, one of BLOCKS, or 0 for all of a site.
        key_mean: subtract from the keys their mean over the calibration tokens.
        dynamic: a range for each token at inputs of linear layers and queries; off: one range for all tokens.
        kv: one of KV_RANGES.
        group: columns that share a weight's scale, one of GROUPS, or 0 for a whole row.
        clip: search ratios that shrink the ranges of activations and of weight groups.
        halfway: GPTQ aims half-way between the output of its own inputs and that of the unquantised model's.
    """

    scale: bool = True
    rotate: bool = True
    block: int = 0
    key_mean: bool = True
    dynamic: bool = True
    kv: str = "static"
    group: int = 32
    clip: bool = True
    halfway: bool = True

    def __post_init__(self) -> None:
        _require_switches(self, "ROTATION")
        require_choice("kv", self.kv, KV_RANGES)
        _require_size(self, "block", BLOCKS, "all channels", "ROTATION")
        _require_size(self, "group", GROUPS, "a whole row", "ROTATION")

    def describe(self) -> str:
        """Describe the options shortly, by what differs from the default: "groups of 32", or "groups of 64, without clip"."""
        plain, own = asdict(RotationOptions()), asdict(self)
        off = [name.replace("_", " ") for name, value in own.items() if value is False]
        parts = [f"groups of {self.group}" if self.group else "a scale per row"]
        parts += [f"blocks of {self.block}"] if self.block else []
        parts += ["KV range per token"] if self.kv != plain["kv"] else []
        return ", ".join(parts) + (f", without {', '.join(off)}" if off else "")


@dataclass(frozen=True)
class PlusOptions:
    """Parts of the method rotation that are added to RPTQ's clusters ("RPTQ+"); weights are rounded for the quantised inputs.

    Attributes:
        scale, key_mean: as in `RotationOptions`; clusters are formed of what they leave.
        clip: fit the grid of each weight group while GPTQ reaches it, by a search of ratios that shrink its range.
        halfway: as in `RotationOptions`.
        group: columns along the reordered width that share a weight's scale, one of GROUPS, or 0 for the clusters of the input.
        dynamic, rotate: sites with a range of each token in place of clusters, as they are or rotated; joined by +, or "none".
    """

    scale: bool = True
    key_mean: bool = True
    clip: bool = True
    halfway: bool = True
    group: int = 32
    dynamic: str = "q"
    rotate: str = "down_in"

    def __post_init__(self) -> None:
        _require_switches(self, "PLUS")
        _require_size(self, "group", GROUPS, "the clusters of the input", "PLUS")
        for name, sites in (("dynamic", TOKEN_SITES), ("rotate", ROTATED_SITES)):
            remedy = f"No site is named: join some of {', '.join(sites)} by +, or use none."
            text = require_text(name, getattr(self, name), remedy)
            chosen = [] if text == "none" else [require_choice(f"site of {name}", site, sites) for site in text.split("+")]
            object.__setattr__(self, name, "+".join(site for site in sites if site in chosen) or "none")
        both = set(self.dynamic.split("+")) & set(self.rotate.split("+")) - {"none"}
        if both:
            rule = f"{min(both)} is named by dynamic and by rotate, which has a range of each token too: name it by one of them."
            raise InputError(rule, code="E-PARAM-PLUS")

    def by_token(self, site: str) -> bool:
        """Say whether a site has a range of each token in place of clusters."""
        return site in (*self.dynamic.split("+"), *self.rotate.split("+"))

    def describe(self) -> str:
        """Describe the options shortly: "groups of 32, down_in rotated, without clip"."""
        parts = [f"groups of {self.group}"] if self.group else []
        parts += [f"{self.rotate} rotated"] if self.rotate != "none" else []
        parts += [f"{self.dynamic} by token"] if self.dynamic != "none" else []
        off = [name.replace("_", " ") for name, value in asdict(self).items() if value is False]
        return ", ".join([*parts, *([f"without {', '.join(off)}"] if off else [])])


BASES = {
    "original": RotationOptions(scale=False, rotate=False, key_mean=False),
    "scaled": RotationOptions(rotate=False, key_mean=False),
    "rotated": RotationOptions(),
}
"""Bases in which channels are observed, as the method "rotation" makes them: of keys, "rotated" takes the mean away too."""

MASSIVE = 10.0
"""Size of a token from which it is called massive at a site, as a multiple of the median token's."""


@dataclass(frozen=True)
class DistillOptions:
    """Options of the short distillation that may follow a quantisation (`core.distill`).

    Attributes:
        steps: of training. tokens: per step, in whole windows of the calibration's length.
        lr: step size, relative to the size of what is trained; it falls with the root of the step's number.
        texts: what is read, one or several of DISTILL_TEXTS joined by +; "calibration" is the recipe's own calibration text.
    """

    steps: int = 12
    tokens: int = 1024
    lr: float = 0.01
    texts: str = "calibration"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", require_int("distillation steps", self.steps, 1, 10_000, "use 1 to 10000"))
        object.__setattr__(self, "tokens", require_int("distillation tokens", self.tokens, 8, 65_536, "use 8 to 65536"))
        object.__setattr__(self, "lr", require_float("distillation lr", self.lr, 1e-6, 1.0, "use a number from 1e-6 to 1"))
        require_text("distillation texts", self.texts, f"No text to distil on: join some of {', '.join(DISTILL_TEXTS)} by +.")
        chosen = [require_choice("distillation text", name, DISTILL_TEXTS) for name in self.texts.split("+")]
        object.__setattr__(self, "texts", "+".join(name for name in DISTILL_TEXTS if name in chosen))

    def describe(self) -> str:
        """Describe the options shortly: "distilled 12 × 1,024 tokens", with the texts where they are not the calibration's."""
        on = "" if self.texts == "calibration" else f" of {self.texts.replace('+', ' and ')}"
        return f"distilled {self.steps} × {self.tokens:,} tokens{on}"


Options = TypeVar("Options", BitNetOptions, RotationOptions, PlusOptions, DistillOptions)


def parse_options(name: str, text: str, kind: type[Options]) -> Options:
    """Read "mode=a4.8,kv_bits=3" or "scale=off,group=64" into options; what is left out keeps its default: all of "on".

    Args: name: what the options are called in an error.
    Raises: InputError naming the part that does not fit.
    """
    readers = {bool: _parse_switch, int: parse_int, float: parse_float, str: lambda _, value: value}
    read = {entry.name: readers[type(entry.default)] for entry in fields(kind)}
    pairs = [[p.strip() for p in part.split("=", 1)] for part in text.split(",") if part.strip() not in ("", "on")]
    chosen = {key: read.get(key, parse_int)(key[:20], "".join(value)) for key, *value in pairs}
    return kind(**require_keys(name, chosen, kind))


def options_text(options: BitNetOptions | RotationOptions | PlusOptions | DistillOptions) -> str:
    """Write options as `parse_options` reads them: "mode=a4.8,keep=0.5,…"."""
    return ",".join(f"{name}={value}" for name, value in asdict(options).items())


def _parse_switch(name: str, text: str) -> bool:
    """Read "on" or "off", or Python's words for them."""
    known = {"on": True, "true": True, "off": False, "false": False}
    if text.lower() not in known:
        raise InputError(f"{name} is {text[:40]!r}: use on or off.", code="E-PARAM-ROTATION")
    return known[text.lower()]

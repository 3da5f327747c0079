"""The recipe of a run: frozen, validated when made, one object for page, CLI, JSON, URL and report.

Its parts are in `core.bits` (bits of tensors, clusters of reorderings, schemes), `core.options` (what belongs to one method)
and `core.overrides` (what single layers have).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from core.bits import INPUT_SITE, PER_CHANNEL, REORDER_OF, REORDERS, SCHEMES, SITES, Bits, Clusters, parse_bits
from core.checks import FLOAT_BITS, parse_int, require_choice, require_int, require_keys, require_text
from core.errors import InputError
from core.options import BITNET_MODES, BitNetOptions, DistillOptions, PlusOptions, RotationOptions, options_text, parse_options
from core.overrides import Overrides
from core.privacy import text_record

__all__ = [
    "BITNET_MODES",
    "FLOAT_BITS",
    "INPUT_SITE",
    "METHODS",
    "ORDERS",
    "PER_CHANNEL",
    "REORDERS",
    "REORDER_OF",
    "SCHEMES",
    "SEGMENTS",
    "SITES",
    "VARIANTS",
    "WEIGHT_METHODS",
    "BitNetOptions",
    "Bits",
    "Calibration",
    "Clusters",
    "DistillOptions",
    "Overrides",
    "PlusOptions",
    "QuantRecipe",
    "RotationOptions",
    "parse_bits",
    "parse_options",
    "require_choice",
    "require_int",
]

METHODS = {
    "rptq": "core.methods.rptq.plus",
    "rotation": "core.methods.rotation.method",
    "rtn": "core.methods.rtn",
    "bitnet": "core.methods.bitnet",
}
"""Module of each quantisation method, by the method's name: `core.methods.method` imports it when it is used."""
WEIGHT_METHODS = ("gptq", "rtn")
VARIANTS = {
    "default": tuple(METHODS),
    "official": ("rptq", "rtn", "bitnet"),
    "strict": tuple(METHODS),
    "matched": ("rtn",),
    "sorted": ("rptq",),
}
"""The variants, and the methods that have each."""
OPTIONS = {
    "bitnet": (BitNetOptions, "mode, keep and the bits of attention"),
    "rotation": (RotationOptions, "scale, rotate, group and the other switches of rotation"),
}
"""The class of the options that belong to one method, and what they are, by the method's name: fields of `QuantRecipe`."""
ADDED = {"distill": DistillOptions, "plus": PlusOptions}
"""The class of what a recipe may add to its method, None for nothing: fields of `QuantRecipe`."""
ORDERS = {"layer": "", "shared": ", one order for all layers"}
"""Orders of the residual stream in RPTQ, and how a label tells them: R1 and R4 of each layer, or one order for all layers."""
SEGMENTS = {"exact": "", "aligned": " in few aligned runs", "pow2": " with power-of-two scales"}


@dataclass(frozen=True)
class Calibration:
    """The text that ranges are observed on: `text` as `resolve_text` takes it, `tokens` in windows of `window`."""

    text: str = "sotu"
    tokens: int = 8192
    window: int = 512

    def __post_init__(self) -> None:
        require_text("calibration", self.text, "No readable calibration text was named: use sotu, wikitext2, a file or text:….")
        window = require_int("calibration window", self.window, 8, 8192, "use 8 to 8192 tokens")
        rule = f"use at least one window ({window}) and at most 1048576"
        tokens = require_int("calibration tokens", self.tokens, window, 1_048_576, rule)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "tokens", tokens)


@dataclass(frozen=True)
class QuantRecipe:
    """Everything that decides a quantised model. Equal recipes give equal models; `hash` names them.

    Attributes:
        method: "rptq", "rotation", "rtn" (round-to-nearest, the baseline) or "bitnet".
        scheme: one of SCHEMES, or "custom" with `bits` given.
        variant: of RPTQ, "default" (better rules), "official" (the published code's rules), "strict" (default rules with
            the norm outputs at the scheme's activation bits), or "sorted" (default rules with groups of equal size, of
            channels sorted by range, in place of KMeans). Of rotation, "default" or "strict". Of RTN, "default" (plain: one
            range per tensor) or "matched" (everything as RPTQ's default but the reordering: groups of neighbours, clip search,
            first token in float).
        bitnet, rotation: options of the method of that name, its defaults when left out; None for the other methods.
        segments: of RPTQ's clusters; "aligned" and "pow2" trade accuracy for fewer integer accumulators.
        overrides: bits and clusters of single layers; what equals those of all layers is left out.
        order: of the residual stream in RPTQ; "layer": each layer's norms store R1 and R4, "shared": one order for all layers is
            folded into weights, embedding and head, and each layer has its own boundaries of clusters.
        plus: the parts of the method rotation that are added to RPTQ, None for none; see `PlusOptions`.
        distill: the distillation that follows, None for none; not of bitnet, whose weights have another form.
    """

    model: str
    revision: str | None = None
    method: str = "rptq"
    scheme: str = "W4A4"
    bits: Bits | None = None
    clusters: Clusters = field(default_factory=Clusters)
    weights: str = "gptq"
    variant: str = "default"
    calibration: Calibration = field(default_factory=Calibration)
    seed: int = 0
    bitnet: BitNetOptions | None = None
    segments: str = "exact"
    overrides: Overrides = field(default_factory=Overrides)
    rotation: RotationOptions | None = None
    order: str = "layer"
    distill: DistillOptions | None = None
    plus: PlusOptions | None = None

    def __post_init__(self) -> None:
        require_text("model", self.model, "No readable model was named: give a catalogue name, a Hub id or a folder.")
        require_choice("method", self.method, tuple(METHODS))
        require_choice("weight method", self.weights, WEIGHT_METHODS)
        require_choice("variant", self.variant, tuple(VARIANTS))
        require_choice("segments", self.segments, tuple(SEGMENTS) if self.method == "rptq" else ("exact",))
        require_choice("order", self.order, tuple(ORDERS) if self.method == "rptq" else ("layer",))
        require_choice("scheme", self.scheme, (*SCHEMES, "custom"))
        if self.revision is not None:
            require_text("revision", self.revision, "The revision is not a text: give a branch, a tag or a commit.")
        object.__setattr__(self, "seed", require_int("seed", self.seed, 0, 2**31 - 1, "use 0 to 2147483647"))
        if (self.scheme == "custom") != (self.bits is not None):
            rule = "Own bits go with scheme custom, and scheme custom needs bits: give both or neither."
            raise InputError(rule, code="E-PARAM-BITS")
        if self.method not in VARIANTS[self.variant]:
            owner = VARIANTS[self.variant][0]
            rule = f"Variant {self.variant} belongs to the method {owner}, not to {self.method}: choose another, or {owner}."
            raise InputError(rule, code="E-PARAM-VARIANT")
        for name, (kind, options) in OPTIONS.items():
            if self.method == name and getattr(self, name) is None:
                object.__setattr__(self, name, kind())
            if self.method != name and getattr(self, name) is not None:
                rule = f"{options} belong to the method {name}, not to {self.method}: leave them out."
                raise InputError(rule, code=f"E-PARAM-{name.upper()}")
        if self.distill is not None and self.method == "bitnet":
            raise InputError("The method bitnet is not distilled: leave distill out, or choose another.", code="E-PARAM-DISTILL")
        self._check_plus()
        self._check_overrides()
        object.__setattr__(self, "overrides", self.overrides.without(self.tensor_bits, self.clusters))

    def _check_plus(self) -> None:
        if self.plus is None:
            return
        refused = {
            f"the method {self.method}": self.method != "rptq",
            "the variant official, whose rules are the published ones": self.variant == "official",
            f"segments {self.segments}, as weights have groups of their own": self.segments != "exact",
        }
        for what, applies in refused.items():
            if applies:
                rule = f"RPTQ+ does not go with {what}: leave plus out, or choose another."
                raise InputError(rule, code="E-PARAM-PLUS")

    def _check_overrides(self) -> None:
        grouped = self.method == "rptq" or self.variant == "matched"
        for layer, place, value in self.overrides.entries:
            if self.method == "bitnet" or (place in REORDERS and not grouped):
                method = "rtn in its plain variant" if self.method == "rtn" else self.method
                rule = f"layers.{layer}.{place}={value} has no meaning for the method {method}: leave it out."
                raise InputError(rule, code="E-PARAM-OVERRIDES")

    @property
    def tensor_bits(self) -> Bits:
        """Bits of every tensor after the variant's rules."""
        if self.bitnet is not None:
            return self.bitnet.tensor_bits
        bits = self.bits or SCHEMES[self.scheme]
        if self.variant == "strict" and self.scheme != "custom":
            bits = replace(bits, attn_in=bits.o_in, mlp_in=bits.o_in)
        return bits

    def for_layer(self, layer: int) -> QuantRecipe:
        """Return the recipe of one layer, by which methods plan and build it: with its own bits and clusters, no overrides.

        A layer with overrides has `LayerBits`: its recipe is not for files.
        """
        if not self.overrides.entries:
            return self
        plain = replace(self, overrides=Overrides())
        if layer not in self.overrides.layers:
            return plain
        bits, clusters = self.overrides.apply(layer, self.tensor_bits, self.clusters)
        return replace(plain, scheme="custom", bits=bits, clusters=clusters)

    def with_bits(self, bits: Mapping[str, int]) -> QuantRecipe:
        """Return the recipe with other bits of some tensors, by their names in `Bits`, in all layers."""
        kept = tuple(entry for entry in self.overrides.entries if entry[1].partition(".")[0] not in bits)
        return replace(self, scheme="custom", bits=replace(self.tensor_bits, **bits), overrides=Overrides(kept))

    @property
    def reorderings(self) -> tuple[str, ...]:
        """Names of the reorderings that the method makes; R2 only serves quantised queries and keys."""
        bits = self.tensor_bits
        without = set() if min(bits.q, bits.k) < FLOAT_BITS else {"R2"}
        without |= {REORDER_OF[site] for site in ("attn_in", "mlp_in", "down_in") if self.by_token(site)}
        return tuple(name for name in REORDERS if name not in without) if self.method == "rptq" else ()

    def by_token(self, site: str) -> bool:
        """Say whether `plus` gives a quantised site a range of each token in place of RPTQ's clusters."""
        return self.plus is not None and self.tensor_bits.site(site) < FLOAT_BITS and self.plus.by_token(site)

    @property
    def all_bits(self) -> tuple[Bits, ...]:
        """Bits of every tensor, first of layers without overrides, then of each layer that has some."""
        return self.tensor_bits, *(self.for_layer(layer).tensor_bits for layer in self.overrides.layers)

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types; `from_dict` is the inverse.

        `bitnet`, `rotation`, `segments`, `overrides`, `order`, `distill` and `plus` are left out where they hold their default:
        recipes from before these fields keep their hash.
        """
        later = {"bitnet": None, "rotation": None, "segments": "exact", "overrides": {}, "order": "layer"}
        later |= dict.fromkeys(ADDED)
        fields = asdict(self) | {"overrides": self.overrides.to_dict()}
        return {name: value for name, value in fields.items() if name not in later or value != later[name]}

    def to_record(self) -> dict[str, Any]:
        """Return `to_dict` as files and reports may hold it: a pasted text is replaced by its SHA-256."""
        fields = self.to_dict()
        return fields | {"calibration": fields["calibration"] | {"text": text_record(self.calibration.text)}}

    def to_json(self) -> str:
        """Return the recipe as canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantRecipe:
        """Read what `to_dict` wrote. Raises: InputError for an unknown or badly typed field."""
        data = dict(require_keys("recipe", data, cls))
        own = {name: kind for name, (kind, _) in OPTIONS.items()} | ADDED
        parts = {"bits": Bits, "clusters": Clusters, "calibration": Calibration} | own
        for name, part in parts.items():
            if data.get(name) is not None or (name in data and part in (Clusters, Calibration)):
                data[name] = part(**require_keys(name, data[name], part))
        if "overrides" in data:
            data["overrides"] = Overrides.from_dict(data["overrides"])
        if "model" not in data:
            raise InputError('The recipe names no model: add "model".', code="E-PARAM-MODEL")
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> QuantRecipe:
        """Read what `to_json` wrote, or a report with it under "recipe". Raises: InputError if the text is no JSON object."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            rule = "The recipe is not valid JSON: export one from the page or the CLI and edit that."
            raise InputError(rule, code="E-PARAM-RECIPE") from error
        return cls.from_dict(data["recipe"] if isinstance(data, dict) and "recipe" in data else data)

    def to_query(self) -> str:
        """Return the recipe as a URL query string; a pasted text is named by its SHA-256."""
        return urlencode({name: value for name, value in self.query_pairs().items() if value != ""})

    def query_pairs(self) -> dict[str, object]:
        """Return the recipe as the keys and values of a URL's query, empty where the recipe has none."""
        return {
            "model": self.model,
            "revision": self.revision or "",
            "method": self.method,
            "scheme": self.scheme,
            "clusters": ",".join(f"{r}={getattr(self.clusters, r)}" for r in REORDERS),
            "weights": self.weights,
            "variant": self.variant,
            "segments": "" if self.segments == "exact" else self.segments,
            "order": "" if self.order == "layer" else self.order,
            "calibration": text_record(self.calibration.text),
            "tokens": self.calibration.tokens,
            "window": self.calibration.window,
            "seed": self.seed,
            "bits": ",".join(f"{k}={v}" for k, v in asdict(self.bits).items()) if self.bits else "",
            **{name: options_text(getattr(self, name)) for name in (*OPTIONS, *ADDED) if getattr(self, name)},
            "set": self.overrides.to_text(),
        }

    @classmethod
    def from_query(cls, query: str, *, default: QuantRecipe) -> QuantRecipe:
        """Read what `to_query` wrote; missing keys keep the values of `default`, unknown keys are ignored.

        A query with a model drops the revision of `default`, and one with a scheme its single bits; with either, or a method,
        its overrides.
        """
        try:
            given = dict(parse_qsl(query, keep_blank_values=False, max_num_fields=64))
        except ValueError as error:
            raise InputError("The link has too many parts: open one made by the page.", code="E-PARAM-RECIPE") from error
        plain = ("model", "revision", "method", "scheme", "weights", "variant", "segments", "order")
        changes: dict[str, Any] = {k: given[k] for k in plain if k in given}
        if "model" in given:
            changes.setdefault("revision", None)
        if "scheme" in given:
            changes["bits"] = None
        if "method" in given:
            changes.setdefault("segments", "exact")
            changes.setdefault("order", "layer")
            kept = given["method"] in VARIANTS[default.variant]
            changes.setdefault("variant", default.variant if kept else "default")
        for name, (kind, _) in OPTIONS.items():
            if "method" in given or name in given:
                changes[name] = parse_options(name, given[name], kind) if name in given else None
        for name, kind in ADDED.items():
            if name in given or "method" in given:
                changes[name] = parse_options(name, given[name], kind) if name in given else None
        if {"model", "method", "scheme"} & given.keys():
            changes["overrides"] = Overrides()
        if "set" in given:
            changes["overrides"] = Overrides.parse(given["set"])
        readers = {"clusters": Clusters.parse, "bits": parse_bits, "seed": lambda number: parse_int("seed", number)}
        changes |= {name: read(given[name]) for name, read in readers.items() if name in given}
        cal = default.calibration
        changes["calibration"] = Calibration(
            given.get("calibration", cal.text),
            parse_int("calibration tokens", given.get("tokens", str(cal.tokens))),
            parse_int("calibration window", given.get("window", str(cal.window))),
        )
        return replace(default, **changes)

    def describe_bits(self) -> str:
        """Describe the bits with what a scheme's name leaves out: "W4A4 (norm outputs 8, softmax 8)", but plain "W4A8"."""
        own = f", {self.overrides.describe()}" if self.overrides.entries else ""
        return self._describe_common_bits() + own

    def _describe_common_bits(self) -> str:
        bits = self.tensor_bits
        if self.bitnet is not None:
            return self.bitnet.describe()
        if self.scheme == "custom":
            return "custom (" + ", ".join(f"{k} {v}" for k, v in asdict(bits).items()) + ")"
        if not bits.quantizes_activations:
            return f"{self.scheme} (activations and KV cache 16)"
        if bits.q == FLOAT_BITS:
            return f"{self.scheme} (only the KV cache below 16)"
        kept = [f"norm outputs {bits.attn_in}"] if bits.attn_in != bits.o_in else []
        kept += [f"softmax {bits.softmax}"] if bits.softmax != bits.o_in else []
        return f"{self.scheme} ({', '.join(kept)})" if kept else self.scheme

    def label(self) -> str:
        """Name the recipe in one line for tables: method, bits with what stays wider, clusters, weight method, variant."""
        if self.method == "bitnet":
            return f"BITNET · {self.describe_bits()}"
        if self.method == "rotation":
            parts = ["ROTATION", self.describe_bits(), self.rotation.describe()]
        elif self.method == "rtn":
            calibrated = ", clip search, first token float" if any(b.quantizes_activations for b in self.all_bits) else ""
            matched = f"RTN matched ({self.clusters.describe()}{calibrated})"
            parts = [matched if self.variant == "matched" else "RTN plain", self.describe_bits()]
        else:
            clusters = self.clusters.describe() + SEGMENTS[self.segments] + ORDERS[self.order]
            parts = ["RPTQ", self.describe_bits(), clusters]
            parts = ["RPTQ+", *parts[1:], *filter(None, [self.plus.describe()])] if self.plus else parts
        parts.append(self.weights.upper() if any(bits.quantizes_weights for bits in self.all_bits) else "float weights")
        parts += [self.distill.describe()] if self.distill else []
        return " · ".join(parts if self.variant in ("default", "matched") else [*parts, self.variant])


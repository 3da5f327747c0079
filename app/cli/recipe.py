"""Build the recipe from the options of `quantize`, alone or on top of a recipe from a file."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from dataclasses import asdict, replace
from typing import Any

from core.checks import parse_int
from core.errors import InputError
from core.options import options_text
from core.privacy import PASTED, PASTED_DIGEST
from core.recipe import (
    ADDED,
    OPTIONS,
    VARIANTS,
    Bits,
    Calibration,
    Clusters,
    Overrides,
    QuantRecipe,
    parse_bits,
    parse_options,
)

FOREIGN = {
    "rtn": ("clusters", "segments", "order"),
    "rotation": ("clusters", "segments", "order"),
    "bitnet": ("scheme", "bits", "variant", "clusters", "segments", "order", "weights", "set"),
}
"""Options that each method ignores."""
MAX_BYTES = 2**24
PASTED_FILE = "my-text.txt"
"""File name that a command gives for a text that was pasted into the page."""


def recipe_of(args: Namespace) -> QuantRecipe:
    """Build the recipe that `quantize`'s options describe. Raises: InputError."""
    base = _read_recipe(args.recipe) if args.recipe is not None else {}
    chosen = ("model", "method", "variant", "segments", "order", "weights")
    given = {name: value for name in chosen if (value := getattr(args, name)) is not None}
    if "model" in given:
        base.pop("revision", None)
    for name in OPTIONS:
        if given.get("method", name) != name:
            base.pop(name, None)
    if given.get("method") == "bitnet":
        base.pop("overrides", None)
    method = given.get("method") or base.get("method", "rptq")
    matched = (given.get("variant") or base.get("variant")) == "matched"
    for name in FOREIGN.get(method, ()):
        if getattr(args, name) is not None and not (matched and name == "clusters"):
            raise InputError(f"--{name} has no meaning for the method {method}: leave it out.", code="E-PARAM-METHOD")
    if method != "rptq":
        for name in ("segments", "order", "plus"):
            base.pop(name, None)
    if method not in VARIANTS[base.get("variant", "default")]:
        base.pop("variant", None)
    if method == "rtn" and "weights" not in base:
        given.setdefault("weights", "rtn")  # the method's own choice
    options = ("mode", "keep", "kv_bits", "bos_bits", "q_bits")
    own = {name: value for name in options if (value := getattr(args, name)) is not None}
    if own:
        given["bitnet"] = _changed("bitnet", base, ",".join(f"{name}={value}" for name, value in own.items()))
    if args.rotation is not None:
        given["rotation"] = _changed("rotation", base, args.rotation)
    if given.get("method") == "bitnet":
        base.pop("distill", None)
    for name in ADDED:
        text = getattr(args, name)
        if text == "off":
            base.pop(name, None)
        elif text is not None:
            given[name] = _changed(name, base, text)
    if args.clusters is not None:
        base.pop("clusters", None)
    recipe = QuantRecipe.from_dict(base | given) if base or given else _no_model()
    if args.clusters is not None:
        recipe = replace(recipe, clusters=Clusters.parse(args.clusters))
    if args.scheme is not None or args.bits is not None:
        recipe = _with_bits(recipe, args.scheme, args.bits)
    if args.set is not None:
        own = Overrides.parse(",".join(args.set))
        recipe = replace(recipe, overrides=Overrides(recipe.overrides.entries + own.entries))
    seed = recipe.seed if args.seed is None else parse_int("seed", args.seed)
    return replace(recipe, calibration=calibration_of(args, recipe.calibration), seed=seed)


def _changed(name: str, base: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the fields of a method's options: those of the recipe `base`, with what a text changes."""
    kind = ADDED.get(name) or OPTIONS[name][0]
    return asdict(parse_options(name, f"{options_text(kind(**(base.get(name) or {})))},{text}", kind))


def command_of(recipe: QuantRecipe) -> str:
    """Return the command line that repeats a recipe, the inverse of `recipe_of`.

    A pasted text is named as the file `PASTED_FILE`, which the user has to write first.
    """
    calibration = recipe.calibration
    options = {
        "model": recipe.model + (f"@{recipe.revision}" if recipe.revision else ""),
        "method": recipe.method,
        "calibration": PASTED_FILE if calibration.text.startswith((PASTED, PASTED_DIGEST)) else calibration.text,
        "calibration-tokens": calibration.tokens,
        "window": calibration.window,
        "seed": recipe.seed,
    }
    if recipe.bitnet is not None:
        options |= {name.replace("_", "-"): value for name, value in asdict(recipe.bitnet).items()}
    else:
        options |= {"scheme": recipe.scheme, "weights": recipe.weights, "variant": recipe.variant}
        if recipe.bits is not None:
            options["bits"] = ",".join(f"{name}={value}" for name, value in asdict(recipe.bits).items())
    if recipe.rotation is not None:
        options |= {"rotation": options_text(recipe.rotation)}
    options |= {name: options_text(own) for name in ADDED if (own := getattr(recipe, name)) is not None}
    if recipe.method == "rptq" or recipe.variant == "matched":
        options |= {"clusters": ",".join(f"{name}={count}" for name, count in asdict(recipe.clusters).items())}
    if recipe.method == "rptq":
        options |= {"segments": recipe.segments, "order": recipe.order}
    if recipe.overrides.entries:
        options |= {"set": recipe.overrides.to_text()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "app.cli", "quantize", *words, "--out", "quantised"])


def _no_model() -> QuantRecipe:
    raise InputError("No model was named: give --model, or a --recipe that names one.", code="E-PARAM-MODEL")


def _with_bits(recipe: QuantRecipe, scheme: str | None, bits: str | None) -> QuantRecipe:
    """Return the recipe with another scheme, or with single bits on top of one (of 16 everywhere for `custom`)."""
    if bits is None:
        return replace(recipe, scheme=scheme, bits=None)
    start = (
        recipe.tensor_bits
        if scheme is None
        else Bits()
        if scheme == "custom"
        else replace(recipe, scheme=scheme, bits=None).tensor_bits
    )
    wanted = parse_bits(bits)
    names = [part.partition("=")[0].strip() for part in bits.split(",") if part.strip()]
    if not names:
        raise InputError("No bits are given: write name=bits, for example k=3,v=3.", code="E-PARAM-BITS")
    return replace(recipe, scheme="custom", bits=replace(start, **{name: getattr(wanted, name) for name in names}))


def _read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe's fields from a file, as `QuantRecipe.from_json` does."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise InputError("The file is larger than 16 MB: is it a recipe?", code="E-PARAM-RECIPE")
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return QuantRecipe.from_json(file.read()).to_dict()
    except OSError as error:
        raise InputError(
            f"The recipe {path[-60:]!r} cannot be read: {error.strerror}. Name a JSON file.", code="E-PARAM-RECIPE"
        ) from error
    except InputError as error:
        raise InputError(f"{path[-60:]!r}: {error}", code=error.code) from error


def calibration_of(args: Namespace, base: Calibration) -> Calibration:
    """Return `base` changed by the calibration options that are given."""
    window = base.window if args.window is None else parse_int("window", args.window)
    tokens = base.tokens if args.calibration_tokens is None else parse_int("calibration tokens", args.calibration_tokens)
    return Calibration(base.text if args.calibration is None else args.calibration, tokens, window)

"""Checks of single values: each raises `InputError` naming the value, the rule and the remedy."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from core.errors import InputError

FLOAT_BITS = 16
"""Bits that mean "not quantised": the tensor stays in the model's floating-point type."""


def parse_int(name: str, text: str) -> int:
    """Parse an integer written in ASCII digits. Raises: InputError naming the field."""
    text = str(text).strip()
    digits = text[1:] if text[:1] in "+-" else text
    if not (digits.isascii() and digits.isdigit() and len(digits) < 12):
        raise InputError(f"{name} is {text[:40]!r}: write a whole number.", code=param_code(name))
    return int(text)


def require_int(name: str, value: object, low: int, high: int, remedy: str) -> int:
    """Return `value` if it is an int (not a bool) in [low, high]. Raises: InputError otherwise."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} is {str(value)[:40]!r}: {remedy}.", code=param_code(name))
    return value


def require_float(name: str, value: object, low: float, high: float, remedy: str) -> float:
    """Return `value` as a float if it is a number (not a bool) in [low, high]. Raises: InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} is {str(value)[:40]!r}: {remedy}.", code=param_code(name))
    return float(value)


def require_bits(name: str, value: object) -> int:
    """Return `value` if it is 2 to 8, or 16. Raises: InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in (2, 3, 4, 5, 6, 7, 8, FLOAT_BITS):
        raise InputError(f"{name} is {str(value)[:40]!r}: use 2 to 8, or 16 for not quantised.", code="E-PARAM-BITS")
    return value


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`. Raises: InputError otherwise."""
    if value not in choices:
        raise InputError(f"{name} is {str(value)[:40]!r}: use one of {', '.join(choices)}.", code=param_code(name))
    return value


def require_text(name: str, value: object, remedy: str) -> str:
    """Return `value` if it is a text that is not blank and can be encoded in UTF-8. Raises: InputError otherwise."""
    if not isinstance(value, str) or not value.strip() or any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(remedy, code=param_code(name))
    return value


def parse_float(name: str, text: str) -> float:
    """Parse a finite number written in ASCII. Raises: InputError naming the field."""
    text = str(text).strip()
    try:
        value = float(text) if text.isascii() and len(text) < 30 else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} is {text[:40]!r}: write a number.", code=param_code(name))
    return value


def require_keys(what: str, data: object, kind: type) -> dict[str, Any]:
    """Return `data` if it is a dict whose keys are all fields of the dataclass `kind`. Raises: InputError otherwise."""
    names = {entry.name for entry in fields(kind)}
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise InputError(f"{what} is not a JSON object: give its fields by name.", code=param_code(what))
    unknown = sorted(set(data) - names)
    if unknown:
        raise InputError(
            f"{what} has an unknown field {unknown[0][:40]!r}: known are {', '.join(sorted(names))}.", code=param_code(what)
        )
    return data


def param_code(name: str) -> str:
    """Return the stable error code of a parameter, such as "E-PARAM-CALIBRATION-TOKENS"."""
    return "E-PARAM-" + name.upper().replace(" ", "-")

"""Keep a measurement of this processor: from how many columns per cluster integer products pay."""

from __future__ import annotations

import contextlib
import functools
import json
import os

import torch

from core.cache import cache_root
from core.errors import InputError, QuantscopeError
from core.provenance import hardware
from core.storage import write_file
from kernels.linear.pace import NEVER, measure_least_columns

VARIABLE = "QUANTSCOPE_INT8_COLUMNS"
FILE = "pace.json"


def int8_columns() -> int:
    """Return the columns per cluster from which integer products are faster than float32 ones here.

    `$QUANTSCOPE_INT8_COLUMNS` fixes the number. Otherwise it is measured once for this processor, number of threads and
    version of torch, and kept in the cache, so that all processes choose the same products.
    Raises: InputError E-PARAM-INT8-COLUMNS if the variable is not a positive whole number.
    """
    stated = os.environ.get(VARIABLE, "")
    if stated and not (stated.isascii() and stated.isdigit() and 0 < int(stated) <= NEVER):
        fault = f"{VARIABLE} is {stated[:30]!r}: give a number of columns from 1 to {NEVER}, or unset it."
        raise InputError(fault, code="E-PARAM-INT8-COLUMNS")
    return int(stated) if stated else _measured(f"{hardware()}, torch {torch.__version__}")


@functools.cache
def _measured(machine: str) -> int:
    """Read the number for this machine from the cache, or measure and store it."""
    path = cache_root() / FILE
    known: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):  # no file yet, or a damaged one: the measurement is made again
        read = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(read, dict):
            known = {key: value for key, value in read.items() if type(value) is int and 0 < value <= NEVER}
    if machine not in known:
        known[machine] = measure_least_columns()
        with contextlib.suppress(OSError, QuantscopeError):  # a cache that cannot be written: the number holds for this process
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(known, indent=1).encode())
    return known[machine]

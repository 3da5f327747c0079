"""How the fake workbench behaves by a model's name, and the sentences with which it refuses."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from core.errors import TextError
from core.recipe import Calibration, QuantRecipe

Progress = Callable[[str, float | None], None]
TERNARY = "fake-ternary"
WAYS = ("slow", "endless", "memory", "exit", "killed", "bug", "wide", "single")
NAMES = ("fake", *(f"fake-{way}" for way in WAYS), TERNARY)
SAYINGS = {
    "no pickle": struct.pack("!i", 5) + b"hello",
    "negative size": struct.pack("!i", -1),
    "endless size": struct.pack("!i", 2**31 - 1),
    **{
        name: struct.pack("!i", len(pickle.dumps(value))) + pickle.dumps(value)
        for name, value in (("no tuple", "text"), ("a call", os.system), ("nothing", ()), ("no job", ("done",)))
    },
}
"""Bytes that a worker must not send, by the model's name after "fake-says "."""


def is_saved(model: str) -> bool:
    """Whether this is a folder that `quantize` wrote."""
    return (Path(model) / "report.pickle").is_file()


def fidelity_of(recipe: QuantRecipe) -> str:
    """What a BitNet run is worth."""
    if recipe.method != "bitnet":
        return ""
    mode = recipe.bitnet.mode
    if recipe.model != TERNARY:
        return f" · {mode} simulated on a model that was not trained for it: expect noise"
    return f" · trained {mode}" if mode == "a4.8" else f" · {mode} rules applied training-free to a a4.8 model: approximate"


def check_text(calibration: Calibration) -> None:
    """Refuse a pasted text that is clearly too short."""
    if calibration.text.startswith("text:") and len(calibration.text) < 800:
        raise TextError(
            f"The calibration text has about {len(calibration.text) // 5} tokens; at least {calibration.window} are needed. "
            "Paste more, or choose a named text.",
            code="E-TEXT-SHORT",
        )


def misbehave(model: str, progress: Progress) -> None:
    """Fail the way the model's name says."""
    progress("Loading", 0.0)
    if model == "fake-memory":
        raise MemoryError
    if model == "fake-exit":
        sys.exit(3)
    if model == "fake-killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if model.startswith("fake-says "):
        os.write(int(sys.argv[1]), SAYINGS[model.removeprefix("fake-says ")])
        time.sleep(60)
    if model == "fake-bug":
        raise ZeroDivisionError("a secret detail")
    while model == "fake-endless":
        time.sleep(1)

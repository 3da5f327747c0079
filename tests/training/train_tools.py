"""What the training tests share: a text, a tiny run on it, and the losses in a run's log."""

from __future__ import annotations

import random
from pathlib import Path

from training.config import TrainConfig
from training.corpus import END
from training.loop import read_log

WORDS = ["the", "old", "river", "ran", "past", "seven", "quiet", "houses", "while", "children", "counted", "boats", "in", "rain"]


def write_text(file: Path, *, seed: int = 0) -> None:
    """300 documents of random words."""
    rng = random.Random(seed)
    stories = [" ".join(rng.choice(WORDS) for _ in range(60)) + "." for _ in range(300)]
    file.write_text(f"\n{END}\n".join(stories))


def tiny(place, **fields) -> TrainConfig:
    """A run of 12 steps on that text."""
    usual = {
        "name": "tiny",
        "architecture": "bitnet",
        "mode": "w1.58a8",
        "hidden": 32,
        "layers": 1,
        "heads": 2,
        "ffn": 48,
        "vocab": 300,
        "seq": 32,
        "batch": 2,
        "tokens": 12 * 64,
        "warmup": 3,
        "texts": ((str(place / "text.txt"), 1),),
        "precision": "fp32",
        "compile": "no",
        "checkpoint_every": 4,
        "eval_every": 6,
    }
    return TrainConfig(**(usual | fields))


def losses(folder: Path) -> list[float]:
    """Losses of a run's log, whose steps must be 1, 2, 3 …"""
    entries = read_log(folder / "log.jsonl")
    assert [e["step"] for e in entries] == list(range(1, len(entries) + 1))
    return [e["loss"] for e in entries]

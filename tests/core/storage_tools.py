"""Folders as the tests of storage write them, what a writer leaves behind, and programs that are killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from core.storage import atomic_dir

ROOT = Path(__file__).resolve().parents[2]


def write(target: Path, value: str, **options: bool) -> None:
    with atomic_dir(target, **options) as stage:
        (stage / "a.txt").write_text(value)
        (stage / "sub").mkdir()
        (stage / "sub" / "b.bin").write_bytes(value.encode() * 1000)


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path.name.startswith(f"{target.name}.")]


def run_python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, **options)

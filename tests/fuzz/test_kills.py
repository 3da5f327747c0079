"""Whatever moment a writer is killed at, what it leaves is whole, refused or absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_writers_killed_at_random_moments_leave_nothing_that_is_wrong():
    done = subprocess.run([sys.executable, "-m", "tests.fuzz.kills", "--times", "6"], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0 and ", 0 wrong" in done.stdout, done.stdout + done.stderr[-2000:]

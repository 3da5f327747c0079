"""Fuzz every parser with as many inputs in all as are asked for: `python -m tests.fuzz [INPUTS]` (default 300,000)."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import pytest

SHARE = 32
"""Inputs that all tests together try per example asked for."""


class Told:
    """A plugin that counts the tries and says at the end how many there were and how long the longest took."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write the count."""
        tried = sys.modules["tests.fuzz.test_parsers"].TRIED
        seconds = time.perf_counter() - self.started
        terminalreporter.write_line(f"{tried.count:,} inputs in {seconds:.0f} s; the longest took {tried.longest:.2f} s")


def main() -> int:
    """Run the parsers' tests with as many examples as make about that many inputs. Returns: pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("inputs", nargs="?", type=int, default=300_000)
    os.environ["QUANTSCOPE_FUZZ"] = str(max(1, parser.parse_args().inputs // SHARE))
    return pytest.main(["-q", "-p", "no:randomly", str(Path(__file__).with_name("test_parsers.py"))], plugins=[Told()])


if __name__ == "__main__":
    raise SystemExit(main())

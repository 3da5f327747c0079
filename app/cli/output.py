"""Print for the command line: text and one JSON object to stdout, progress and error line to stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from core.disk import PLACE, disk_errors
from core.errors import InputError, QuantscopeError
from core.progress import Pace
from core.storage import write_file

STDOUT = "-"
FIRST_LINE_S, NEXT_LINE_S, REDRAW_S = 10.0, 15.0, 0.1
BAR = 24


class Progress:
    """A progress callback that draws a bar on a terminal, elsewhere prints a line from time to time, first after ten seconds.

    Args:
        stream: where to write, usually stderr.
        clock: seconds, for tests.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.bar = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.start: float | None = None
        self.due = 0.0
        self.fraction, self.pace = 0.0, Pace()
        self.drawn = False

    def __call__(self, stage: str, fraction: float | None = None) -> None:
        """Show a stage; without a fraction, the last one stays. A smaller fraction begins another piece of work."""
        now = self.clock()
        if self.start is None:  # the time that libraries take to load does not count
            self.start, self.due = now, now + (0.0 if self.bar else FIRST_LINE_S)
        if fraction is not None:
            self.pace = self.pace if fraction >= self.fraction else Pace()
            self.fraction = min(1.0, fraction)
            self.pace.report(now, self.fraction)
        if now < self.due:
            return
        stage = printable(stage)
        if self.bar:
            self.due, self.drawn = now + REDRAW_S, True
            filled = round(BAR * self.fraction)
            line = f"[{'#' * filled}{'-' * (BAR - filled)}] {self.fraction:4.0%} {stage}{self._left(now)}"
            width = max(20, shutil.get_terminal_size().columns) - 1
            self.stream.write(f"\r{line[:width]}\x1b[K")
        else:
            self.due = now + NEXT_LINE_S
            self.stream.write(f"[{now - self.start:4.0f} s] {stage} ({self.fraction:.0%}){self._left(now)}\n")
        self.stream.flush()

    def close(self) -> None:
        """Clear the bar, so that the next line starts at the left."""
        if self.drawn:
            self.drawn = False
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _left(self, now: float) -> str:
        """Return the remaining time as text, once it can be estimated."""
        remaining = self.pace.remaining(now)
        return "" if remaining is None else f", about {round(remaining) // 60}:{round(remaining) % 60:02d} left"


class Console:
    """The output of a verb: text for people on stdout, unless the JSON object goes there.

    Args:
        json_target: a file, "-" for stdout, or None.
    """

    def __init__(self, json_target: str | None) -> None:
        self.json_target = json_target
        self.progress = Progress(sys.stderr)
        if json_target not in (None, STDOUT):
            check_target(json_target)

    def note(self, text: str) -> None:
        """Print a remark on stderr."""
        self.progress.close()
        complain(text)

    def write(self, text: str) -> None:
        """Print text for people, without buffering."""
        if self.json_target != STDOUT:
            self.progress.close()
            sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
            sys.stdout.flush()

    def finish(self, document: dict[str, Any], text: str) -> None:
        """Write the result: first the JSON object (so that a closed pipe cannot lose it), then the text.

        Raises: as `write_json`; the text is written all the same.
        """
        self.progress.close()
        try:
            if self.json_target is not None:
                write_json(self.json_target, document)
        except QuantscopeError:
            self.write(text)
            raise
        self.write(text)


def complain(line: str) -> None:
    """Print the one line on stderr that says what went wrong."""
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not hide the exit code
        sys.stderr.write(printable(line) + "\n")
        sys.stderr.flush()


def printable(text: str, *, keep: str = "") -> str:
    """Replace control characters of `text`: names and generated text must not steer the terminal."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Format aligned columns under a rule; the first `left` are flush left, the others flush right."""
    cells = [[printable(str(cell)) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Format names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs)
    return "".join(f"{name.ljust(width)}  {printable(value)}\n" for name, value in pairs)


def cautions(report: Any) -> list[tuple[str, str]]:
    """Return the line for a report's caution, if it has one."""
    return [("caution", report.caution)] if report.caution else []


def check_target(target: str, *, code: str = "E-PARAM-JSON") -> None:
    """Refuse a file that cannot be written before the work begins. Raises: InputError with `code`."""
    try:
        path = Path(os.path.realpath(target))
        if not target.strip():
            raise OSError(errno.ENOENT, "")
        if path.is_dir():
            raise OSError(errno.EISDIR, "")
        os.stat(path.parent)
        if not path.parent.is_dir():
            raise OSError(errno.ENOTDIR, "")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OSError(errno.EACCES, "")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _no_target(target, error, code) from error


def write_json(target: str, document: dict[str, Any]) -> None:
    """Write one JSON object, indented unless it is large: to stdout, or to a file that is whole or absent.

    Raises: ResourceError E-DISK if the file cannot be written; an earlier one is then as it was.
    """
    text = json.dumps(document, allow_nan=False, indent=None if "sites" in document else 2) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        with disk_errors(path, every_path=True):
            path.write_text(text, encoding="utf-8")  # a pipe or a device cannot be replaced
    else:
        write_file(path, text.encode("utf-8"))


def _no_target(target: str, error: Exception, code: str) -> InputError:
    number = getattr(error, "errno", None)
    reason = "there is no such folder" if number == errno.ENOENT else PLACE.get(number, ("it cannot be written",))[0]
    rule = f"The file {target[-60:]!r} cannot be written: {reason}. Name a file in a folder that exists."
    return InputError(rule, code=code)

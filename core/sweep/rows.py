"""Keep the rows of a sweep in one file of JSON lines, one for each finished or failed recipe.

The file is `rows.jsonl`. A row that was cut, by a full disk or a killed program, is dropped when the file is opened again, and
its recipe runs again. One process writes at a time, and all rows of a folder are measured in one way, which `sweep.json` records.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.disk import disk_errors
from core.errors import InputError
from core.privacy import text_record
from core.storage import file_lock, write_file
from core.sweep.grid import Measure

ROWS, FACTS = "rows.jsonl", "sweep.json"
DONE, FAILED = "done", "failed"


class Rows:
    """The rows of one folder by the hash of their recipe. Use `open_rows`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS
        self.found: dict[str, dict[str, Any]] = {}
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            try:
                row = json.loads(line)
                self.found[row["hash"]] = row
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        self._whole = whole

    def append(self, row: dict[str, Any]) -> None:
        """Write a row at the end of the file, on the disk. Raises: ResourceError E-DISK; the rows before stay."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with disk_errors(self.path, every_path=True), self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self.found[row["hash"]] = row


@contextlib.contextmanager
def open_rows(folder: Path, measure: Measure) -> Iterator[Rows]:
    """Open the rows of a folder for writing; the folder is made if it is not there.

    Raises: InputError E-PARAM-OUT for a folder whose rows were measured in another way; ResourceError E-TIME if another sweep
        writes there, E-DISK.
    """
    facts = asdict(measure) | {"text": text_record(measure.text)}
    with disk_errors(folder, every_path=True):
        folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / ".lock", timeout=0):
        stated = folder / FACTS
        if stated.exists():
            try:
                before = json.loads(stated.read_text(encoding="utf-8"))
            except ValueError:
                before = None
            if before != facts:
                raise InputError(
                    f"The rows in {folder.name!r} were measured in another way ({str(before)[:80]}): name another folder.",
                    code="E-PARAM-OUT",
                )
        elif (folder / ROWS).exists() or any(path.name != ".lock" for path in folder.iterdir()):
            raise InputError(f"The folder {folder.name!r} holds other files: name a new or empty one.", code="E-PARAM-OUT")
        else:
            write_file(stated, (json.dumps(facts, indent=1) + "\n").encode())
        yield Rows(folder)

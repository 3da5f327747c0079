"""Read the documents of a data file, JSON, JSON lines or Parquet, as one text, joined by blank lines.

The field is called `text` or `content`, as data sets on the Hub name it, or is the only one that holds strings.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import TextError

LINES, TABLES = (".json", ".jsonl", ".ndjson"), (".parquet",)
"""Suffixes of data files."""
FIELDS = ("text", "content")


def read_documents(path: Path, *, limit: int) -> str:
    """Read the documents of a data file.

    Args: limit: the largest number of bytes in UTF-8.
    Raises: TextError E-TEXT-ENC for a file that cannot be read as its suffix says, or without a text field, E-TEXT-SIZE for more
        than `limit`, E-TEXT-OFFLINE where Parquet's reader is not installed.
    """
    rows = _lines(path) if path.suffix.lower() in LINES else _table(path)
    texts, size, field = [], 0, None
    for row in rows:
        field = field or _field(row, path)
        text = row.get(field)
        if text is None or not isinstance(text, str):
            raise TextError(
                f"Document {len(texts) + 1} of {path.name[:60]} has no text in its field {field[:40]!r}: give a file in which "
                "each has.",
                code="E-TEXT-ENC",
            )
        texts.append(text)
        size += len(text.encode("utf-8", "replace")) + 2
        if size > limit:
            raise TextError(
                f"{path.name[:60]} holds more than {limit // 10**6} MB of text: give a part of it.", code="E-TEXT-SIZE"
            )
    return "\n\n".join(texts)


def _field(row: Mapping[str, Any], path: Path) -> str:
    """Choose the field of the text by the first document."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    found = [name for name in FIELDS if name in strings] or strings
    if len(found) == 1 or found[:1] == ["text"]:
        return found[0]
    held = ", ".join(str(name)[:20] for name in row) or "none"
    raise TextError(
        f"{path.name[:60]} has no field called text (its fields: {held[:80]}): rename the one that holds it to text.",
        code="E-TEXT-ENC",
    )


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a file of JSON lines, or of one JSON array or object; empty lines are skipped."""
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(whole, dict) or (isinstance(whole, list) and all(isinstance(row, dict) for row in whole)):
            yield from whole if isinstance(whole, list) else [whole]
            return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise TextError(
                    f"Line {number:,} of {path.name[:60]} is not a JSON object: JSON lines have one on each line. Mend it, or "
                    "give plain text.",
                    code="E-TEXT-ENC",
                )
            yield row


def _table(path: Path) -> Iterable[Mapping[str, Any]]:
    """Yield the rows of a Parquet file, its columns of strings alone."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise TextError(
            f"{path.name[:60]} is a Parquet file, and its reader is not installed: run `pip install pyarrow`, or give JSON "
            "lines.",
            code="E-TEXT-OFFLINE",
        ) from None
    try:
        file = parquet.ParquetFile(path)
        strings = [field.name for field in file.schema_arrow if types.is_string(field.type) or types.is_large_string(field.type)]
        own = next(([name] for name in FIELDS if name in strings), strings)
        for batch in file.iter_batches(batch_size=256, columns=own):
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise TextError(
            f"{path.name[:60]} cannot be read as Parquet: download it again, or give JSON lines.", code="E-TEXT-ENC"
        ) from error

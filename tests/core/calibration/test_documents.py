"""Data files give the documents' text, without braces; what has no text, or is damaged, is said in one sentence."""

from __future__ import annotations

import json
import sys

import pytest

from core.calibration.data import resolve_text
from core.calibration.documents import read_documents
from core.errors import TextError


def write_lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("field", ["text", "content", "story"])
def test_json_lines_give_their_text(field, tmp_path):
    rows = [{field: "First.\nStill first.", "id": 1}, {"id": 2, field: "Zweiter – ü"}, ""]
    path = write_lines(tmp_path / "data.jsonl", rows)
    found = resolve_text(str(path), split="calibration")
    assert found.text == "First.\nStill first.\n\nZweiter – ü" and found.name == "data.jsonl"


def test_the_field_text_wins(tmp_path):
    path = write_lines(tmp_path / "data.ndjson", [{"url": "https://a.example", "text": "words", "content": "x"}])
    assert read_documents(path, limit=100) == "words"


@pytest.mark.parametrize("content", [
    '[{"text": "First."}, {"text": "Second."}]', '{"text": "First."}\n{"text": "Second."}',
    '\ufeff{\n "text": "First.\\n\\nSecond."}', '\n[\n{"id": 1, "story": "First."},\n{"id": 2, "story": "Second."}]\n',
])
def test_json_gives_its_text_whatever_its_layout(content, tmp_path):
    (tmp_path / "data.json").write_text(content, encoding="utf-8")
    assert resolve_text(str(tmp_path / "data.json"), split="calibration").text == "First.\n\nSecond."


@pytest.mark.parametrize(("start", "said"), [
    (b"\x1f\x8b\x08", "a gzip archive: unpack it first."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first."),
    (b"PK\3\4", "a zip archive or an office document: save its text as a file."),
    (b"%PDF-1.7", "a PDF: save its text as a file."),
    (b"PAR1", "a Parquet file: name it with the suffix .parquet."),
    (b"GGUF\3", "a GGUF model: give a text."),
])
def test_files_that_are_no_text_are_named(start, said, tmp_path):
    (tmp_path / "data").write_bytes(start + b"\0\xff" * 50)
    with pytest.raises(TextError) as caught:
        resolve_text(str(tmp_path / "data"), split="calibration")
    assert str(caught.value) == f"This is {said}" and caught.value.code == "E-TEXT-ENC"
    (tmp_path / "data").write_text("GGUF is a format, PAR1 is another.")
    assert resolve_text(str(tmp_path / "data"), split="calibration").text.startswith("GGUF is")


REFUSED = {
    "Line 2": [{"text": "a"}, "not json"],
    "Line 1": ["[1, 2]"],
    "Document 2": [{"text": "a"}, {"other": "b"}],
    "its fields: url, title": [{"url": "a", "title": "b"}],
    "its fields: id": [{"id": 3}],
    "more than": [{"text": "a" * 2_000_001}],
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_wrong_is_named(named, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", REFUSED[named])
    with pytest.raises(TextError) as caught:
        read_documents(path, limit=2_000_000)
    assert named in str(caught.value) and len(str(caught.value)) <= 240 and str(tmp_path) not in str(caught.value)


def test_parquet_without_its_reader_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(TextError, match="pip install pyarrow"):
        resolve_text(str(tmp_path / "data.parquet"), split="calibration")


def test_parquet_gives_its_text(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"url": ["u", "v"], "text": ["One.", "Two."], "n": [1, 2]}
    parquet.write_table(arrow.table(rows), tmp_path / "data.parquet")
    assert read_documents(tmp_path / "data.parquet", limit=100) == "One.\n\nTwo."
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(TextError, match="bad.parquet cannot be read"):
        read_documents(tmp_path / "bad.parquet", limit=100)

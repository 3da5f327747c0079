"""The verb `sweep`: rows and a report for people, the same rows when it is run again, one line for a grid that cannot be used."""

from __future__ import annotations

import json

import pytest

from tests.app.cli_tools import document, refused

GRID = """
model: base
scheme: [W4A16, W4A4]
clusters: 4
calibration: text.txt
tokens: 512
window: 128
measure: {text: text.txt, tokens: 256, window: 128}
"""


def test_a_sweep_prints_its_rows_and_goes_on_from_them(call, place):
    (place / "grid.yaml").write_text(GRID)
    found = document(call, "sweep", "grid.yaml", "--out", "rows", "--html", "report.html")
    rows = [json.loads(line) for line in (place / "rows" / "rows.jsonl").read_text().splitlines()]
    assert found["done"] == 2 and found["failed"] == 0 and found["rows"] == rows
    assert (place / "report.html").read_text().count("<section>") >= 4
    code, out, _ = call("sweep", "grid.yaml", "--out", "rows")
    assert code == 0 and "2 of 2 recipes measured" in out and out.index("W4A16") < out.index("W4A4 "), "by divergence"
    assert "weights, cache" in out or out.count("weights") >= 3
    assert len((place / "rows" / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("model: [base", "E-PARAM-GRID", ("line 2",)),
        ("- model", "E-PARAM-GRID", ("table of fields",)),
        ("modell: base", "E-PARAM-GRID", ("modell", "scheme")),
        ("model: base\nscheme: W9A9", "E-PARAM-SCHEME", ("W9A9",)),
        ("model: base\nmeasure: {tokens: none}", "E-PARAM-TOKENS", ("none",)),
        ("!!python/object/apply:os.system [ls]", "E-PARAM-GRID", ("YAML",)),
        ("a: &a [x]\nmodel: *b", "E-PARAM-GRID", ("YAML",)),
    ],
)
def test_a_bad_grid_is_one_line(call, place, text, code, words):
    (place / "bad.yaml").write_text(text + "\n")
    refused(call("sweep", "bad.yaml", "--out", "bad-rows"), code, *words)
    assert not (place / "bad-rows").exists()


def test_other_bad_input_is_one_line(call, place):
    (place / "grid.yaml").write_text(GRID)
    refused(call("sweep", "none.yaml", "--out", "new"), "E-TEXT-NOTFOUND", "none.yaml")
    refused(call("sweep", "grid.yaml", "--out", "new", "--workers", "0"), "E-PARAM-WORKERS", "1 to 64")
    (place / "taken").mkdir()
    (place / "taken" / "notes.txt").write_text("mine")
    refused(call("sweep", "grid.yaml", "--out", "taken"), "E-PARAM-OUT", "taken")
    refused(call("sweep", "grid.yaml", "--out", "new", "--html", "nowhere/x.html"), "E-PARAM-HTML")

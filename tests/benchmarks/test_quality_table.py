"""The tables of quality: texts, the recipes of the ablation, and columns."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.quality_table import PROTOCOLS, ablations, evaluation_texts, markdown
from core.errors import InputError
from core.recipe import Calibration, RotationOptions


def test_quality_is_measured_on_c4_where_its_reader_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.quality_table.installed", lambda package: True)
    monkeypatch.setenv("QUANTSCOPE_DATA", str(tmp_path))
    with pytest.raises(InputError, match="set QUANTSCOPE_DATA"):
        evaluation_texts(PROTOCOLS["smollm2-135m"])
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "c4_validation_2k.parquet").touch()
    assert list(evaluation_texts(PROTOCOLS["smollm2-135m"])) == [PROTOCOLS["smollm2-135m"].text, "C4 validation"]


def test_ablations_turn_every_switch_off_alone():
    rows = ablations("m", Calibration())
    plain = dataclasses.asdict(rows[0].rotation)
    changed = [{n: v for n, v in dataclasses.asdict(row.rotation).items() if v != plain[n]} for row in rows if row.rotation]
    off = [change for change in changed if False in change.values()]
    assert off == [{entry.name: False} for entry in dataclasses.fields(RotationOptions) if entry.default is True]
    assert rows[-1].method == "rptq" and {row.tensor_bits for row in rows} == {rows[0].tensor_bits}
    assert len({row.hash for row in rows}) == len(rows)


def test_a_table_has_columns_for_every_text_and_the_seconds():
    measured = {"perplexity": 20.0, "perplexity_stderr": 1.0, "weight_bytes": 4 * 10**6, "kv_bytes_per_token": 1536}
    base = measured | {"elsewhere": {"C4 validation": measured | {"perplexity": 30.0}}}
    own = {"label": "ROTATION", "kld_mean": 0.25, "effective_weight_bits": 4.75, "quantize_seconds": 61.4}
    row = base | own | {"elsewhere": {"C4 validation": measured | {"perplexity": 12345.0, "kld_mean": 0.5}}}
    head, rule, *lines = (line.strip("|").split("|") for line in markdown({"base": base, "rows": {"a": row}}).splitlines())
    assert {len(head)} == {len(rule), *map(len, lines)} and head[5].strip() == "C4 validation: perplexity ±"
    assert [cell.strip() for cell in lines[1]] == [
        "ROTATION", "20.00 ± 1.00", "–", "0.2500", "–", "1.2e+04 ± 1.0e+00", "0.5000", "4.75", "4.0 MB", "1,536", "61"
    ]  # fmt: skip

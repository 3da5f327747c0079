"""What is kept of this processor's speed."""

from __future__ import annotations

import json

import pytest

from core import pace
from core.errors import InputError
from kernels import Backend
from tests.core.quant.linear.linear_tools import example


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Let this test measure 64 columns; list the measurements made."""
    made = []
    monkeypatch.delenv(pace.VARIABLE, raising=False)
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pace, "measure_least_columns", lambda: made.append(64) or 64)
    pace._measured.cache_clear()
    yield made
    pace._measured.cache_clear()


def test_it_is_measured_once_and_kept_for_other_processes(measured, tmp_path):
    assert pace.int8_columns() == pace.int8_columns() == 64
    pace._measured.cache_clear()  # as in another process
    assert pace.int8_columns() == 64 and measured == [64]


def test_another_machine_is_measured_anew(measured, monkeypatch):
    pace.int8_columns()
    monkeypatch.setattr(pace, "hardware", lambda: "another processor")
    assert pace.int8_columns() == 64 and len(measured) == 2


@pytest.mark.parametrize("damage", ["", "[1, 2", "[]", '{"x": "y"}', "\u00e9"])
def test_a_damaged_file_is_written_anew(measured, tmp_path, damage):
    path = tmp_path / "cache" / pace.FILE
    path.parent.mkdir()
    path.write_bytes(damage.encode("latin-1"))
    assert pace.int8_columns() == 64 and 64 in json.loads(path.read_text()).values()


def test_a_number_out_of_range_in_the_file_is_not_taken(measured, tmp_path):
    pace.int8_columns()
    path = tmp_path / "cache" / pace.FILE
    (key,) = json.loads(path.read_text())
    for bad in (0, -1, True, 2.5, 2**40):
        path.write_text(json.dumps({key: bad}))
        pace._measured.cache_clear()
        assert pace.int8_columns() == 64


def test_without_a_cache_it_holds_for_the_process(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "file" / "cache"))
    assert pace.int8_columns() == pace.int8_columns() == 64 and measured == [64]


@pytest.mark.parametrize("stated", ["0", "-3", "many", "1.5", "\u0663", "9" * 30])
def test_a_bad_setting_gets_one_sentence(monkeypatch, stated):
    monkeypatch.setenv(pace.VARIABLE, stated)
    with pytest.raises(InputError, match="give a number of columns") as caught:
        pace.int8_columns()
    assert caught.value.code == "E-PARAM-INT8-COLUMNS"


def test_layers_follow_the_measurement(monkeypatch):
    monkeypatch.setenv(pace.VARIABLE, "64")
    layer, *_ = example(128, clusters=(0, 64, 128))
    assert layer.choice.backend is Backend.INT8
    monkeypatch.setenv(pace.VARIABLE, "65")
    layer.set_backend(Backend.AUTO)
    assert layer.choice.backend is Backend.REFERENCE

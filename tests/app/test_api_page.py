"""The page of documentation about programs: its example runs, and the parts of links that it names are those that exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import gradio as gr

from app.page import Page
from app.tabs.link import PLACE
from benchmarks.visitors import served

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:7860"


def test_the_example_runs_as_it_stands(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert code.count("\n") <= 10 and ADDRESS in code
    said = io.StringIO()
    with served(tmp_path / "log.txt", QUANTSCOPE_CACHE=str(tmp_path / "cache")) as (address, _), contextlib.redirect_stdout(said):
        exec(code.replace(ADDRESS, address), {})  # noqa: S102 - the documentation's own lines
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", said.getvalue())]
    predicted, original, quantised, measured = numbers[-4:]
    assert 0 < predicted < 1 and 0 < measured < 1 and 10 < original < quantised < 200


def test_links_are_described_as_they_are(ctx):
    with gr.Blocks():
        names = {*PLACE, *Page(ctx).fields}
    told = TEXT[TEXT.index("**Links.**") : TEXT.index("**Reports.**")]
    assert set(re.findall(r"`(\w+)`", told)) == names

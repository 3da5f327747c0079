"""Memory projected to any size, in the page and in the command line: rows, sentences, charts, models by any name."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import gradio as gr
import pytest

from app import engine
from app.tabs.memory import Memory
from app.view import memory, plots_memory
from app.view import texts_memory as texts
from core.errors import InputError, ModelError
from core.evaluation.memory import PROJECTED, memory_grid
from core.evaluation.roofline import GPUS, PHASES, operators
from core.evaluation.shapes import SHAPES
from core.models.tiny import save_tiny
from tests.app.cli_tools import document
from tests.app.tools import valid

OPT = SHAPES["opt-66b"]


def test_a_grid_has_a_row_for_each_scheme_and_a_column_for_each_place():
    cells = memory_grid(OPT, ("W4A16", "W4A4"), (1, 64), (1000, 8192))
    headers, rows = memory.grid_rows(cells, "GB")
    assert headers == ["scheme", "1 × 1,000", "1 × 8k", "64 × 1,000", "64 × 8k"]
    assert [row[0] for row in rows] == ["W4A16", "W4A4"] and rows[1][4] == "354.2"
    assert memory.grid_rows(cells, "GiB")[1][1][4] == "329.9"


def test_the_claim_is_shown_beside_what_the_formula_gives():
    (said,) = memory.claims_of(OPT)
    assert "over 900 GB saved" in said and "1,269.8 GB to 342.1 GB, by 927.7 GB (864.0 GiB)" in said
    (said,) = memory.claims_of(SHAPES["opt-175b"])
    assert "80.5 %" in said and said.endswith("78.7 %.") and memory.claims_of(SHAPES["opt-13b"]) == []


def test_where_it_fits():
    (cell,) = memory_grid(SHAPES["llama-3-8b"], ("W4A4",), (1,), (2048,))
    rows = memory.fit_rows(SHAPES["llama-3-8b"], cell)
    by_gpu = {row[0]: row[2:4] for row in rows}
    assert memory.fits_caption(cell).startswith("W4A4, batch 1, 2,048 tokens: 4.") and len(rows) == len(GPUS)
    assert by_gpu["T4"][0] == f"fits, {100 * cell.total / 16e9:.0f} % of it" and int(by_gpu["T4"][1].replace(",", "")) > 100
    (large,) = memory_grid(OPT, ("W16A16",), (1,), (2048,))
    assert {row[0]: row[2:4] for row in memory.fit_rows(OPT, large)}["H100"] == ["needs 2 cards", "0"]


def test_operators_are_listed_with_their_sum():
    found = operators(OPT, PROJECTED["W4A4"], batch=4, sequence=2048, phase="decode")
    rows = memory.operator_rows(found, GPUS["H100"])
    assert [row[0] for row in rows] == ["qkv", "q kᵀ", "p v", "o", "up", "down", "head", "all"]
    assert {row[5] for row in rows[:-1]} == {"memory"}
    assert "tokens per second" in memory.speed_text(found, GPUS["H100"], phase="decode", batch=4, sequence=2048)


def test_charts_of_projections():
    cells = memory_grid(OPT, ("W4A4",), (1, 8), (2048, 3000))
    figure = plots_memory.memory_map(cells, cells[3], "GiB")
    valid(figure)
    heat, mark = figure["data"]
    assert (heat["x"], heat["y"], mark["x"], mark["y"]) == (["2k", "3,000"], ["1", "8"], ["3,000"], ["8"])
    assert heat["text"][1][1] == memory.in_unit(cells[3].total, "GiB", 3)
    bars = plots_memory.memory_bars(memory_grid(OPT, tuple(PROJECTED), (8,), (2048,)))
    valid(bars)
    assert bars["data"][0]["y"] == list(PROJECTED) and bars["data"][0]["x"][0] == pytest.approx(2 * 65.72, rel=0.001)
    for name, gpu in GPUS.items():
        for scheme in ("W16A16", "W4A4"):
            phases = {phase: operators(OPT, PROJECTED[scheme], batch=1, sequence=2048, phase=phase) for phase in PHASES}
            roof = plots_memory.roofline(phases, gpu, scheme)
            valid(roof)
            lines, points = roof["data"][:-2], roof["data"][-2:]
            assert len(lines) == (1 if scheme == "W16A16" else len({gpu.rate(b) for b in (16, 8, 4)})), name
            for trace, found in zip(points, phases.values(), strict=True):
                assert sorted(", ".join(filter(None, trace["text"])).split(", ")) == sorted(op.name for op in found)
                tops = [min(gpu.rate(op.bits), op.intensity * gpu.bandwidth) / 1e12 for op in found]
                assert trace["y"] == pytest.approx(tops), "every point lies on its roof"


@pytest.fixture
def session(ctx):
    return ctx.sessions.open()


@pytest.fixture
def panel(ctx, session):
    """The panel, and a function that projects what its fields hold, with changes by the attributes' names."""
    with gr.Blocks():
        own = Memory(ctx)
    values = {field: field.value for field in own.inputs - {ctx.key}} | {ctx.key: session.key}
    return own, lambda **changes: own.project(values | {getattr(own, name): value for name, value in changes.items()})


def test_the_panel_projects_what_is_chosen(panel, session, tmp_path):
    own, project = panel
    shown = project(size="opt-66b", batch=64, sequence=8192, unit="GiB")
    assert set(shown) == set(own.outputs) and "927.7 GB (864.0 GiB)" in shown[own.note]
    assert "needs 5 cards" in shown[own.fits] and ">329.9<" in shown[own.grid] and "NVIDIA H100" in shown[own.operators]
    assert shown[own.roof]["data"] != project(size="opt-66b", batch=64, sequence=8192, gpu="T4")[own.roof]["data"]
    with pytest.raises(InputError, match="No model is loaded"):
        project(size=texts.THIS_MODEL)
    folder = save_tiny(tmp_path / "model", "llama")
    assert project(size=str(folder))[own.bars]["data"][0]["x"][0] == pytest.approx(
        2 * engine.shape_of(str(folder), allow_local=True).parameters / 1e9
    )
    session.info = SimpleNamespace(
        **{"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96, "vocab": 259, "gated": True},
        **{"tied": True, "positions": 0, "experts": 0, "top_k": 0},
    )
    assert project(size=texts.THIS_MODEL)[own.bars]["data"][0]["x"][0] < 1e-3
    for bad in ({"scheme": "W9"}, {"unit": "TB"}, {"gpu": "H9"}, {"batch": 0}, {"sequence": 2.5}, {"size": ""}):
        with pytest.raises((InputError, ModelError)):
            project(**bad)


def test_a_space_reads_no_path_of_its_own(panel, ctx, tmp_path, monkeypatch):
    own, project = panel
    folder = save_tiny(tmp_path / "model", "llama")
    ctx.settings = SimpleNamespace(on_space=True)
    with pytest.raises(InputError, match="not known"):
        project(size=str(folder))


def test_the_command_prints_a_grid_in_both_units(call):
    argv = ["memory", "--model", "opt-66b", "--scheme", "all", "--batch", "1,64", "--seq", "2048,8192"]
    made = document(call, *argv)
    assert len(made["cells"]) == 7 * 4 and made["parameters"] == OPT.parameters and "927.7" in made["claims"][0]
    assert made["cells"][-1] == memory_grid(OPT, ("W3A3KV",), (64,), (8192,))[0].to_dict()
    code, out, err = call(*argv)
    assert code == 0 and err == "" and "GiB in all" in out and out.count("W4A3KV") >= 2 and "64 × 8k" in out


def test_the_command_prints_the_roofline_of_a_gpu(call):
    argv = ["memory", "--model", "llama-3-8b", "--scheme", "W4A16", "--batch", "1", "--seq", "4096"]
    made = document(call, *argv, "--gpu", "RTX 4090")
    assert made["cards"]["H100"] == 1 and made["gpu"]["bandwidth"] == 1008e9
    decode = made["roofline"]["decode"]
    assert decode["seconds"] == pytest.approx(sum(op["seconds"] for op in decode["operators"]))
    assert {op["bound"] for op in decode["operators"]} == {"memory"} and "roofline" not in document(call, *argv)
    code, out, _ = call(*argv, "--gpu", "RTX 4090")
    assert code == 0 and "prefill" in out and "needs" not in out.split("largest batch")[0] and json.dumps(made)


def test_the_panel_never_blocks_the_page(panel):
    """A model of the Hub may take seconds to answer: the handler is a plain function, which runs in a thread."""
    own, _ = panel
    assert not asyncio.iscoroutinefunction(own.project)

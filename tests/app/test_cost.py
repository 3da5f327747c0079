"""What the page says of a recipe's cost: bars, the sentence on its sources, the map, and bytes by formula against real ones."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import gradio as gr
import pytest

from app import engine
from app.session import Costs
from app.tabs.cost import Cost
from app.view import cost
from core.errors import InputError
from core.evaluation.describe import model_info
from core.evaluation.memory import kv_bytes_per_token, measured_parts
from core.probe.report import Measurement, Prediction, ProbeInfo
from core.recipe import Bits, QuantRecipe
from tests.app.tools import collect, quiet
from tests.core.tools import quantised

CELLS = {"layers.0.k": 0.02, "layers.2.down_in": 0.05, "layers.26.down_in": 0.03, "layers.1.qkv": 0.0}
PROBE = ProbeInfo("m", "sotu", 512, 256, 4, 0.0001, 1.0, 10)


def costs(total: float = 0.1, measured: float | None = None, estimated: tuple[str, ...] = ()) -> Costs:
    prediction = Prediction(CELLS, total, estimated, (), 0.0001, 0.01)
    found = None if measured is None else Measurement(measured, 0.01, 0.9, 0.0001, 0.1)
    return Costs(QuantRecipe("m"), PROBE, prediction, found)


def test_a_sentence_names_the_parts_that_cost_half():
    assert cost.blame(CELLS) == "50 % of the cost is MLP hidden of layer 2."
    assert cost.blame({**CELLS, "layers.2.down_in": 0.031}) == "75 % of the cost is MLP hidden of layers 2 and 26."
    even = {f"layers.{i}.{cell}": 1.0 for i in range(4) for cell in ("k", "v")}
    assert cost.blame(even) == "38 % of the cost is keys of layers 0 and 1 and values of layer 0."
    assert "costs nothing" in cost.blame({}) and "costs nothing" in cost.blame({"layers.0.k": 0.0})


def test_bars_lie_on_a_log_scale():
    assert [cost.place(x) for x in (0.0, 1e-5, 1e-2, 10.0, 1e9)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_the_card_says_what_limits_its_figures():
    size = (1e7, 1536.0)
    plain = cost.cost_card("a", costs(), None, size, None)
    assert "0.100 nats" in plain and "…" in plain and "10.0 MB" in plain
    assert "1.0 times" not in cost.cost_card("a", costs(measured=0.1), None, size, None)
    assert "2.0 times what was measured" in cost.cost_card("a", costs(measured=0.05), None, size, None)
    assert "trust the measurement" in cost.cost_card("a", costs(total=0.6), None, size, None)
    assert "1 of 4 parts" in cost.cost_card("a", costs(estimated=("layers.0.k",)), None, size, None)
    assert "&lt;b&gt;" in cost.cost_card("<b>", costs(), None, size, "<b>careful")


def test_the_map_has_a_row_for_each_part_and_measured_ones_count():
    measured = {"layers.0.k": Measurement(0.04, None, 0.9, 0.0001, 0.1)}
    (trace,) = cost.where_map(CELLS, measured, 27, revision="m")["data"]
    assert trace["y"] == ["keys", "MLP hidden"] and len(trace["z"][0]) == 27
    assert trace["z"][0][0] == pytest.approx(math.log10(0.04)) and trace["z"][0][1] is None
    assert "measured alone 0.0400" in trace["text"][0][0] and trace["customdata"][1][26] == "layers.26.down_in"
    assert cost.where_map({}, {}, 3, revision="m")["data"] == []


def test_the_note_compares_predicted_with_measured_parts():
    alone = {name: Measurement(2 * kld, None, 0.9, 0.0001, 0.1) for name, kld in CELLS.items()}
    said = cost.swaps_note(CELLS, alone, 0.0, Measurement(0.1, None, 0.9, 0.0001, 0.1))
    assert "0.500 at the median" in said and "swapped): 0 nats" in said and "at once: 2.00" in said
    assert "at once: not known" in cost.swaps_note(CELLS, {}, 0.0, None)


@pytest.fixture
def clicked(ctx, ranges):
    """Click a part of a recipe for a model with six layers: its place in the model, or the error."""
    with gr.Blocks():
        panel = Cost(ctx)
    session = ctx.sessions.open()
    session.ranges = ranges
    prediction = Prediction({"layers.4.down": 0.3, "layers.2.k": 0.1, "layers.0.softmax": 0.2}, 0.6, (), (), 0.0001, 0.01)

    def click(model=ranges.model, **data):
        session.costs = Costs(QuantRecipe(model), PROBE, prediction)
        panel.choose(session, gr.EventData(None, data))
        return session.selection.layer, session.selection.kind, session.selection.channel

    return click


@pytest.mark.parametrize(
    "data, site",
    [
        ({"custom": ["layers.2.k"]}, "layers.2.k"),
        ({"custom": ["layers.3.qkv"]}, "layers.3.attn_in"),
        ({"index": 0}, "layers.4.down_in"),
        ({"index": 2}, "layers.2.k"),
    ],
)
def test_a_part_leads_to_the_widest_channel_of_its_site(clicked, ranges, data, site):
    layer, kind, channel = clicked(**data)
    found = ranges.sites[site]
    widths = (found.high - found.low).tolist()
    assert f"layers.{layer}.{kind}" == site and widths[channel] == max(widths)


@pytest.mark.parametrize("data", [{"index": 1}, {"index": 9}, {"custom": ["layers.99.k"]}, {"custom": 3}, {"custom": [None]}, {}])
def test_a_part_without_channels_is_refused(clicked, data):
    with pytest.raises(InputError, match="no channels to show"):
        clicked(**data)


def test_a_part_of_another_model_is_refused(clicked):
    with pytest.raises(InputError, match="press Observe ranges"):
        clicked("other", index=0)


@pytest.mark.parametrize("architecture", ["llama", "opt", "smollm"])
@pytest.mark.parametrize("method, scheme", [("rtn", "W4A4KV"), ("rtn", "W3A3KV"), ("rtn", "W4A16"), ("rptq", "W4A8")])
def test_bytes_by_formula_are_those_of_the_tensors(architecture, method, scheme):
    made = quantised(architecture, method=method, scheme=scheme, weights="rtn")
    weights, cache = engine.recipe_bytes(model_info(made.base, 0.0), made.recipe)
    assert cache == kv_bytes_per_token(made.model)
    left_out = 0.04 if method == "rptq" else 0.02  # orders and the grids of activations, which real models hardly notice
    assert weights == pytest.approx(sum(measured_parts(made.model).values()), rel=left_out)


def test_what_a_run_takes_is_told_before_it(bench):
    ask = {"tokens": 2048, "window": 512, "owner": "me", "progress": quiet}
    said = cost.before_start(bench.estimate(QuantRecipe("fake"), **ask))
    for word in ("≈ 12 s", "≈ 4.0 s", "on 2,048 tokens", "≈ 1.00 GB", "900 MB without", "≈ 67.3 MB", "53.0 MB of it", "in 0.3 s"):
        assert word in said
    assert "It needs" not in said
    short = bench.estimate(QuantRecipe("fake", scheme="custom", bits=Bits(weights=2)), **ask)
    assert "needs 200 MB more memory than are free" in cost.before_start(short)
    assert "only loaded" in cost.before_start(replace(short, saved=True))


@pytest.fixture
def followed(ctx, bench, wait):
    """Follow recipes as the panel does: the methods that its job called, and its last updates by component."""
    with gr.Blocks():
        panel = Cost(ctx)
    session = ctx.sessions.open()
    session.info, session.tab = bench.load("fake", progress=quiet), "quantize"

    def follow(recipe):
        asked, inner = [], ctx.follow
        ctx.follow = lambda s, kind, steps: asked.extend(step.method for step in steps) or inner(s, kind, steps)

        async def gather():
            task = asyncio.create_task(collect(panel.follow(session, recipe)))
            return await task

        updates = wait(gather())
        ctx.follow = inner
        return asked, {name: value for update in updates for name, value in update.items()}, session, panel

    return follow


def test_the_estimate_comes_first_on_a_fresh_page_and_last_while_a_control_moves(followed):
    asked, shown, session, panel = followed(QuantRecipe("fake"))
    assert asked == ["estimate", "probe", "predict", "predict", "measure"] and "≈ 12 s" in shown[panel.before]
    assert session.costs.estimate.seconds == 12.0
    asked, shown, session, panel = followed(QuantRecipe("fake", scheme="W3A3KV"))
    assert asked == ["probe", "predict", "predict", "measure", "estimate"] and "50.4 MB" in shown[panel.before]
    asked, _, _, _ = followed(QuantRecipe("fake", scheme="W3A3KV"))
    assert asked == [], "everything is known"

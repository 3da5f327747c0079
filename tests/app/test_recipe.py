"""The page's fields make a recipe, and a recipe fills the fields; whatever is sent, a sentence comes back at worst."""

from __future__ import annotations

import gradio as gr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.context import Context
from app.session import SessionStore
from app.settings import Settings
from app.tabs import quantize, reorder, sidebar
from core.errors import QuantscopeError
from core.recipe import (
    BITNET_MODES,
    REORDER_OF,
    REORDERS,
    SCHEMES,
    BitNetOptions,
    Bits,
    Calibration,
    Clusters,
    DistillOptions,
    Overrides,
    PlusOptions,
    QuantRecipe,
    RotationOptions,
)


@pytest.fixture(scope="module")
def form():
    ctx = Context(Settings(model="fake"), None, SessionStore(seconds=60, capacity=10))
    with gr.Blocks():
        side = sidebar.Sidebar(ctx)
        with gr.Tabs():
            tab = quantize.Quantize(ctx, side)
    fields = {*side.source, *side.recipe, *tab.inputs}
    return side, tab, {field: field.value for field in fields}


def plain(updates):
    """What the fields then hold."""
    return {field: u.get("value") if isinstance(u, dict) else u for field, u in updates.items()}


@pytest.mark.parametrize(
    "recipe",
    [
        QuantRecipe("fake", clusters=Clusters.uniform(32)),
        QuantRecipe(
            "a/b", "main", method="rtn", scheme="W3A3KV", weights="rtn", variant="strict", clusters=Clusters(1, 2, 3, 4, 5)
        ),
        QuantRecipe("fake", method="rtn", weights="rtn", variant="matched", clusters=Clusters(9, 2, 3, 8, 7)),
        QuantRecipe("fake", scheme="W4A8", segments="aligned"),
        QuantRecipe("fake", order="shared"),
        QuantRecipe("fake", overrides=Overrides.parse("layers.7.k=3,layers.0-3.weights=8,layers.2.R5=64")),
        QuantRecipe("fake", scheme="custom", bits=Bits(weights=3, q=5, down_in=6)),
        QuantRecipe("fake", calibration=Calibration("sotu", 1024, 256), seed=5),
        QuantRecipe("fake", method="bitnet", calibration=Calibration("sotu", 1024, 256), seed=5),
        QuantRecipe("fake", method="rotation", variant="strict"),
        QuantRecipe("fake", plus=PlusOptions()),
        QuantRecipe("fake", variant="strict", plus=PlusOptions(False, True, False, True, 0, "q+o_in", "attn_in+mlp_in")),
        QuantRecipe("fake", method="rotation", distill=DistillOptions(40, 2048, 0.02, "sotu+wikitext2")),
        QuantRecipe("fake", method="rotation", rotation=RotationOptions(False, True, 64, False, False, "token", 0, False, False)),
        *(QuantRecipe("fake", method="bitnet", bitnet=BitNetOptions(mode, 0.25, 3, 8, 4)) for mode in BITNET_MODES),
    ],
)
def test_a_recipe_survives_the_form(form, recipe):
    side, tab, values = form
    assert tab.recipe(values | plain(side.fill(recipe) | tab.fill(recipe))) == recipe


def test_hidden_controls_do_not_change_a_ternary_recipe(form):
    side, tab, values = form
    filled = values | plain(side.fill(QuantRecipe("fake", method="bitnet")))
    moved = filled | {side.scheme: "custom", tab.variant: "official", tab.clusters["R1"]: 7, tab.bits["k"]: 2}
    assert tab.recipe(moved).hash == tab.recipe(filled).hash
    assert QuantRecipe.from_query(tab.recipe(filled).to_query(), default=QuantRecipe("x")).bitnet == BitNetOptions()


def test_accumulators_and_one_order_belong_to_rptq(form):
    side, tab, values = form
    chosen = values | {tab.segments: "pow2", tab.order: "shared"}
    own, other = (tab.recipe(chosen | {side.method: method}) for method in ("rptq", "rtn"))
    assert (own.segments, own.order) == ("pow2", "shared") and (other.segments, other.order) == ("exact", "layer")


def test_only_the_controls_of_the_method_are_shown(form):
    side, tab, _ = form
    for method in ("rptq", "rotation", "rtn", "bitnet"):
        shown = side.show(method) | tab.show(method)
        visible = {part for part, update in shown.items() if update["visible"]}
        grid = {side.grid, tab.grid, tab.folds, tab.tokens}
        own = {"bitnet": {side.ternary, tab.ternary}, "rtn": grid, "rotation": grid | {tab.rotation.fold}}
        assert visible == own.get(
            method, grid | {side.clusters, tab.cluster_fold, tab.plus.fold}
        )
    assert tab.show("rtn", "matched")[tab.cluster_fold]["visible"], "its groups are counted by the clusters"


@pytest.mark.parametrize("method", ["rptq", "rotation", "rtn"])
def test_variants_offered_are_those_of_the_method(form, method):
    side, tab, values = form
    for _, variant in sidebar.variant_choices(method):
        assert tab.recipe(values | {side.method: method, tab.variant: variant}).variant == variant
    names = {name for _, name in sidebar.variant_choices(method)}
    assert ("matched" in names) == (method == "rtn") and ("official" in names) == (method != "rotation")
    assert ("sorted" in names) == (method == "rptq")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_makes_a_recipe(form, scheme):
    side, tab, values = form
    assert tab.recipe(values | {side.scheme: scheme}).scheme == scheme


def test_pasted_text_is_marked_as_private_and_left_out_of_links(form):
    side, tab, values = form
    recipe = tab.recipe(values | {side.text: sidebar.PASTE, side.pasted: "dear diary " * 300})
    assert recipe.calibration.text.startswith("text:dear diary")
    assert "diary" not in recipe.to_query()


@pytest.mark.parametrize("text", ["/etc/passwd", "../x", "", None, ["sotu"], 3])
def test_only_offered_texts_are_read(form, text):
    side, tab, values = form
    with pytest.raises(QuantscopeError):
        tab.recipe(values | {side.text: text})


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=2),
    st.just({"a": 1}),
)


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(st.data())
def test_any_junk_is_refused_in_a_sentence(form, data):
    side, tab, values = form
    field = data.draw(st.sampled_from(sorted(values, key=lambda f: f._id)))
    values = values | {side.method: data.draw(st.sampled_from(["rptq", "bitnet"]))}
    try:
        recipe = tab.recipe(values | {field: data.draw(JUNK)})
    except QuantscopeError as error:
        assert 0 < len(str(error)) <= 240 and error.code.startswith("E-")
    else:
        assert isinstance(recipe.hash, str)


@pytest.mark.parametrize("g", range(1, reorder.MAX_CLUSTERS + 1))
def test_the_slider_fills_the_fields_by_the_rule_of_the_recipe(g):
    """What the fields R1 to R5 become, what tab 2 counts and what `--clusters g` means are one rule."""
    expected = Clusters.parse(str(g))
    assert list(reorder.spread(g, list(REORDERS)).values()) == [getattr(expected, name) for name in REORDERS]
    for kind, name in REORDER_OF.items():
        assert reorder.per_group(kind, Clusters.uniform(g)) == getattr(expected, name)


def test_a_half_goes_to_the_even_number():
    assert [Clusters.uniform(g).R2 for g in (1, 4, 20, 36, 52)] == [1, 1, 2, 4, 6]

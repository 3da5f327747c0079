"""What single layers have of their own: one syntax, one normal form, and a recipe for each layer."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.overrides import MAX_LAYERS, PLACES, WEIGHTS, Overrides
from core.recipe import INPUT_SITE, REORDERS, SITES, BitNetOptions, Bits, Clusters, QuantRecipe
from tests.core.recipe_tools import BIT, refused

LAYER = st.integers(0, MAX_LAYERS - 1)
ENTRY = st.one_of(
    st.tuples(LAYER, st.sampled_from([p for p in PLACES if p not in REORDERS]), BIT),
    st.tuples(LAYER, st.sampled_from(list(REORDERS)), st.integers(1, 65536)),
)
OVERRIDES = st.lists(ENTRY, max_size=30).map(lambda entries: Overrides(tuple(entries)))


@settings(max_examples=150, deadline=None)
@given(own=OVERRIDES)
def test_text_json_and_link_say_the_same(own):
    recipe = QuantRecipe("m", overrides=own)
    kept = recipe.overrides
    assert Overrides.parse(own.to_text()) == Overrides.parse(own.to_text("\n")) == own == Overrides.from_dict(own.to_dict())
    assert QuantRecipe.from_json(recipe.to_json()) == recipe == QuantRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert QuantRecipe.from_query(recipe.to_query(), default=QuantRecipe("q", overrides=own)) == recipe
    assert set(kept.entries) <= set(own.entries) and list(own.entries) == sorted(
        own.entries, key=lambda e: (e[0], PLACES.index(e[1]))
    )
    assert (recipe.hash == QuantRecipe("m").hash) == (not kept.entries)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers.7.k=3", {"layers.7.k": 3}),
        ("layers.7.R5=64 layers.7.softmax=16", {"layers.7.softmax": 16, "layers.7.R5": 64}),
        ("layers.1.weights=8", {f"layers.1.weights.{name}": 8 for name in INPUT_SITE}),
        ("layers.0-2.v=2,\nlayers.1.v=5", {"layers.0.v": 2, "layers.1.v": 5, "layers.2.v": 2}),
        ("layers.3=16", {f"layers.3.{place}": 16 for place in (*SITES, "softmax", *WEIGHTS)}),
        ("layers.3.weights=4, layers.3.weights.down=2", {f"layers.3.weights.{n}": 2 if n == "down" else 4 for n in INPUT_SITE}),
        (" ,, ", {}),
    ],
)
def test_what_is_written_is_meant(text, expected):
    assert Overrides.parse(text).to_dict() == expected


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("layers.1.k=3,layers.0.k=3,layers.2.k=3,layers.4.k=3", "layers.0-2.k=3,layers.4.k=3"),
        ("layers.0-9.weights=8", "layers.0-9.weights=8"),
        ("layers.5.weights.o=8,layers.5.weights.down=4", "layers.5.weights.down=4,layers.5.weights.o=8"),
    ],
)
def test_the_text_is_short(text, short):
    assert Overrides.parse(text).to_text() == short


BAD = """
layers.7 layers.7.k layers.7.k= layers.7.k=x layers.7.k=-3 layers.7.norm=4 k=3 layers.k=3 layers.-1.k=3 layers.3-1.k=3
layers.256.k=3 layers.0-99999.k=3 layers.٣.k=3 layers.7.k=9 layers.7.k=1 layers.7.weights.gate=4 layers.7.R6=3 layers.7.R1=0
layers.7.R1=65537 layers.7.k=3=4 layers.7.weights.=4 layers..k=3
"""


@pytest.mark.parametrize("text", [*BAD.split(), "x" * 500])
def test_what_does_not_fit_is_refused_in_a_sentence(text):
    error = refused(Overrides.parse, text)
    assert error.code in ("E-PARAM-OVERRIDES", "E-PARAM-BITS", "E-PARAM-CLUSTERS")
    assert text[:7] in str(error)


ODD = {"k": 3}, {"layers.7.k": "3"}, {"layers.7.k": 3.5}, {"layers.7.k": None}, {"layers.7.R1": True}, {"layers.7.R1": 1e9}


@pytest.mark.parametrize("data", [[], "layers.7.k=3", None, 3, *ODD])
def test_json_that_does_not_fit_is_refused(data):
    refused(QuantRecipe.from_dict, {"model": "m", "overrides": data})


def test_what_every_layer_has_is_left_out():
    recipe = QuantRecipe("m", overrides=Overrides.parse("layers.0-5.k=4,layers.2.v=3,layers.1.R1=32,layers.1.weights=4"))
    assert recipe.overrides.to_dict() == {"layers.2.v": 3}
    plain = QuantRecipe("m", overrides=Overrides.parse("layers.0-5.attn_in=8"))
    assert plain == QuantRecipe("m") and plain.hash == QuantRecipe("m").hash and "overrides" not in plain.to_json()
    strict = QuantRecipe("m", variant="strict", overrides=Overrides.parse("layers.0.attn_in=8,layers.1.attn_in=4"))
    assert strict.overrides.to_dict() == {"layers.0.attn_in": 8}


def test_each_layer_has_its_recipe():
    recipe = QuantRecipe("m", scheme="W4A4", overrides=Overrides.parse("layers.1.k=3,layers.1.weights.down=8,layers.2.R5=7"))
    assert recipe.for_layer(0) == QuantRecipe("m") and QuantRecipe("m").for_layer(9) == QuantRecipe("m")
    one, two = recipe.for_layer(1), recipe.for_layer(2)
    assert [one.tensor_bits.weight(name) for name in INPUT_SITE] == [4, 4, 4, 8] and one.tensor_bits.k == 3
    assert {s: one.tensor_bits.site(s) for s in SITES} == {s: recipe.tensor_bits.site(s) for s in SITES} | {"k": 3}
    assert two.clusters == Clusters(R5=7) and one.clusters == Clusters() and not two.overrides.entries
    assert asdict(two.tensor_bits) | {"weights": 4} == asdict(two.tensor_bits), "bits stay"
    assert recipe.all_bits == (recipe.tensor_bits, one.tensor_bits, two.tensor_bits)


def test_layers_must_exist():
    own = Overrides.parse("layers.2.k=3,layers.9.v=3")
    own.require_layers(10)
    error = refused(own.require_layers, 9, code="E-PARAM-OVERRIDES")
    assert "layers.9.v=3" in str(error) and "0 to 8" in str(error)


def test_methods_without_bits_of_layers_refuse_them():
    own = Overrides.parse("layers.7.k=3")
    assert "bitnet" in str(refused(QuantRecipe, "m", method="bitnet", overrides=own, code="E-PARAM-OVERRIDES"))
    assert "R5" in str(refused(QuantRecipe, "m", method="rtn", overrides=Overrides.parse("layers.7.R5=3")))
    assert QuantRecipe("m", method="rtn", overrides=own).overrides == own
    assert QuantRecipe("m", method="rtn", variant="matched", overrides=Overrides.parse("layers.7.R5=3")).overrides.layers == [7]


def test_links_of_another_recipe_drop_them():
    default = QuantRecipe("m", overrides=Overrides.parse("layers.7.k=3"))
    assert QuantRecipe.from_query("seed=1", default=default).overrides == default.overrides
    for query in ("model=q", "method=rtn", "scheme=W4A8", "method=bitnet"):
        assert not QuantRecipe.from_query(query, default=default).overrides.entries


def test_labels_name_them():
    recipe = QuantRecipe("m", overrides=Overrides.parse("layers.7.k=3,layers.8.k=5"))
    assert recipe.label() == "RPTQ · W4A4 (norm outputs 8, softmax 8), layers.7.k=3, layers.8.k=5 · g=32/4 · GPTQ"
    many = replace(recipe, overrides=Overrides(tuple((layer, "k", 3 + layer % 2) for layer in range(0, 40, 2))))
    assert len(many.label()) < 140 and "more" not in recipe.label()
    assert "and 3 more" in Overrides(tuple((layer, "k", 2 + layer % 2) for layer in range(6))).describe()
    floats = QuantRecipe("m", scheme="custom", bits=Bits(k=4), overrides=Overrides.parse("layers.1.weights.o=4"))
    assert floats.label().endswith("GPTQ") and QuantRecipe("m", scheme="custom", bits=Bits(k=4)).label().endswith("float weights")
    assert BitNetOptions().tensor_bits.weight("down") == 2

"""BitNet's options in a recipe: round trips, labels and bits, refusals."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import MAX_MESSAGE, InputError
from core.recipe import BITNET_MODES, BitNetOptions, QuantRecipe
from tests.core.recipe_tools import BIT

OPTIONS = st.builds(
    BitNetOptions, st.sampled_from(BITNET_MODES), st.floats(0.01, 1.0), st.sampled_from((2, 3, 4, 8, 16)), BIT, BIT
)


@given(OPTIONS)
def test_bitnet_options_round_trip(options):
    recipe = QuantRecipe("m", method="bitnet", bitnet=options)
    assert QuantRecipe.from_json(recipe.to_json()) == recipe
    assert QuantRecipe.from_query(recipe.to_query(), default=QuantRecipe("other")) == recipe
    assert QuantRecipe.from_query(recipe.to_query(), default=dataclasses.replace(recipe, bitnet=BitNetOptions())) == recipe


def test_bitnet_recipes_have_options_and_the_others_have_none():
    plain, recipe = QuantRecipe("m"), QuantRecipe("m", method="bitnet")
    assert recipe.bitnet == BitNetOptions("a4.8", 0.5, 16, 4, 16) and plain.bitnet is None
    assert "bitnet" not in plain.to_dict() and "bitnet" not in plain.to_query()
    assert recipe.hash != QuantRecipe("m", method="bitnet", bitnet=BitNetOptions(kv_bits=3)).hash
    with pytest.raises(InputError, match="leave them out") as caught:
        QuantRecipe("m", bitnet=BitNetOptions())
    assert caught.value.code == "E-PARAM-BITNET"
    assert QuantRecipe.from_query("method=rptq", default=recipe) == plain, "the options go with the method"
    assert QuantRecipe.from_query("seed=3", default=recipe).bitnet == recipe.bitnet


def test_bitnet_labels_and_bits():
    def recipe(**options) -> QuantRecipe:
        return QuantRecipe("m", method="bitnet", bitnet=BitNetOptions(**options))

    assert recipe().label() == "BITNET · a4.8" and recipe(mode="w1.58a8").label() == "BITNET · w1.58a8"
    assert recipe(kv_bits=3, q_bits=4).label() == "BITNET · a4.8 · KV 3 bits, first token 4 · Q 4 bits"
    assert recipe(kv_bits=4, keep=0.25).label() == "BITNET · a4.8 (keeps 0.25) · KV 4 bits"
    bits = recipe(kv_bits=3).tensor_bits
    assert (bits.weights, bits.attn_in, bits.o_in, bits.down_in, bits.k, bits.v, bits.q) == (2, 4, 8, 8, 3, 3, 16)
    assert recipe(mode="int4").tensor_bits.down_in == 4 and recipe(mode="w1.58a8").tensor_bits.attn_in == 8


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"mode": "fp"}, "E-PARAM-MODE"),
        ({"keep": 0}, "E-PARAM-KEEP"),
        ({"keep": 1.5}, "E-PARAM-KEEP"),
        ({"keep": True}, "E-PARAM-KEEP"),
        ({"keep": float("nan")}, "E-PARAM-KEEP"),
        ({"kv_bits": 1}, "E-PARAM-BITS"),
        ({"bos_bits": "4"}, "E-PARAM-BITS"),
        ({"other": 1}, "E-PARAM-BITNET"),
    ],
    ids=str,
)
def test_bitnet_options_that_do_not_fit(options, code):
    with pytest.raises(InputError) as caught:
        QuantRecipe.from_dict({"model": "m", "method": "bitnet", "bitnet": options})
    assert caught.value.code == code and len(str(caught.value)) < MAX_MESSAGE


@pytest.mark.parametrize("text", ["mode", "mode=a4.9", "keep=nan", "keep=x", "kv_bits=3.5", "colour=3", "=", "keep="])
def test_bitnet_queries_that_do_not_fit(text):
    with pytest.raises(InputError):
        QuantRecipe.from_query(f"method=bitnet&bitnet={text}", default=QuantRecipe("m"))


def test_modes_are_those_of_the_quantisers():
    from core.quant.dynamic import MODES

    assert set(BITNET_MODES) == set(MODES) - {"fp"}
    bits_of = {"int8": 8, "topk8": 8, "int4": 4, "int4x2": 4, "fp4": 4, "h-int8": 8, "h-int4": 4}
    for mode in BITNET_MODES:
        bits = QuantRecipe("m", method="bitnet", bitnet=BitNetOptions(mode, kv_bits=3, q_bits=8)).tensor_bits
        assert {site: bits.site(site) for site in MODES[mode]} == {site: bits_of[kind] for site, kind in MODES[mode].items()}
        assert (bits.weights, bits.q, bits.k, bits.v, bits.softmax) == (2, 8, 3, 3, 16)

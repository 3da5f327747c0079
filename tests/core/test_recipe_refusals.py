"""Every recipe that is not valid, from Python, JSON or a URL, is refused in one sentence with its code."""

from __future__ import annotations

import dataclasses
import math
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import MAX_MESSAGE, InputError
from core.recipe import (
    PER_CHANNEL,
    Bits,
    Calibration,
    Clusters,
    QuantRecipe,
)
from tests.core.recipe_tools import refused


@settings(max_examples=150, deadline=None)
@given(
    query=st.text(max_size=80)
    | st.lists(
        st.tuples(
            st.sampled_from(
                (
                    "model",
                    "revision",
                    "method",
                    "scheme",
                    "clusters",
                    "weights",
                    "variant",
                    "calibration",
                    "tokens",
                    "window",
                    "seed",
                    "bits",
                    "x",
                )
            ),
            st.text(max_size=12) | st.integers().map(str),
        ),
        max_size=6,
    ).map(urlencode)
)
def test_any_query_is_a_recipe_or_a_sentence(query):
    try:
        recipe = QuantRecipe.from_query(query, default=QuantRecipe("m"))
    except InputError as error:
        assert len(str(error)) <= MAX_MESSAGE and error.code.startswith("E-PARAM-")
    else:
        assert QuantRecipe.from_json(recipe.to_json()) == recipe


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    data=st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(QuantRecipe)] + ["other"]), JSON, max_size=5),
    model=st.booleans(),
)
def test_any_json_is_a_recipe_or_a_sentence(data, model):
    """Whatever is accepted works on: it has a hash, a label, a query, and survives both round trips."""
    data = data | {"model": "m"} if model else data
    try:
        recipe = QuantRecipe.from_dict(data)
    except InputError as error:
        assert len(str(error)) <= MAX_MESSAGE and error.code.startswith("E-PARAM-")
        return
    assert QuantRecipe.from_json(recipe.to_json()) == recipe and recipe.label() and recipe.to_query()
    assert all(
        isinstance(v, int) and not isinstance(v, bool)
        for v in (recipe.seed, recipe.calibration.tokens, recipe.calibration.window)
    )


@pytest.mark.parametrize(
    "text",
    ("", "{", "[]", "null", "3", '"x"', "[" * 100_000, '{"model": "m", "seed": NaN}', '{"model": "m", "seed": 1e999}'),
    ids=lambda t: t[:20],
)
def test_text_that_is_no_recipe(text):
    refused(QuantRecipe.from_json, text)


@pytest.mark.parametrize(
    "options, code",
    [
        ({"model": ""}, "E-PARAM-MODEL"),
        ({"model": "  "}, "E-PARAM-MODEL"),
        ({"model": None}, "E-PARAM-MODEL"),
        ({"model": 5}, "E-PARAM-MODEL"),
        ({"revision": 5}, "E-PARAM-REVISION"),
        ({"method": "gptq"}, "E-PARAM-METHOD"),
        ({"method": None}, "E-PARAM-METHOD"),
        ({"method": ["rptq"]}, "E-PARAM-METHOD"),
        ({"scheme": "W5A5"}, "E-PARAM-SCHEME"),
        ({"scheme": "w4a4"}, "E-PARAM-SCHEME"),
        ({"weights": "awq"}, "E-PARAM-WEIGHT-METHOD"),
        ({"variant": "best"}, "E-PARAM-VARIANT"),
        ({"seed": -1}, "E-PARAM-SEED"),
        ({"seed": 2**31}, "E-PARAM-SEED"),
        ({"seed": 0.5}, "E-PARAM-SEED"),
        ({"seed": True}, "E-PARAM-SEED"),
        ({"seed": "1"}, "E-PARAM-SEED"),
        ({"seed": math.nan}, "E-PARAM-SEED"),
        ({"scheme": "custom"}, "E-PARAM-BITS"),
        ({"bits": Bits()}, "E-PARAM-BITS"),
    ],
    ids=str,
)
def test_bad_recipes(options, code):
    refused(QuantRecipe, code=code, **({"model": "m"} | options))


@pytest.mark.parametrize(
    "make, options, code",
    [
        (Bits, {"weights": 1}, "E-PARAM-BITS"),
        (Bits, {"k": 9}, "E-PARAM-BITS"),
        (Bits, {"v": 32}, "E-PARAM-BITS"),
        (Bits, {"q": 4.0}, "E-PARAM-BITS"),
        (Bits, {"q": "4"}, "E-PARAM-BITS"),
        (Bits, {"softmax": True}, "E-PARAM-BITS"),
        (Bits, {"o_in": None}, "E-PARAM-BITS"),
        (Clusters, {"R1": 0}, "E-PARAM-CLUSTERS-OF-R1"),
        (Clusters, {"R5": PER_CHANNEL + 1}, "E-PARAM-CLUSTERS-OF-R5"),
        (Clusters, {"R2": 2.5}, "E-PARAM-CLUSTERS-OF-R2"),
        (Clusters, {"R3": True}, "E-PARAM-CLUSTERS-OF-R3"),
        (Clusters, {"R4": "32"}, "E-PARAM-CLUSTERS-OF-R4"),
        (Calibration, {"tokens": 100}, "E-PARAM-CALIBRATION-TOKENS"),
        (Calibration, {"tokens": 2**21}, "E-PARAM-CALIBRATION-TOKENS"),
        (Calibration, {"window": 7}, "E-PARAM-CALIBRATION-WINDOW"),
        (Calibration, {"window": 9000}, "E-PARAM-CALIBRATION-WINDOW"),
        (Calibration, {"window": math.inf}, "E-PARAM-CALIBRATION-WINDOW"),
        (Calibration, {"text": ""}, "E-PARAM-CALIBRATION"),
        (Calibration, {"text": 3}, "E-PARAM-CALIBRATION"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else getattr(v, "__name__", v),
)
def test_bad_parts(make, options, code):
    refused(make, code=code, **options)


@pytest.mark.parametrize(
    "data",
    [
        {"bits": 4},
        {"bits": {"x": 4}},
        {"clusters": None},
        {"clusters": [32]},
        {"clusters": {"R9": 1}},
        {"calibration": "sotu"},
        {"calibration": {"size": 1}},
        {"extra": 1},
        {"Model": "m"},
    ],
    ids=str,
)
def test_unknown_fields_are_named(data):
    refused(QuantRecipe.from_dict, {"model": "m"} | data)
    refused(QuantRecipe.from_dict, data.get("bits", 5))


def test_a_recipe_needs_a_model():
    refused(QuantRecipe.from_dict, {"scheme": "W4A4"}, code="E-PARAM-MODEL")


@pytest.mark.parametrize(
    "query, code",
    [
        ("scheme=W9A9", "E-PARAM-SCHEME"),
        ("seed=x", "E-PARAM-SEED"),
        ("seed=-1", "E-PARAM-SEED"),
        ("tokens=1e4", "E-PARAM-CALIBRATION-TOKENS"),
        ("window=%D9%A3", "E-PARAM-CALIBRATION-WINDOW"),
        ("clusters=R1", "E-PARAM-CLUSTERS"),
        ("bits=q", None),
        ("bits=q=99&scheme=custom", "E-PARAM-BITS"),
        ("scheme=custom", "E-PARAM-BITS"),
        ("bits=q=4", "E-PARAM-BITS"),
        ("&".join(f"a{i}=1" for i in range(200)), None),
        ("model=%20", "E-PARAM-MODEL"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_queries(query, code):
    refused(QuantRecipe.from_query, query, code=code, default=QuantRecipe("m"))

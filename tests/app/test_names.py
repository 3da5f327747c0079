"""Names of runs say what differs and nothing else; the full name says everything."""

from __future__ import annotations

from app.session import Run, Session
from app.view.names import full_name, names_of
from core.recipe import BitNetOptions, Bits, Calibration, Clusters, Overrides, PlusOptions, QuantRecipe

BASE = Run("m", "m")


def run(**changes):
    recipe = QuantRecipe("m", clusters=changes.pop("clusters", Clusters.uniform(32)), **changes)
    return Run(recipe.hash, recipe.label(), recipe)


def test_one_run_is_called_by_bits_and_clusters():
    assert names_of([BASE, run()]) == ["m", "W4A4 g32"]
    assert names_of([run(method="rtn", scheme="W4A8", weights="rtn")]) == ["RTN W4A8"]
    assert names_of([run(method="rtn", variant="matched", weights="gptq")]) == ["RTN matched W4A4 g32"]
    assert names_of([run(method="rotation")]) == ["Rotation W4A4 groups of 32"]
    assert names_of([run(plus=PlusOptions())]) == ["RPTQ+ W4A4 g32"]
    assert names_of([run(clusters=Clusters(7, 4, 4, 32, 32))]) == ["W4A4 g7/4/4/32/32"]
    assert names_of([run(clusters=Clusters.parse("channel"))]) == ["W4A4 per channel"]


def test_calibration_texts_tell_runs_apart():
    a, b = run(), run(calibration=Calibration("wikitext2"))
    assert names_of([a, b]) == ["W4A4 g32 · State of the Union", "W4A4 g32 · WikiText-2"]


def test_only_what_differs_among_runs_of_one_name_is_said():
    a, b, other = run(), run(seed=3), run(scheme="W4A8", seed=4)
    assert names_of([a, b, other]) == ["W4A4 g32 · seed 0", "W4A4 g32 · seed 3", "W4A8 g32"]
    assert names_of([a, run(weights="rtn")]) == ["W4A4 g32 · GPTQ weights", "W4A4 g32 · RTN weights"]


def test_names_are_never_equal():
    changes = [{}, {"seed": 1}, {"variant": "strict"}, {"segments": "pow2"}, {"order": "shared"}]
    changes += [{"calibration": Calibration("sotu", 1024)}]
    changes += [{"calibration": Calibration("text:one two three")}, {"calibration": Calibration("sotu", 8192, 256)}]
    names = names_of([run(**change) for change in changes])
    assert len(set(names)) == len(names) and all(len(name) < 100 for name in names)


def test_own_bits_are_told_from_the_nearest_scheme():
    bits = Bits(4, 8, 4, 4, 4, 8, 4, 8, 6)
    assert names_of([run(scheme="custom", bits=bits)]) == ["W4A4, MLP hidden 6 g32"]


def test_layers_of_their_own_are_named():
    one, other = (run(overrides=Overrides.parse(f"layers.7.k=3,layers.8.v={bits}")) for bits in (3, 5))
    assert names_of([run(overrides=Overrides.parse("layers.7.k=3"))]) == ["W4A4 g32, layers.7.k=3"]
    both = names_of([one, other])
    assert all(name.startswith("W4A4 g32, layers.7.k=3 and 1 more · ") for name in both) and both[1].endswith("layers.8.v=5")


def test_a_bitnet_run_says_what_it_is_worth():
    recipe = QuantRecipe("m", method="bitnet", bitnet=BitNetOptions("a4.8", kv_bits=3))
    label = f"{recipe.label()} · a4.8 simulated on a model that was not trained for it: expect noise"
    assert names_of([Run(recipe.hash, label, recipe)]) == ["BitNet a4.8 · KV 3 bits, first token 4 · expect noise"]


def test_models_are_named_where_there_are_several():
    other = QuantRecipe("owner/other")
    assert names_of([BASE, run(), Run(other.hash, other.label(), other)])[1:] == ["m · W4A4 g32", "owner/other · W4A4 g32"]
    assert names_of([Run("/a/b/model", "/a/b/model")]) == ["model"]


def test_a_visitors_name_stays():
    session = Session()
    mine = session.add_run(run())
    mine.name = "my best"
    assert session.title(mine) == "my best"
    assert (
        full_name(mine) == "m · RPTQ · W4A4 (norm outputs 8, softmax 8) · g=32/4 · GPTQ · 8,192 tokens of State of the Union "
        "in windows of 512, seed 0"
    )

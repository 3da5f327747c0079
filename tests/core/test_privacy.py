"""Private texts: no file holds one, and the model made from one is its owner's alone."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import QuantscopeError, TextError
from core.models.io import saved
from core.models.io.quantized import read_description
from core.privacy import is_public_text, owner_tag, text_record
from core.recipe import Calibration, QuantRecipe
from core.run import run
from core.storage import atomic_dir
from core.workbench import Workbench

LETTER = "Dear Wilhelmine, " + " ".join(f"number {i} comes after number {i - 1}." for i in range(1, 200))
SECRET = b"Wilhelmine"
SEEN = {"text": "text:" + LETTER, "tokens": 64, "window": 32}

pytestmark = pytest.mark.usefixtures("cache")


def recipe_of(folder: str, text: str = "text:" + LETTER) -> QuantRecipe:
    return QuantRecipe(folder, scheme="W4A8", weights="rtn", calibration=Calibration(text, 128, 32))


def refusal(call) -> tuple[str, str]:
    with pytest.raises(QuantscopeError) as caught:
        call()
    return caught.value.code, str(caught.value)


def test_no_file_and_no_report_holds_a_pasted_text(folder, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    recipe = recipe_of(folder)
    report = Workbench().quantize(recipe, owner="ann")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and all(SECRET not in path.read_bytes() for path in files)
    assert report.recipe["calibration"]["text"] == "pasted:sha256=" + hashlib.sha256(LETTER.encode()).hexdigest()
    ranges = Workbench().observe(folder, recipe.calibration, owner="ann")
    row = run(recipe, text="text:" + LETTER, tokens=64, window=32)
    assert SECRET.decode() not in repr((report, ranges, row)) + caplog.text
    assert recipe.hash == hashlib.sha256(recipe.to_json().encode()).hexdigest()[:16] and LETTER in recipe.to_json()


def test_a_private_model_is_readable_by_its_user_alone(folder, cache):
    place = Path(Workbench().quantize(recipe_of(folder), owner="ann").folder)
    assert place.parent == cache and place.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}
    public = Path(Workbench().quantize(recipe_of(folder, "sotu"), owner="ann").folder)
    assert public.stat().st_mode & 0o777 != 0o700 or os.umask(os.umask(0o022)) == 0o077


@pytest.mark.parametrize("text", ["pasted", "file"])
def test_another_owner_is_told_what_anybody_is_told_of_an_unknown_name(folder, tmp_path, text):
    spec = "text:" + LETTER
    if text == "file":
        (tmp_path / "letter.txt").write_text(LETTER)
        spec = str(tmp_path / "letter.txt")
    bench = Workbench()
    key, unknown = bench.quantize(recipe_of(folder, spec), owner="ann").key, "0123456789abcdef"
    for book in (bench, Workbench()):
        for owner in ("bob", None, "", owner_tag("ann")):
            for call in (
                lambda k, b=book, o=owner: b.load(k, owner=o),
                lambda k, b=book, o=owner: b.evaluate(k, owner=o, **SEEN),
                lambda k, b=book, o=owner: b.evaluate(folder, reference=k, owner=o, **SEEN),
                lambda k, b=book, o=owner: b.generate(k, "hello", owner=o, max_new_tokens=1),
                lambda k, b=book, o=owner: b.model(k, owner=o),
                lambda k, b=book, o=owner: b.quantize(QuantRecipe(k), owner=o),
            ):
                code, said = refusal(lambda c=call: c(key))
                assert (code, said.replace(key, unknown)) == refusal(lambda c=call: c(unknown))
        assert book.evaluate(key, owner="ann", **SEEN).key == key
    own = bench.quantize(recipe_of(folder, spec), owner="bob")
    assert own.key == key and Workbench().load(key, owner="bob").name == key, "an equal text of one's own is one's own model"


def test_a_model_of_a_public_text_is_anybodys(folder):
    bench = Workbench()
    key = bench.quantize(recipe_of(folder, "sotu"), owner="ann").key
    for book in (bench, Workbench()):
        assert {book.load(key, owner=owner).name for owner in ("ann", "bob", None)} == {key}


def test_forgetting_an_owner_removes_the_private_models_alone(folder, cache):
    bench = Workbench()
    key = bench.quantize(recipe_of(folder), owner="ann").key
    public = bench.quantize(recipe_of(folder, "sotu"), owner="ann").key
    bench.quantize(recipe_of(folder), owner="bob")
    bench.evaluate(folder, reference=key, owner="ann", **SEEN)
    bench.forget("ann")
    assert refusal(lambda: bench.load(key, owner="ann"))[0] == "E-MODEL-NOTFOUND" and len(list(cache.iterdir())) == 2
    assert bench.load(public, owner="ann").name == public and bench.load(key, owner="bob").name == key
    assert all(name[0][0] != key for name in bench._references)


def test_forgetting_an_owner_removes_hidden_states_of_private_texts(folder):
    bench = Workbench()
    for text, owner in (("text:" + LETTER, "ann"), ("sotu", "bob")):
        bench.observe(folder, recipe_of(folder, text).calibration, owner=owner)
        bench.evaluate(folder, reference=folder, owner=owner, text=text, tokens=256, window=64)
    kept = bench._passed.nbytes
    assert kept and bench._passed_private.nbytes and len(bench._references) == 2
    bench.forget("ann")
    assert bench._passed.nbytes == kept and not bench._passed_private.nbytes and len(bench._references) == 1


def test_folders_of_earlier_versions(folder, cache, tmp_path):
    """They held pasted texts and told no owners apart: those texts go, the models of files are the local user's."""
    (tmp_path / "letter.txt").write_text(LETTER)
    places = {}
    for name, text in (("pasted", "text:" + LETTER), ("file", str(tmp_path / "letter.txt")), ("public", "sotu")):
        recipe = recipe_of(folder, text)
        report = Workbench().quantize(recipe)
        old = cache / "-".join(Path(report.folder).name.split("-")[:3])
        files = {path.name: path.read_bytes() for path in Path(report.folder).iterdir() if path.name != "manifest.json"}
        facts = json.loads(files["quantscope.json"]) | {"recipe": recipe.to_dict()}
        saved.forget(None)
        with atomic_dir(old, replace=True) as stage:
            for file, content in (files | {"quantscope.json": json.dumps(facts).encode()}).items():
                (stage / file).write_bytes(content)
        places[name] = (recipe.hash, old)
    assert saved.find_saved(places["pasted"][0], "ann") is None, "not even before it is removed"
    bench = Workbench()
    assert not places["pasted"][1].exists()
    assert bench.load(places["file"][0]).name and bench.load(places["public"][0], owner="ann").name
    assert refusal(lambda: bench.load(places["file"][0], owner="ann"))[0] == "E-MODEL-NOTFOUND", "in memory it is private, too"


def test_a_record_of_a_pasted_text_says_what_is_missing(folder):
    report = Workbench().quantize(recipe_of(folder), owner="ann")
    again = QuantRecipe.from_dict(read_description(report.folder)["recipe"])
    with pytest.raises(TextError, match="paste the text again") as caught:
        Workbench().quantize(again, owner="ann")
    assert caught.value.code == "E-TEXT-PASTED"
    full = replace(again, calibration=replace(again.calibration, text="text:" + LETTER))
    assert full.hash == report.key, "with the text it is the recipe it was"


def test_every_public_method_of_the_workbench_takes_an_owner():
    methods = {name: m for name, m in inspect.getmembers(Workbench, inspect.isfunction) if not name.startswith("_")}
    assert len(methods) >= 12
    assert [name for name, m in methods.items() if "owner" not in inspect.signature(m).parameters] == ["rest"]  # for all owners


def test_what_is_public():
    private = ("text:sotu", "diary.txt", "/etc/hosts", "")
    assert is_public_text("sotu") and is_public_text("wikitext2") and not any(map(is_public_text, private))
    assert text_record("sotu") == "sotu" and text_record("/a/file") == "/a/file"
    assert len({owner_tag(o) for o in (None, "", "None", "ann")}) == 4

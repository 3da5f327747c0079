"""What a run takes, told before it: stages and their growth, bytes of real tensors, and the tensors that live at the peak."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core import stages
from core.errors import InputError, ModelError
from core.evaluation.describe import model_info
from core.evaluation.memory import kv_bytes_per_token, measured_parts, working_bytes
from core.evaluation.perplexity import Reference, hidden_windows, score
from core.evaluation.run_estimate import PASSES, Timing, added_bytes, estimate_run, measuring_bytes, time_layer, timed_recipe
from core.evaluation.shapes import SHAPES, shape_of_loaded
from core.methods import method
from core.methods.sequential import quantize_layers
from core.models.tiny import tiny_model
from core.recipe import Calibration, Overrides, QuantRecipe
from core.stages import quantize
from core.workbench import Workbench
from tests.core.tools import quantised, tiny, tokens

STAGES = ("observe", "cluster and plan", "weights", "propagate")
TIMING = Timing(dict(zip(STAGES, (0.5, 0.5, 1.0, 1.0), strict=True)), 500, *(1e-3, 2e-3, 0.125, 1000, 3e-3, 5e-3, 0.4))


def test_seconds_grow_with_layers_and_tokens_as_the_stages_do():
    shape, recipe = SHAPES["opt-125m"], QuantRecipe("m")
    one = estimate_run(shape, recipe, TIMING, (2, 500), (4, 500))
    assert one.stages == {"observe": 12.0, "cluster and plan": 6.0, "weights": 12.0, "propagate": 24.0}
    assert one.seconds == 54.0 and (one.tokens, one.compared) == (1000, 2000)
    two = estimate_run(replace(shape, layers=24), recipe, TIMING, (4, 500), (4, 500))
    assert two.stages == {"observe": 48.0, "cluster and plan": 12.0, "weights": 24.0, "propagate": 96.0}
    assert one.original_seconds == pytest.approx(2000 * (12e-3 + 3e-3))
    assert one.compare_seconds == pytest.approx(2000 * (12 * 3e-3 + 5e-3) + 12 * 0.125)


@pytest.mark.parametrize(
    "options", [{}, {"order": "shared"}, {"method": "rtn", "weights": "rtn"}, {"variant": "official"}, {"method": "bitnet"}]
)
def test_a_timed_layer_has_the_stages_of_a_run(options):
    loaded, recipe = tiny("llama"), QuantRecipe("tiny", **options)
    timing = time_layer(loaded.model, recipe, tokens(2, 64))
    _, _, seconds = quantize_layers(loaded.model, method(recipe.method), recipe, tokens(1, 16))
    assert set(timing.stages) == set(seconds) >= set(PASSES) and timing.tokens == 128
    assert min(*timing.stages.values(), timing.prepare, timing.score_token, timing.compare_token) >= 0
    assert timing.float_token > 0 and timing.seconds >= sum(timing.stages.values())


def test_one_window_is_enough_to_time():
    timing = time_layer(tiny("llama").model, QuantRecipe("tiny"), tokens(1, 16))
    assert timing.tokens == 16 and timing.stages["observe"] > 0


def test_the_timed_layer_is_one_without_bits_of_its_own():
    recipe = QuantRecipe("m", overrides=Overrides.parse("layers.1=16,layers.2.k=8"))
    assert timed_recipe(recipe, 4) == (3, QuantRecipe("m"))
    index, own = timed_recipe(recipe, 2)
    assert index == 0 and own == QuantRecipe("m")
    only = QuantRecipe("m", overrides=Overrides.parse("layers.0.k=8"))
    assert timed_recipe(only, 1)[1].tensor_bits.k == 8 and not timed_recipe(only, 1)[1].overrides.entries


@pytest.mark.parametrize("scheme", ["W4A4", "W4A3KV", "W4A16"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "smollm"])
def test_bytes_told_before_are_those_of_the_tensors(architecture, scheme):
    made = quantised(architecture, scheme=scheme, weights="rtn")
    shape = shape_of_loaded(model_info(made.base, 0.0))
    told = estimate_run(shape, made.recipe, TIMING, (1, 8), (1, 8))
    parts = measured_parts(made.model)
    assert sum(parts.values()) <= told.model_bytes <= 1.02 * sum(parts.values())
    assert told.packed_bytes == pytest.approx(parts["packed weights"] + parts["scales and zero points"], rel=0.1)
    assert told.kv_bytes_per_token == kv_bytes_per_token(made.model)


class Live(TorchDispatchMode):
    """Count the bytes of the tensors that live at once, from the first operation on: an independent count of the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, list[int]] = {}
        self.now = self.peak = 0

    def drop(self, place: int) -> None:
        entry = self.sizes[place]
        entry[1] -= 1
        if not entry[1]:
            self.now -= self.sizes.pop(place)[0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not torch.is_tensor(tensor):
                continue
            place = tensor.untyped_storage().data_ptr()
            if place in known and place not in self.sizes:
                continue  # a view of something that was there before
            entry = self.sizes.setdefault(place, [0, 0])
            if not entry[0]:
                entry[0] = tensor.untyped_storage().nbytes()
                self.now += entry[0]
            entry[1] += 1
            weakref.finalize(tensor, self.drop, place)
        self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize(
    ("windows", "options"),
    [*(((4, 128), o) for o in ({}, {"weights": "rtn"}, {"scheme": "W4A16"}, {"order": "shared"}, {"variant": "official"})),
     *(((48, 128), o) for o in ({"weights": "rtn"}, {"variant": "official"}, {"method": "bitnet"}))],
    ids=str,
)  # fmt: skip
def test_memory_told_before_is_that_of_the_living_tensors(options, windows):
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    loaded, recipe = tiny_model("llama", layers=3, **sizes), QuantRecipe("m", **options)
    shape = shape_of_loaded(model_info(loaded, 0.0))
    with Live() as live:
        made, _, _ = quantize_layers(loaded.model, method(recipe.method), recipe, tokens(*windows))
    assert added_bytes(shape, recipe, windows) == pytest.approx(live.peak, rel=0.25)
    text = tokens(2, 256)
    with Live() as measuring:
        hidden = hidden_windows(loaded.model, text)
        score(made, text, reference=Reference("", loaded.model.get_output_embeddings(), hidden))
    originals = {t.data_ptr() for t in loaded.model.decoder.outside().values()}
    both = (t for t in made.decoder.outside().values() if t.data_ptr() in originals)
    packed = sum(measured_parts(made).values()) - sum(t.nbytes for t in both)
    told = measuring_bytes(shape, recipe, (2, 256), working_bytes(made) // 3)
    assert told == pytest.approx(measuring.peak + packed, rel=0.25)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    return Workbench()


def test_a_layer_is_timed_once_for_a_model_and_its_settings(bench, monkeypatch):
    made = []
    monkeypatch.setattr("core.probe.bench.time_layer", lambda *a, **k: made.append(a[1]) or TIMING)
    recipe = QuantRecipe("quantscope-llama-6m", calibration=Calibration("sotu", 1024, 256))
    first = bench.estimate(recipe)
    more = bench.estimate(replace(recipe, calibration=Calibration("sotu", 2048, 256), seed=3), tokens=512)
    assert len(made) == 1 and more.stages["observe"] == 2 * first.stages["observe"] and more.compared == 512
    bench.estimate(replace(recipe, scheme="W3A3KV"))
    bench.estimate(replace(recipe, calibration=Calibration("sotu", 1024, 128)))
    assert len(made) == 3 and not first.saved
    with pytest.raises(InputError, match="layers"):
        bench.estimate(replace(recipe, overrides=Overrides.parse("layers.99.k=3")))


def test_a_run_that_was_made_before_is_only_loaded(bench):
    recipe = QuantRecipe("quantscope-llama-6m", method="rtn", weights="rtn", calibration=Calibration("sotu", 512, 256))
    assert not bench.estimate(recipe).saved
    report = bench.quantize(recipe)
    told = bench.estimate(recipe)
    assert told.saved and told.model_bytes == pytest.approx(report.weight_bytes, rel=0.01)
    with pytest.raises(ModelError, match="already quantised"):
        bench.estimate(QuantRecipe(report.folder))


def test_memory_that_is_missing_is_told():
    told = estimate_run(SHAPES["opt-125m"], QuantRecipe("m"), TIMING, (2, 500), (4, 500))
    assert told.lacking_bytes(measured=True) == max(0, max(told.added_bytes, told.measuring_bytes) - told.free_bytes)
    enough, short = (replace(told, free_bytes=told.added_bytes - less) for less in (0, 1))
    assert (enough.lacking_bytes(measured=False), short.lacking_bytes(measured=False)) == (0, 1)
    said = told.to_dict()
    assert said["peak_bytes"] == told.memory_bytes + told.added_bytes and said["measured_peak_bytes"] >= said["peak_bytes"]


def test_the_estimate_of_a_loaded_model_needs_no_workbench():
    loaded = tiny("llama")
    recipe = QuantRecipe("tiny", method="rtn", weights="rtn", calibration=Calibration("sotu", 64, 32))
    told = stages.estimate(loaded, recipe, tokens=64, window=32)
    _, report = quantize(loaded, recipe)
    assert set(told.stages) == set(report.stages) and told.compared == 64
    assert told.model_bytes == pytest.approx(report.weight_bytes, rel=0.05)

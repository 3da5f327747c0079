"""Scores of a model that runs layer by layer from its files are those of the model in memory, bit for bit."""

from __future__ import annotations

import weakref

import pytest

import core
from core.errors import InputError, ModelError
from core.models.io.layerwise import LayerReader
from core.models.io.quantized import SavedReader
from core.models.tiny import save_tiny
from tests.core.stream.stream_tools import TEXT, recipe_of

ASKED = {"text": TEXT, "tokens": 96, "window": 32}
OTHER = {"seconds", "tokens_per_second", "working_bytes"}


@pytest.fixture(scope="module", params=["llama", "opt", "gemma2"])
def pair(request, tmp_path_factory) -> tuple[str, str]:
    """A float model and its quantised form."""
    root = tmp_path_factory.mktemp(request.param)
    folder = save_tiny(root / "float", request.param, seed=3, layers=3)
    core.quantize_streamed(recipe_of(folder), root / "quantised")
    return str(folder), str(root / "quantised")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_are_those_in_memory(pair, backend):
    base, made = pair
    for model, reference in ((base, None), (made, None), (made, base), (base, made)):
        wanted = core.Workbench().evaluate(model, reference=reference, backend=backend, **ASKED).to_dict()
        found = core.evaluate_streamed(model, reference=reference, backend=backend, **ASKED).to_dict()
        assert {name for name in wanted if found[name] != wanted[name]} <= OTHER
        assert found["seconds"] > 0 and 0 <= found["working_bytes"] <= wanted["working_bytes"]


@pytest.mark.parametrize("reader", [LayerReader, SavedReader])
def test_one_layer_is_in_memory_at_a_time(pair, monkeypatch, reader):
    alive, most, read = [], [], reader.block

    def block(self, index):
        most.append(sum(one() is not None for one in alive))
        made = read(self, index)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(reader, "block", block)
    core.evaluate_streamed(pair[reader is SavedReader], **ASKED)
    assert most == [0, 0, 0]


def test_what_cannot_be_measured_is_refused(pair, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", vocab_size=300)
    with pytest.raises(InputError, match="another vocabulary"):
        core.evaluate_streamed(pair[0], reference=str(other), **ASKED)
    with pytest.raises(ModelError) as caught:
        core.evaluate_streamed("quantscope-bitnet-b1.58-6m", **ASKED)
    assert caught.value.code == "E-MODEL-STREAM"

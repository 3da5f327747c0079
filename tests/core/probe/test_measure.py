"""Measurements: the control is exactly 0, and a swap is what a pass with one changed cell gives."""

from __future__ import annotations

import pytest
import torch

from core.errors import InputError
from core.models.io.bitnet import save_bitnet
from core.models.io.load import load_model
from core.models.tiny import tiny_tokenizer, tiny_transformers
from core.probe.measure import measure, swap
from core.probe.predict import predict
from core.probe.probe import build_probe
from core.recipe import SITES, BitNetOptions, Bits, Clusters
from tests.core.probe.probe_tools import READ, bits_of, divergence, probed, recipe_of, statistics_of
from tests.core.tools import ARCHITECTURES

CARD = {"title": "Tiny", "description": "Random weights.", "licence": "Apache-2.0"}


@pytest.fixture(scope="module")
def ternary(tmp_path_factory):
    """A model trained for a4.8, with its probe."""
    folder = tmp_path_factory.mktemp("a48") / "m"
    save_bitnet(folder, tiny_transformers("bitnet"), tiny_tokenizer(), mode="a4.8", card=CARD)
    loaded = load_model(str(folder))
    return loaded, build_probe(loaded.model, READ)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_changing_nothing_gives_exactly_nothing(architecture):
    loaded, probe = probed(architecture)
    recipe = recipe_of()
    stats = statistics_of(loaded.model, recipe)
    for layer in (0, 1):
        found = swap(probe, loaded.model, stats, recipe, layer, None)
        assert (found.kld, found.stderr, found.same_top) == (0.0, 0.0, 1.0)
    nothing = recipe_of(scheme="custom", bits=Bits())
    assert measure(probe, loaded.model, statistics_of(loaded.model, nothing), nothing).kld == 0.0


def test_swaps_of_every_cell_are_measured_passes_of_that_cell():
    """In a model of one layer, where a recipe of one cell is a swap."""
    loaded, probe = probed("llama", layers=1)
    for cell in (*SITES, "softmax"):
        recipe = recipe_of(scheme="custom", bits=bits_of(cell, 4))
        stats = statistics_of(loaded.model, recipe)
        assert swap(probe, loaded.model, stats, recipe, 0, cell).kld == measure(probe, loaded.model, stats, recipe).kld > 1e-6


def test_a_swap_restarts_at_its_layer():
    """Against a whole pass through the model with one rounded site."""
    loaded, probe = probed("qwen3")
    recipe = recipe_of(clusters=Clusters(1, 1, 1, 1, 1))
    stats = statistics_of(loaded.model, recipe)
    found = swap(probe, loaded.model, stats, recipe, 1, "down_in")
    from core.probe.plans import Layer

    fake = Layer.of(loaded.model, 1, stats, recipe).change("down_in").sites["down_in"]

    class Rounded(torch.nn.Module):
        def forward(self, ids):
            with loaded.model.blocks[1].slots.fill({"down_in": fake}):
                return loaded.model(ids)

    assert found.kld == pytest.approx(divergence(loaded.model, Rounded(), READ), rel=1e-4)


def test_first_tokens_stay_in_float():
    loaded, _ = probed("llama")
    probe = build_probe(loaded.model, READ[:, :1])
    recipe = recipe_of(scheme="custom", bits=Bits(k=2, down_in=2))
    assert measure(probe, loaded.model, statistics_of(loaded.model, recipe), recipe).kld == 0.0


def test_cells_that_do_not_exist_are_refused():
    loaded, probe = probed("llama")
    recipe = recipe_of()
    with pytest.raises(InputError, match=r"layers\.5\.k does not exist"):
        swap(probe, loaded.model, statistics_of(loaded.model, recipe), recipe, 5, "k")
    with pytest.raises(InputError, match=r"layers\.5\.k does not exist"):
        swap(probe, loaded.model, statistics_of(loaded.model, recipe), recipe, 5, None)


def test_a_ternary_model_is_compared_with_what_it_computes(ternary):
    """Its own rules change nothing, exactly; others do, and a grid method replaces the quantisers at the sites."""
    loaded, probe = ternary
    with torch.no_grad():
        expected = loaded.model(READ).logits.log_softmax(-1).flatten(0, 1)
    assert float((probe.log_p - expected).abs().max()) < 1e-3
    own = recipe_of(method="bitnet", bitnet=BitNetOptions("a4.8"))
    stats = statistics_of(loaded.model, own)
    assert measure(probe, loaded.model, stats, own).kld == 0.0
    assert set(predict(probe, loaded.model, stats, own).cells.values()) == {0.0}
    for recipe in (recipe_of(method="bitnet", bitnet=BitNetOptions("w1.58a8", kv_bits=3)), recipe_of(scheme="W4A8")):
        stats = statistics_of(loaded.model, recipe)
        assert measure(probe, loaded.model, stats, recipe).kld > 1e-4
        assert predict(probe, loaded.model, stats, recipe).total > 1e-4

"""Kept hidden states: the same numbers with fewer layers computed, within the budget, and gone with their model."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from core.calibration.channel import channel_detail
from core.calibration.observe import observe_layers
from core.calibration.states import KeptStates
from core.models.tiny import tiny_model
from tests.core.tools import tokens

LAYERS = 6
PASS_BYTES = 64 * 4 * 2 * 16
"""What enters one layer of the tiny model: 2 windows of 16 tokens, 64 channels, float32."""


@pytest.fixture(scope="module")
def loaded():
    return tiny_model("llama", layers=LAYERS)


@pytest.fixture
def computed(loaded, monkeypatch):
    """Indices of the blocks that ran."""
    ran = []
    for index, block in enumerate(loaded.model.blocks):
        forward = type(block).forward

        def counted(*arguments, index=index, block=block, forward=forward, **named):
            ran.append(index)
            return forward(block, *arguments, **named)

        monkeypatch.setattr(block, "forward", counted)
    return ran


@pytest.mark.parametrize("budget", [LAYERS * PASS_BYTES, 2 * PASS_BYTES, 1])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_look_starts_at_the_nearest_kept_layer_and_gives_the_same_bits(loaded, computed, budget, layer):
    windows, states = tokens(2, 16), KeptStates(budget)
    expected = channel_detail(loaded, windows, f"layers.{layer}.mlp_in", 3)
    list(observe_layers(loaded.model, windows, states=states))
    computed.clear()
    assert channel_detail(loaded, windows, f"layers.{layer}.mlp_in", 3, states=states) == expected
    every = max(1, -(-LAYERS * PASS_BYTES // budget))
    assert computed == list(range(layer - layer % every, layer + 1))
    assert states.nbytes <= budget


def test_a_look_keeps_what_it_computes_for_the_next_one(loaded, computed):
    windows, states = tokens(2, 16), KeptStates()
    channel_detail(loaded, windows, "layers.4.down_in", 1, states=states)
    assert computed == [0, 1, 2, 3, 4]
    computed.clear()
    channel_detail(loaded, windows, "layers.5.down_in", 2, states=states)
    assert computed == [4, 5]


def test_the_oldest_text_goes_first_and_a_model_takes_its_states_along():
    states, first, second = KeptStates(100), nn.Linear(1, 1), nn.Linear(1, 1)
    texts = [torch.full((1, 4), value) for value in range(3)]
    for model, text in ((first, texts[0]), (first, texts[1]), (second, texts[2])):
        states.of(model, text, 2).keep(1, [torch.zeros(10)])  # 40 bytes each; 100 hold two
    assert states.of(first, texts[0], 2).nearest(2) is None
    assert states.of(first, texts[1], 2).nearest(2)[0] == 1 and states.nbytes == 80
    del second, model
    gc.collect()
    states.of(first, texts[0], 2)
    assert states.nbytes == 40


def test_texts_of_other_shape_are_other_texts():
    states, model = KeptStates(), nn.Linear(1, 1)
    states.of(model, torch.zeros(2, 4, dtype=torch.int64), 3).keep(1, [torch.zeros(4)])
    assert states.of(model, torch.zeros(4, 2, dtype=torch.int64), 3).nearest(2) is None

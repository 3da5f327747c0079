"""Parameters are counted once each, in float and low-bit layers, as transformers counts them."""

from __future__ import annotations

import pytest

from core.models.io.quantized import parameters_of
from core.models.tiny import tiny_model, tiny_transformers
from tests.core.tools import ARCHITECTURES, quantised


def test_parameters_of_counts_tied_weights_once():
    tied, untied = tiny_model("smollm"), tiny_model("llama")
    assert parameters_of(untied.model) - parameters_of(tied.model) == 259 * 64


def test_parameters_of_counts_the_weights_of_low_bit_layers():
    made = quantised("llama", scheme="W4A4")
    assert parameters_of(made.model) == parameters_of(made.base.model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_of_counts_what_transformers_counts(architecture):
    theirs = tiny_transformers(architecture)
    assert parameters_of(tiny_model(architecture).model) == sum(p.numel() for p in theirs.parameters())

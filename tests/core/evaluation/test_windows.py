"""Windows of models whose context is shorter than what is asked for: measured, quantised and observed at their own length."""

from __future__ import annotations

import pytest

from core.calibration.data import calibration_tokens, fit_window
from core.evaluation.windows import evaluation_windows
from core.models.tiny import tiny_model
from core.recipe import Calibration, QuantRecipe
from core.stages import evaluate, observe, quantize

TEXT = "text:" + "a few words and a number 123, " * 400


@pytest.fixture(scope="module")
def short():
    """A model that looks back on 64 tokens."""
    loaded = tiny_model("llama")
    loaded.model.config.max_position_embeddings = 64
    return loaded


def test_a_short_context_is_measured_in_windows_of_its_context(short):
    parts, source = evaluation_windows(short, TEXT, tokens=512, window=512)
    assert parts.shape == (8, 64)
    found = evaluate(short, parts, source)
    assert found.window == 64 and found.tokens == 512
    assert "8 non-overlapping windows of 64 tokens, the model's whole context," in found.protocol
    other = evaluate(short, parts[:, :32], source)
    assert "whole context" not in other.protocol


def test_a_short_context_is_observed_and_quantised(short):
    calibration = Calibration(TEXT, 1024, 512)
    windows, _ = calibration_tokens(short, calibration, 0, True)
    assert windows.shape == (16, 64)
    assert observe(short, calibration).window == 64
    recipe = QuantRecipe(short.name, calibration=calibration, weights="rtn")
    _, report = quantize(short, recipe)
    assert "in 16 windows of 64" in report.calibration and recipe.calibration.window == 512


def test_a_window_that_fits_stays(short):
    assert [fit_window(short, n) for n in (8, 64, 65)] == [8, 64, 64]

"""Training configurations: what is refused before anything runs, which types are taken, and the files of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import InputError, QuantscopeError
from tests.training.train_tools import tiny
from training.config import TrainConfig

ROOT = Path(__file__).parents[2]
PLACE = Path("anywhere")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mode": "w2"}, "w2"),
        ({"hidden": 33}, "divide"),
        ({"lr": [1e-3]}, "two numbers"),
        ({"tokens": 64}, "warm-up"),
        ({"architecture": "opt"}, "only bitnet"),
        ({"lr": [float("nan"), 1]}, "finite"),
        ({"switch": 1.5}, "from 0 to 1"),
        ({"texts": []}, "pairs"),
        ({"hiden": 64}, "Did you mean hidden"),
        ({"batch": 0}, "whole number"),
        ({"keep": 0}, "keep"),
        ({"resume_optimizer": True}, "init_from"),
        ({"precision": "fp8"}, "bf16"),
        ({"switch_mode": "a5"}, "a5"),
        ({"inputs": {"down_in": "x"}}, "down_in"),
        ({"kv_heads": 3}, "divide"),
        ({"texts": [["sotu", 0]]}, "pairs"),
    ],
)
def test_bad_configurations_are_refused(change, word):
    with pytest.raises(InputError, match=word) as caught:
        TrainConfig.from_dict(tiny(PLACE).to_dict() | change)
    assert isinstance(caught.value, QuantscopeError) and len(str(caught.value)) <= 240


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"inputs": ["a"]}, "INPUTS"),
        ({"inputs": None}, "INPUTS"),
        ({"clip": [1, 2]}, "CLIP"),
        ({"clip": "1"}, "CLIP"),
        ({"end_lr": None}, "END_LR"),
        ({"keep": None}, "KEEP"),
        ({"keep": [0.5, 0.2]}, "KEEP"),
        ({"switch": [0.5, 0.6]}, "SWITCH"),
        ({"restart_lr": True}, "RESTART_LR"),
        ({"keep_at": None}, "KEEP_AT"),
        ({"lr": [10**400, 1]}, "LR"),
        ({"init_from": 5}, "INIT_FROM"),
        ({"init_from": " "}, "INIT_FROM"),
        ({"hidden": 32.5}, "HIDDEN"),
        ({"hidden": "32"}, "HIDDEN"),
        ({"init_from": "a", "resume_optimizer": "no"}, "RESUME_OPTIMIZER"),
        ({"resume_optimizer": 1}, "RESUME_OPTIMIZER"),
    ],
)
def test_a_field_of_another_type_is_refused(change, code):
    with pytest.raises(InputError) as caught:
        TrainConfig.from_dict(tiny(PLACE).to_dict() | change)
    assert caught.value.code == f"E-PARAM-{code}" and len(str(caught.value)) < 240


def test_whole_numbers_written_as_floats_become_integers():
    """JSON has one type of number: 1e4 tokens, a width of 32.0."""
    config = TrainConfig.from_dict(tiny(PLACE).to_dict() | {"tokens": 1e4, "batch": 2.0, "seq": 32.0, "hidden": 32.0})
    assert config == tiny(PLACE, tokens=10_000) and config.steps == 156
    assert {type(getattr(config, name)) for name in ("tokens", "batch", "seq", "hidden", "steps")} == {int}
    assert config.build_model().config.hidden_size == 32


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"ffn": 66}, "FFN"),
        ({"hidden": 42, "heads": 3}, "HIDDEN"),
        ({"hidden": 36, "heads": 6, "kv_heads": 1}, "KV_HEADS"),
        ({"mode": "fp", "switch": 0.5, "ffn": 66}, "FFN"),
    ],
    ids=str,
)
def test_ternary_projections_must_fit_the_packed_format(change, code):
    """Four rows share a byte: what export would refuse after the training is refused before it."""
    fields = tiny(PLACE).to_dict() | {"kv_heads": None} | change
    with pytest.raises(InputError, match="multiple of 4") as caught:
        TrainConfig.from_dict(fields)
    assert caught.value.code == f"E-PARAM-{code}"
    assert TrainConfig.from_dict(fields | {"mode": "fp", "switch": None}).mode == "fp", "a float model is not packed"


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").rglob("*.json")), ids=lambda p: p.stem)
def test_the_configurations_of_the_repository_are_valid(path):
    config = TrainConfig.read(path)
    assert config.name == path.stem and config.steps > 5 * config.warmup


def test_json_and_toml_say_the_same(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "x", "architecture": "llama", "lr": [0.001, 0.001], "tokens": 2000000}')
    (tmp_path / "a.toml").write_text('name = "x"\narchitecture = "llama"\nlr = [0.001, 0.001]\ntokens = 2_000_000\n')
    assert TrainConfig.read(tmp_path / "a.json") == TrainConfig.read(tmp_path / "a.toml")

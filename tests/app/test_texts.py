"""The page's words: complete, short where they must be, and the settings that come from outside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from app.settings import REAL_WORKBENCH, SPACE_FILE_BYTES, Settings
from app.tabs.sidebar import scheme_choices
from app.view import texts, texts_divergence
from app.worker.environment import worker_environment
from core.errors import InputError
from core.models.io.bundle import MAX_BUNDLE_BYTES
from core.probe.plans import CELLS
from core.quant.dynamic import INPUT_KINDS
from core.recipe import BITNET_MODES, METHODS, REORDERS, SCHEMES, SITES, VARIANTS, WEIGHT_METHODS, Bits, QuantRecipe
from core.report import Sparsity


def test_every_choice_has_words():
    assert set(texts.SITE_LABELS) == set(texts.SITE_HELP) == set(SITES)
    assert set(texts.METHODS) == set(METHODS)
    assert set(texts.VARIANTS) == set(VARIANTS)
    assert set(texts.BITNET_MODES) == set(BITNET_MODES)
    assert set(texts.INPUT_KINDS) == {"fp", *INPUT_KINDS}
    assert set(texts.PROJECTION_INPUTS) < set(SITES)
    assert set(texts.PROJECTION_LABELS) < set(Sparsity.__dataclass_fields__)
    assert set(texts.WEIGHT_METHODS) == set(WEIGHT_METHODS)
    assert set(texts.BIT_LABELS) == set(Bits.__dataclass_fields__)
    assert set(texts.CLUSTER_LABELS) == set(REORDERS)
    assert set(texts_divergence.WHERE_ROWS) == set(CELLS)


def test_schemes_fit_their_field_and_say_below_it_what_stays_wider():
    labels = {name: label for label, name in scheme_choices()}
    assert set(labels) == {*SCHEMES, "custom"} and max(map(len, labels.values())) <= 20
    wider = [name for name in SCHEMES if "norm outputs" in QuantRecipe("model", scheme=name).describe_bits()]
    assert wider == ["W4A4"] and "W4A4 keeps norm outputs and softmax at 8 bits" in texts.SCHEME_INFO


def test_every_text_is_used():
    names = {node.targets[0].id for node in ast.parse(Path(texts.__file__).read_text()).body if isinstance(node, ast.Assign)}
    source = "".join(p.read_text() for p in Path(texts.__file__).parents[1].rglob("*.py") if p.name != "texts.py")
    own = Path(texts.__file__).read_text()
    assert not {n for n in names if f"texts.{n}" not in source and own.count(n) < 2}


def test_settings_come_from_the_environment():
    chosen = Settings.read(
        {"QUANTSCOPE_MODEL": "a/b", "SPACE_ID": "x/y", "QUANTSCOPE_WORKER_GB": "4", "QUANTSCOPE_JOB_MINUTES": "2"}
    )
    assert (chosen.model, chosen.on_space, chosen.memory_bytes, chosen.job_seconds) == ("a/b", True, 4 * 1024**3, 120.0)
    assert Settings.read({}, model="m").model == "m"
    assert Settings.read({}).workbench == REAL_WORKBENCH


def test_settings_left_out_have_defaults():
    chosen = Settings.read({"QUANTSCOPE_WORKER_GB": "0", "QUANTSCOPE_JOB_MINUTES": ""})
    assert (chosen.memory_bytes, chosen.job_seconds, chosen.session_seconds) == (None, 3600.0, 1800.0)


def test_the_largest_file_is_what_the_environment_says_and_what_core_can_pack():
    assert Settings.read({}).file_bytes == MAX_BUNDLE_BYTES and Settings.read({"SPACE_ID": "x/y"}).file_bytes == SPACE_FILE_BYTES
    assert Settings.read({"QUANTSCOPE_FILE_MB": "20", "SPACE_ID": "x/y"}).file_bytes == 20_000_000
    for value in ("0", "2001", "0.0000001"):
        with pytest.raises(InputError, match="QUANTSCOPE_FILE_MB"):
            Settings.read({"QUANTSCOPE_FILE_MB": value})


def test_models_run_where_the_environment_says():
    assert Settings.read({}).device == "cpu" and Settings.read({"QUANTSCOPE_DEVICE": "cuda:1"}).device == "cuda:1"
    assert worker_environment(Settings.read({"QUANTSCOPE_DEVICE": "cuda"}), {})["QUANTSCOPE_DEVICE"] == "cuda"
    with pytest.raises(InputError, match="QUANTSCOPE_DEVICE"):
        Settings.read({"QUANTSCOPE_DEVICE": "gpu"})


@pytest.mark.parametrize("name", ["QUANTSCOPE_WORKER_GB", "QUANTSCOPE_JOB_MINUTES", "QUANTSCOPE_SESSION_MINUTES"])
@pytest.mark.parametrize("value", ["4GB", "-3", "nan", "inf"])
def test_a_setting_that_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=name):
        Settings.read({name: value})

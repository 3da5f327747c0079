"""BitNet folders that cannot be read or written are refused in one sentence; stray files are not opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import InputError, ModelError
from core.models.io.bitnet import SHARD_BYTES, save_bitnet
from core.models.io.load import load_model
from core.storage import atomic_dir
from tests.core.models.io.bitnet_tools import CARD, IDS, write
from tests.core.tools import tiny_source


def test_what_cannot_be_written_is_refused(tmp_path):
    loaded = tiny_source("bitnet", intermediate_size=90)
    with pytest.raises(InputError, match="90 rows"):
        save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="a4.8", card=CARD)
    with pytest.raises(InputError, match="a4.9"):
        save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="a4.9", card=CARD)
    with pytest.raises(InputError, match="licence"):
        save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="fp", card={"title": "x"})
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "state.json"])
def test_only_an_earlier_model_is_replaced(tmp_path, name):
    """A folder of somebody's own, and one that Quantscope wrote for another purpose."""
    loaded, folder = tiny_source("bitnet"), tmp_path / "m"
    with atomic_dir(folder) as stage:
        (stage / name).write_text("kept")
    if name == "thesis.txt":
        (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="choose a new or empty folder") as caught:
        save_bitnet(folder, loaded.model, loaded.tokenizer, mode="a4.8", card=CARD)
    assert caught.value.code == "E-PARAM-OUT" and (folder / name).read_text() == "kept"
    (tmp_path / "n").mkdir()
    for mode in ("a4.8", "w1.58a8"):
        save_bitnet(tmp_path / "n", loaded.model, loaded.tokenizer, mode=mode, card=CARD)
    assert json.loads((tmp_path / "n/config.json").read_text())["quantscope"]["mode"] == "w1.58a8"



@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("stray", ["other weights", "junk", "link"])
def test_files_beside_the_checked_ones_are_not_opened(tmp_path, monkeypatch, shards, stray):
    """A tensor comes from the file that the preflight checked, whatever else the folder holds."""
    monkeypatch.setattr("core.models.io.bitnet.SHARD_BYTES", 50_000 if shards else SHARD_BYTES)
    folder = write(tmp_path / "m", "saved", tiny_source("bitnet"))
    assert (folder / "model.safetensors").exists() != shards
    expected = load_model(str(folder)).model(IDS).logits
    file = folder / "stray.safetensors"
    if stray == "other weights":
        save_file({"model.norm.weight": torch.full((tiny_source("bitnet").model.config.hidden_size,), 7.0)}, file)
    elif stray == "junk":
        file.write_bytes(b"junk")
    else:
        (tmp_path / "outside").write_bytes(b"junk")
        file.symlink_to(tmp_path / "outside")
    assert torch.equal(load_model(str(folder)).model(IDS).logits, expected)


def test_an_unknown_activation_is_one_sentence(tmp_path):
    folder = write(tmp_path / "m", "saved", tiny_source("bitnet"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "foo"}))
    with pytest.raises(ModelError, match="unknown activation 'foo'"):
        load_model(str(folder))


def damage(folder: Path, change) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors")
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


GATE = "model.layers.1.mlp.gate_proj.weight"
FAULTS = {
    "only zeros": ("only zeros", lambda s: s[GATE].fill_(0b01010101)),
    "code 3": ("code 3", lambda s: s[GATE].view(-1)[5].fill_(0b11000000)),
    "no scale": ("weight_scale is missing", lambda s: s.pop(GATE + "_scale")),
    "negative scale": ("not one positive", lambda s: s[GATE + "_scale"].neg_()),
    "NaN scale": ("NaN", lambda s: s[GATE + "_scale"].fill_(float("nan"))),
    "shape": ("another shape", lambda s: s.update({GATE: s[GATE][:4]})),
    "norm": ("another size", lambda s: s.update({"model.layers.0.mlp.ffn_sub_norm.weight": torch.ones(7)})),
    "left over": ("do not belong", lambda s: s.update({"model.layers.0.mlp.bias": torch.ones(7)})),
    "left over outside": ("do not belong", lambda s: s.update({"model.extra": torch.ones(7)})),
    "no final norm": ("are missing", lambda s: s.pop("model.norm.weight")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_weights_are_one_sentence(tmp_path, fault):
    expected, change = FAULTS[fault]
    folder = damage(write(tmp_path / "m", "saved", tiny_source("bitnet")), change)
    with pytest.raises(ModelError, match=expected) as caught:
        load_model(str(folder))
    assert 30 < len(str(caught.value)) < 240 and "\n" not in str(caught.value)


def test_masters_of_zeros_are_refused(tmp_path):
    folder = damage(write(tmp_path / "m", "online", tiny_source("bitnet")), lambda s: s[GATE].zero_())
    with pytest.raises(ModelError, match="owner/name@commit"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"use_rms_norm": True},
        {"linear_class": "other"},
        {"quantization_mode": "sometimes"},
        {"linear_class": "bitlinear", "quantization_mode": "online"},
        {"modules_to_not_convert": ["model.layers.0.mlp.down_proj"]},
        {"modules_to_not_convert": {"lm_head": 1}},
    ],
    ids=str,
)
def test_variants_that_are_not_read(tmp_path, change):
    with pytest.raises(ModelError, match="variant"):
        load_model(str(write(tmp_path / "m", "online", tiny_source("bitnet"), **change)))


@pytest.mark.parametrize(
    "entry", [{"mode": "a4.9"}, {"mode": "a4.8", "keep": 0}, {"mode": "a4.8", "keep": "half"}, [], {"mode": {}}], ids=str
)
def test_an_own_entry_that_is_not_understood(tmp_path, entry):
    folder = write(tmp_path / "m", "quantscope masters", tiny_source("bitnet"))
    config = json.loads((folder / "config.json").read_text()) | {"quantscope": entry}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantscope"):
        load_model(str(folder))


def test_other_quantised_models_are_still_refused(tmp_path):
    folder = write(tmp_path / "m", "online", tiny_source("bitnet"), quant_method="gptq")
    with pytest.raises(ModelError, match="This is a GPTQ checkpoint"):
        load_model(str(folder))

"""A corpus of malformed model folders: each refused with its code, in words, with little work, and never run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import ModelError
from core.models.io.preflight.config import check_config, refuse_code
from core.models.io.preflight.folder import check_folder, read_safetensors_header
from tests.core.models.io.malformed import LLAMA, TENSORS, float_header, good_safetensors, safetensors_bytes, write_folder
from tests.core.tools import few_calls

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(call, *arguments) -> ModelError:
    """The ModelError of a call that must fail after little work and say so in at most 240 characters."""
    with few_calls(100_000), pytest.raises(ModelError) as caught:
        call(*arguments)
    assert caught.value.code.startswith("E-MODEL-") and 20 < len(str(caught.value)) <= 240
    return caught.value


def test_a_good_folder_passes_and_reports_its_tensors(tmp_path):
    report = check_folder(write_folder(tmp_path / "m"))
    assert {name: tensor.shape for name, tensor in report.tensors.items()} == TENSORS
    assert report.parameters == 144 and report.config["model_type"] == "llama"


def test_what_the_library_writes_passes(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b.c": torch.ones(0, 4), "d": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_safetensors_header(tmp_path / "x.safetensors")
    assert {info.file for info in header.values()} == {"x.safetensors"}
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        "a": ("BF16", (3, 5)), "b.c": ("F32", (0, 4)), "d": ("F32", ())}


def entry(**changes: object) -> dict:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def duplicate_key() -> bytes:
    raw = json.dumps(entry()).encode()
    return safetensors_bytes(raw[:-1] + b"," + raw[1:], bytes(8))


HEADER = float_header(TENSORS)[0]
MALFORMED = {
    "empty": (b"", "CUT"),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "CUT"),
    "only a length": (safetensors_bytes(b""), "CUT"),
    "text": (b"this is not a model at all, just text", "BAD"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "BAD"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "CUT"),
    "header too long": (safetensors_bytes(b"{}", length=3_000_000), "BAD"),
    "header past 2**63": (safetensors_bytes(b"{}", length=2**64 - 1), "BAD"),
    "header past the end": (safetensors_bytes(b"{}", length=100), "CUT"),
    "header not json": (safetensors_bytes(b"{hello}"), "BAD"),
    "header not utf-8": (safetensors_bytes(b'{"\xff": 1}'), "BAD"),
    "header deep": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "BAD"),
    "duplicate": (duplicate_key(), "BAD"),
    "no entry": (safetensors_bytes({"t": 3}), "BAD"),
    "extra field": (safetensors_bytes(entry(more=1), bytes(8)), "BAD"),
    "type unknown": (safetensors_bytes(entry(dtype="C64"), bytes(8)), "BAD"),
    "type a list": (safetensors_bytes(entry(dtype=["F32"]), bytes(8)), "BAD"),
    "shape negative": (safetensors_bytes(entry(shape=[-2]), bytes(8)), "BAD"),
    "shape true": (safetensors_bytes(entry(shape=[True, 2]), bytes(8)), "BAD"),
    "shape float": (safetensors_bytes(entry(shape=[2.0]), bytes(8)), "BAD"),
    "shape overflow": (safetensors_bytes(entry(shape=[2**63, 2**63])), "BAD"),
    "shape of 9": (safetensors_bytes(entry(shape=[1] * 8 + [2]), bytes(8)), "BAD"),
    "shape other": (safetensors_bytes(entry(shape=[3]), bytes(8)), "BAD"),
    "offsets reversed": (safetensors_bytes(entry(data_offsets=[8, 0]), bytes(8)), "BAD"),
    "offsets three": (safetensors_bytes(entry(data_offsets=[0, 8, 8]), bytes(8)), "BAD"),
    "offset hole": (safetensors_bytes(entry(data_offsets=[4, 12]), bytes(12)), "BAD"),
    "overlap": (safetensors_bytes(entry() | {"u": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
                "BAD"),
    "infinite": (safetensors_bytes(b'{"t": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', bytes(8)),
                 "BAD"),
    "nan": (safetensors_bytes(b'{"t": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)), "BAD"),
    "name empty": (safetensors_bytes({"": entry()["t"]}, bytes(8)), "BAD"),
    "name endless": (safetensors_bytes({"x" * 300: entry()["t"]}, bytes(8)), "BAD"),
    "name a path": (safetensors_bytes({"../../x": entry()["t"]}, bytes(8)), "BAD"),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}} | entry(), bytes(8)), "BAD"),
    "data cut": (safetensors_bytes(HEADER, bytes(500)), "CUT"),
    "tail": (good_safetensors() + b"x", "BAD"),
    "20,001 tensors": (safetensors_bytes(float_header({f"t{n}": () for n in range(20_001)})[0], bytes(80_004)), "BAD"),
    "other layers": (good_safetensors(TENSORS | {"model.layers.1.x": (1,)}), "BAD"),
    "layers absent": (good_safetensors({"model.embed_tokens.weight": (10, 8)}), "MISSING"),
    "other vocabulary": (good_safetensors(TENSORS | {"model.embed_tokens.weight": (11, 8)}), "BAD"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_weights_are_refused(tmp_path, name):
    weights, code = MALFORMED[name]
    assert refused(check_folder, write_folder(tmp_path, weights=weights)).code == f"E-MODEL-{code}"


def test_a_cut_file_says_how_much_is_there(tmp_path):
    shapes = TENSORS | {"model.layers.0.x": (1000, 1000)}
    error = refused(check_folder, write_folder(tmp_path, weights=good_safetensors(shapes)[:3_000_000]))
    assert "3.0 of 4.0 MB" in str(error)


@FUZZ
@given(data=st.data())
def test_mutated_weights_pass_or_are_refused(tmp_path, data):
    raw = bytearray(good_safetensors())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[:data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with contextlib.suppress(ModelError):
        read_safetensors_header(path)


def test_a_huge_header_costs_little_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(b"{" + b" " * 1000, length=2**40))
    with open(path, "r+b") as file:
        file.truncate(2**33)  # sparse
    tracemalloc.start()
    refused(read_safetensors_header, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(path: Path, protocol: int) -> bytes:
    return pickle.dumps({"model.embed_tokens.weight": Canary(path)}, protocol=protocol)


def zipped(path: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(path, 2))
    return buffer.getvalue()


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "model.npy", "tf_model.h5"])
def test_pickled_weights_are_refused_unread(tmp_path, file_name):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / file_name).write_bytes(pickled(tmp_path / "canary", 4))
    error = refused(check_folder, folder)
    assert error.code == "E-MODEL-PICKLE" and file_name in str(error)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
def test_a_pickle_called_safetensors_is_refused_unread(tmp_path, protocol):
    raw = zipped(tmp_path / "canary") if protocol == "zip" else pickled(tmp_path / "canary", protocol)
    error = refused(check_folder, write_folder(tmp_path / "m", weights=raw + bytes(64)))
    assert error.code == "E-MODEL-PICKLE" and not (tmp_path / "canary").exists()
    pickle.loads(pickled(tmp_path / "canary", 4))  # the canary does sing when it is loaded
    assert (tmp_path / "canary").exists()


def sharded(folder: Path, weight_map: object) -> Path:
    write_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_through_the_index(tmp_path):
    folder = sharded(tmp_path, dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors"))
    assert check_folder(folder).parameters == 144


def test_shards_of_too_many_tensors_are_refused(tmp_path, monkeypatch):
    folder = sharded(tmp_path, dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors"))
    monkeypatch.setattr("core.models.io.preflight.folder.MAX_TENSORS", len(TENSORS) - 1)
    assert "at most" in str(refused(check_folder, folder))


@pytest.mark.parametrize(("weight_map", "code"), [
    ({"x": "../../../etc/hostname"}, "BAD"),
    ({"x": "/etc/hostname"}, "BAD"),
    ({"x": "/proc/self/environ"}, "BAD"),
    ({"x": "..safetensors"}, "BAD"),
    ({"x": "sub/model.safetensors"}, "BAD"),
    ({"x": "model\n.safetensors"}, "BAD"),
    ({"x": 3}, "BAD"),
    ({"x": "pytorch_model-00001-of-00002.bin"}, "PICKLE"),
    ({"x": "model-00002-of-00002.safetensors"}, "MISSING"),
    ({}, "BAD"),
    (None, "BAD"),
    (["x"], "BAD"),
    ({"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}, "BAD"),
    (dict.fromkeys([*TENSORS, "more"], "model-00001-of-00001.safetensors"), "BAD"),
    ({f"t{n}": f"model-{n}.safetensors" for n in range(1001)}, "BAD"),
])
def test_an_index_cannot_lead_elsewhere(tmp_path, weight_map, code):
    assert refused(check_folder, sharded(tmp_path, weight_map)).code == f"E-MODEL-{code}"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_links_out_of_the_folder_and_pipes_are_not_opened(tmp_path, name):
    folder = write_folder(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/hostname")
    assert refused(check_folder, folder).code == "E-MODEL-BAD"
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    assert refused(check_folder, folder).code == "E-MODEL-BAD"


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot = write_folder(tmp_path / "models--a--b" / "snapshots" / "0123")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    check_folder(snapshot)


@pytest.mark.parametrize(("change", "code"), [
    ({"num_hidden_layers": 200_000}, "SIZE"),
    ({"hidden_size": 10**9}, "SIZE"),
    ({"vocab_size": 10**7}, "SIZE"),
    ({"num_labels": 10**9}, "SIZE"),
    ({"intermediate_size": 10**9}, "SIZE"),
    ({"num_hidden_layers": 0}, "BAD"),
    ({"num_hidden_layers": -1}, "BAD"),
    ({"num_hidden_layers": True}, "BAD"),
    ({"num_hidden_layers": "2"}, "BAD"),
    ({"num_hidden_layers": 1.0}, "BAD"),
    ({"num_hidden_layers": None}, "BAD"),
    ({"num_attention_heads": 0}, "BAD"),
    ({"num_attention_heads": 3}, "BAD"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "BAD"),
    ({"head_dim": -8}, "BAD"),
    ({"text_config": {"num_hidden_layers": 10**6}}, "SIZE"),
    ({"list": [{"vocab_size": 0}]}, "BAD"),
    ({"layer_types": ["full_attention"] * 30_000}, "BAD"),
    ({"model_type": None}, "BAD"),
    ({"model_type": ["llama"]}, "BAD"),
    ({"quantization_config": {"quant_method": "hqq"}}, "BAD"),
    ({"auto_map": {"AutoModel": "modeling.Model"}}, "CODE"),
    ({"text_config": {"vision": [{"auto_map": {"AutoConfig": "a/b--c.D"}}]}}, "CODE"),
    ({"trust_remote_code": True}, "CODE"),
    ({"_attn_implementation": "somebody/kernel"}, "CODE"),
    ({"text_config": {"attn_implementation": "somebody/kernel@main"}}, "CODE"),
])
def test_configurations_beyond_the_bounds_are_refused(change, code):
    check_config(LLAMA)
    assert refused(check_config, LLAMA | change).code == f"E-MODEL-{code}"


def test_a_config_too_deep_is_refused():
    deep: dict = {}
    for _ in range(50):
        deep = {"a": deep}
    assert refused(refuse_code, deep).code == "E-MODEL-BAD"


@pytest.mark.parametrize(("raw", "code"), [
    (b"", "BAD"), (b"[]", "BAD"), (b"null", "BAD"), (b'{"a": NaN}', "BAD"), (b'{"a": 1e999}', "BAD"),
    (b'{"a": 1, "a": 2}', "BAD"), (b"[" * 100_000, "BAD"), (b'{"a": ' + b"9" * 5000 + b"}", "BAD"),
    (b"\xff\xfe{\0}\0", "BAD"), (b" " * 2_000_000, "SIZE")])
def test_unreadable_configurations_are_refused(tmp_path, raw, code):
    folder = write_folder(tmp_path)
    (folder / "config.json").write_bytes(raw)
    assert refused(check_folder, folder).code == f"E-MODEL-{code}"


@FUZZ
@given(config=st.dictionaries(
    st.sampled_from([*LLAMA, "head_dim", "num_labels", "auto_map", "text_config", "quantization_config"]),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers()),
              st.dictionaries(st.sampled_from(["hidden_size", "auto_map"]), st.integers())), max_size=6))
def test_any_configuration_is_accepted_or_refused_in_words(config):
    try:
        check_config(LLAMA | config)
    except ModelError as error:
        assert len(str(error)) <= 240


@pytest.mark.parametrize(("name", "size"), [("tokenizer.json", 65 * 10**6), ("chat_template.jinja", 2 * 2**20),
                                            ("merges.txt", 65 * 10**6), ("generation_config.json", 2 * 2**20)])
def test_side_files_have_a_size_limit(tmp_path, name, size):
    folder = write_folder(tmp_path)
    with open(folder / name, "wb") as file:
        file.truncate(size)
    assert refused(check_folder, folder).code == "E-MODEL-SIZE"


def test_a_tokenizer_with_its_own_code_is_refused(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.Tok", null]}}')
    assert refused(check_folder, folder).code == "E-MODEL-CODE"


@pytest.mark.parametrize(("change", "code", "said"), [
    (lambda folder: (folder / "model.safetensors").unlink(), "MISSING", "no model.safetensors"),
    (lambda folder: (folder / "config.json").unlink(), "MISSING", "config.json is missing"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "BAD", "LoRA"),
])
def test_incomplete_folders_say_what_is_missing(tmp_path, change, code, said):
    folder = write_folder(tmp_path)
    change(folder)
    error = refused(check_folder, folder)
    assert error.code == f"E-MODEL-{code}" and said in str(error)
    assert refused(check_folder, tmp_path / "none").code == "E-MODEL-NOTFOUND"

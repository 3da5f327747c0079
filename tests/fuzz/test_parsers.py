"""Every parser of what strangers bring: any input is taken or refused with one sentence, within its time, and never a fault.

    pytest tests/fuzz             a fast part, the same inputs every time
    python -m tests.fuzz 300000   that many inputs in all, others every time (QUANTSCOPE_FUZZ: examples of each test)
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.cli import __main__ as cli
from app.cli.sweep import read_grid
from app.door.bodies import FILE, MANY, ONE, Events
from app.door.rules import Names, Refusal, check_headers, check_route
from app.door.visitor import address_of, browser_of
from app.endpoints import checked, recipe_of
from core.calibration.data import read_text_file
from core.errors import QuantscopeError
from core.models.io.bundle import unpack
from core.models.io.preflight.config import check_config
from core.models.io.preflight.folder import check_folder, read_safetensors_header, strict_json
from core.models.io.preflight.gguf import read_gguf_header
from core.models.io.preflight.tokenizer import check_settings, check_tokenizer
from core.recipe import Calibration, QuantRecipe
from core.storage import read_manifest, verify
from core.sweep.grid import Grid
from tests.core.models.io.malformed import LLAMA, gguf_bytes, good_safetensors, write_folder
from training.config import TrainConfig

COUNT = int(os.environ.get("QUANTSCOPE_FUZZ", 0))
MOST_SECONDS = 10.0
FUZZ = settings(
    max_examples=COUNT or 60,
    derandomize=not COUNT,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = st.sampled_from([2**63, -1, 1e308, "", "../x"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | ODD
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
EVENTS = Events({0: [ONE, MANY], 1: [FILE]})
TRIED = SimpleNamespace(count=0, longest=0.0)
"""Inputs so far, and the longest processor time of one in seconds."""


def taken_or_refused(call: Callable, *arguments: object) -> None:
    """Call a parser: it may refuse with one sentence, in time, and may do nothing else but take what it is given."""
    start = time.process_time()
    try:
        call(*arguments)
    except (QuantscopeError, Refusal) as refused:
        sentence = str(refused)
        assert 10 < len(sentence) <= 240 and "\n" not in sentence and "Traceback" not in sentence
    note_try(start)


def note_try(start: float) -> None:
    """Count an input that was taken or refused; it must have been in time."""
    seconds = time.process_time() - start
    TRIED.count, TRIED.longest = TRIED.count + 1, max(TRIED.longest, seconds)
    assert seconds < MOST_SECONDS


def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """A good file with some bytes changed, cut off, or repeated."""

    def apply(changes: list[tuple[int, int]], cut: int, repeat: int) -> bytes:
        raw = bytearray(good)
        for place, value in changes:
            raw[place % len(raw)] = value
        return bytes(raw[: len(raw) - cut % len(raw)] + raw[:repeat])

    changes = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=6)
    return st.builds(apply, changes, st.just(0) | st.integers(0, len(good) - 1), st.just(0) | st.integers(0, 200))


def edited(good: dict) -> st.SearchStrategy[dict]:
    """A good JSON object with some of its values, or further ones, of any form."""
    keys = st.sampled_from(sorted(good)) | st.text(max_size=12)
    return st.dictionaries(keys, JSON, max_size=4).map(lambda changes: {**good, **changes})


RECIPE = json.loads(QuantRecipe("owner/name").to_json())


@FUZZ
@given(edited(RECIPE) | JSON, st.text(max_size=200))
def test_recipes(value, text):
    taken_or_refused(QuantRecipe.from_json, json.dumps(value))
    taken_or_refused(QuantRecipe.from_json, text)


@FUZZ
@given(st.text(max_size=200), st.dictionaries(st.sampled_from(sorted(RECIPE)), st.text(max_size=20), max_size=6))
def test_links(text, fields):
    default = QuantRecipe("owner/name")
    taken_or_refused(lambda: QuantRecipe.from_query(text, default=default))
    taken_or_refused(lambda: QuantRecipe.from_query("&".join(f"{k}={v}" for k, v in fields.items()), default=default))


@FUZZ
@given(edited({"data": ["k", []], "fn_index": 0, "session_hash": "a"}) | JSON, st.binary(max_size=300))
def test_events_of_the_page(value, raw):
    taken_or_refused(lambda: asyncio.run(EVENTS.check(json.dumps(value).encode())))
    taken_or_refused(lambda: asyncio.run(EVENTS.check(raw)))


@FUZZ
@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80), st.binary(max_size=300))
def test_heads_of_requests(first, second, third, raw):
    names = Names.of("page.example")
    taken_or_refused(names.check_host, first)
    taken_or_refused(lambda: names.check_origin(first, second, third, is_page=False))
    taken_or_refused(check_route, "GET", "/" + first)
    taken_or_refused(check_headers, [(raw[:9], raw)])
    assert browser_of(first) == "" or len(browser_of(first)) == 43
    assert len(address_of(first, second, behind_proxy=True)) <= 60


@FUZZ
@given(edited(LLAMA) | JSON)
def test_configurations(value):
    if isinstance(value, dict):
        taken_or_refused(check_config, value)
    taken_or_refused(strict_json, json.dumps(value).encode(), "config.json")


@FUZZ
@given(edited({"model": {"vocab": {"a": 0}}, "added_tokens": [], "normalizer": {"type": "NFC"}}))
def test_tokenizers(value):
    taken_or_refused(check_tokenizer, value)
    taken_or_refused(check_settings, value, "tokenizer_config.json")


@FUZZ
@given(raw=mutated(good_safetensors()) | st.binary(max_size=200))
def test_safetensors(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    taken_or_refused(read_safetensors_header, tmp_path / "model.safetensors")


@FUZZ
@given(raw=mutated(gguf_bytes()) | st.binary(max_size=200).map(lambda tail: b"GGUF" + tail))
def test_gguf(tmp_path, raw):
    (tmp_path / "model.gguf").write_bytes(raw)
    taken_or_refused(read_gguf_header, tmp_path / "model.gguf")


@FUZZ
@given(config=edited(LLAMA), raw=mutated(good_safetensors()))
def test_model_folders(tmp_path, config, raw):
    with contextlib.suppress(ValueError):  # NaN cannot be written by every reader of JSON
        taken_or_refused(check_folder, write_folder(tmp_path / "m", config=config, weights=raw))


MANIFEST = {"format": "quantscope-manifest", "version": 1, "files": {"a": {"size": 1, "sha256": "0" * 64}}}


@FUZZ
@given(value=edited(MANIFEST) | JSON, files=st.dictionaries(st.sampled_from(["a", "../a", "/etc/passwd", "b"]), JSON, max_size=3))
def test_manifests(tmp_path, value, files):
    (tmp_path / "a").write_bytes(b"x")
    for content in (value, {**MANIFEST, "files": files}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        taken_or_refused(read_manifest, tmp_path)
        taken_or_refused(verify, tmp_path, True)


def _zip() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("manifest.json", json.dumps(MANIFEST))
        archive.writestr("a", "x")
    return made.getvalue()


@FUZZ
@given(raw=mutated(_zip()) | st.binary(max_size=200), name=st.text(min_size=1, max_size=20))
def test_zip_files(tmp_path, raw, name):
    (tmp_path / "a.zip").write_bytes(raw)
    _unpacked(tmp_path)
    # some names cannot be written: "\0" is one
    with contextlib.suppress(ValueError, IndexError), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "x")
        archive.writestr("../../outside", "x")
    _unpacked(tmp_path)
    assert not (tmp_path.parent / "outside").exists()


def _unpacked(folder: Path) -> None:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    taken_or_refused(unpack, folder / "a.zip", out)


@FUZZ
@given(raw=st.binary(max_size=400))
def test_texts(tmp_path, raw):
    (tmp_path / "text.txt").write_bytes(raw)
    taken_or_refused(read_text_file, tmp_path / "text.txt")


GRID = {"model": "owner/name", "scheme": ["W4A4", "W4A8"], "clusters": [8, "32/4"], "measure": {"text": "sotu", "tokens": 2048}}
YAML = yaml.safe_dump(GRID).encode()


@FUZZ
@given(value=edited(GRID) | JSON, raw=mutated(YAML) | st.binary(max_size=200))
def test_grids_of_sweeps(tmp_path, value, raw):
    taken_or_refused(Grid.from_dict, value)
    (tmp_path / "grid.yaml").write_bytes(raw)
    taken_or_refused(read_grid, str(tmp_path / "grid.yaml"))


@FUZZ
@given(rows=st.lists(edited({"text": "A text.", "id": 1}) | JSON, max_size=4), raw=mutated(b'{"text": "A text."}\n' * 3))
def test_documents(tmp_path, rows, raw):
    for name, content in (("a.jsonl", raw), ("b.jsonl", "\n".join(map(json.dumps, rows)).encode()), ("c.parquet", raw)):
        (tmp_path / name).write_bytes(content)
        taken_or_refused(read_text_file, tmp_path / name)


TRAIN = json.loads(Path("configs/train/quantscope-bitnet-a4.8-6m.json").read_text())


@FUZZ
@given(value=edited(TRAIN) | JSON, raw=st.binary(max_size=200))
def test_training_configurations(tmp_path, value, raw):
    for name, content in (("a.json", json.dumps(value).encode()), ("b.toml", raw)):
        (tmp_path / name).write_bytes(content)
        taken_or_refused(TrainConfig.read, tmp_path / name)


@FUZZ
@given(recipe=edited(RECIPE) | JSON, text=JSON, tokens=JSON)
def test_arguments_of_endpoints(recipe, text, tokens):
    taken_or_refused(recipe_of, recipe)
    taken_or_refused(lambda: checked(Calibration(text, tokens)))


VERBS = tuple(cli.VERBS)
OPTIONS = ("--model", "--scheme", "--method", "--clusters", "--calibration-tokens", "--window", "--batch", "--seq", "--json",
           "--out", "--config", "--recipe", "--prompt", "--tokens", "--seed", "--device", "--help-me")  # fmt: skip
WORDS = st.text(max_size=12) | st.integers().map(str) | st.sampled_from(["-1", "nan", "W4A4", "rptq", "no/such", "0", "R1=8"])


@settings(FUZZ, max_examples=max(20, COUNT // 10))
@given(
    verb=st.sampled_from(VERBS) | st.text(max_size=8),
    options=st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), max_size=4),
)
def test_the_command_line(tmp_path, monkeypatch, capsys, verb, options):
    """Offline and in an empty folder: every command ends with a code and a sentence."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    try:
        code = cli.main([verb, *(word for pair in options for word in pair)])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code in range(10) and "Traceback" not in said.out + said.err and "E-BUG" not in said.out + said.err
    note_try(start)

"""Bad input of every kind: exit code 2, one line, nothing changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.app.cli_tools import CALIBRATION, SCORING, refused

BAD = [
    (["--bogus"], "E-PARAM-USAGE"),
    ([], "E-PARAM-VERB", "models"),
    (["quantise"], "E-PARAM-VERB", "quantise", "quantize"),
    (["models", "extra"], "E-PARAM-USAGE", "extra"),
    (["inspect"], "E-PARAM-USAGE", "--model"),
    (["inspect", "--model"], "E-PARAM-USAGE", "--model"),
    (["inspect", "--model", ""], "E-PARAM-MODEL"),
    (["inspect", "--model", "nowhere"], "E-MODEL-NOTFOUND", "nowhere"),
    (["inspect", "--model", "made", *CALIBRATION], "E-MODEL-QUANTIZED"),
    (["inspect", "--model", "base", "--calibration", "none.txt"], "E-TEXT-NOTFOUND", "none.txt"),
    (["inspect", "--model", "base", "--calibration", "empty.txt"], "E-TEXT-SHORT"),
    (["inspect", "--model", "base", "--calibration", "binary.txt"], "E-TEXT-ENC"),
    (["inspect", "--model", "base", "--calibration", "short.txt"], "E-TEXT-SHORT"),
    (["inspect", "--model", "base", *CALIBRATION, "--calibration-tokens", "abc"], "E-PARAM-CALIBRATION-TOKENS", "abc"),
    (["inspect", "--model", "base", *CALIBRATION, "--calibration-tokens", "-1"], "E-PARAM-CALIBRATION-TOKENS", "-1"),
    (["inspect", "--model", "base", *CALIBRATION, "--window", "4"], "E-PARAM-CALIBRATION-WINDOW", "8 to 8192"),
    (["inspect", "--model", "base", "--calibration", "text.txt", "--window", "9000"], "E-PARAM-", "9000"),
    (["inspect", "--model", "base", *CALIBRATION, "--seed", "-3"], "E-PARAM-SEED", "-3"),
    (["quantize", "--model", "base"], "E-PARAM-USAGE", "--out"),
    (["quantize", "--out", "new"], "E-PARAM-MODEL", "--model"),
    (["quantize", "--model", "base", "--method", "magic", "--out", "new"], "E-PARAM-METHOD", "magic", "rptq"),
    (["quantize", "--model", "base", "--scheme", "W5A5", "--out", "new"], "E-PARAM-SCHEME", "W5A5", "W4A4"),
    (["quantize", "--model", "base", "--scheme", "custom", "--out", "new"], "E-PARAM-BITS"),
    (["quantize", "--model", "base", "--bits", "k=9", "--out", "new"], "E-PARAM-BITS", "9"),
    (["quantize", "--model", "base", "--bits", "z=4", "--out", "new"], "E-PARAM-BITS", "z=4"),
    (["quantize", "--model", "base", "--bits", "", "--out", "new"], "E-PARAM-BITS"),
    (["quantize", "--model", "base", "--set", "layers.7.k=9", "--out", "new"], "E-PARAM-BITS", "layers.7.k", "9"),
    (["quantize", "--model", "base", "--set", "layer7", "--out", "new"], "E-PARAM-OVERRIDES", "layer7", "layers.7.k=3"),
    (["quantize", "--model", "base", "--set", "layers.0.R1=0", "--out", "new"], "E-PARAM-CLUSTERS", "layers.0.R1"),
    (["quantize", "--model", "base", *CALIBRATION, "--set", "layers.99.k=3", "--out", "new"], "E-PARAM-OVERRIDES", "layers.99.k"),
    (
        ["quantize", "--model", "base", "--method", "bitnet", "--set", "layers.0.k=3", "--out", "new"],
        "E-PARAM-METHOD",
        "--set",
        "bitnet",
    ),
    (["quantize", "--model", "base", "--variant", "nice", "--out", "new"], "E-PARAM-VARIANT", "nice"),
    (["quantize", "--model", "base", "--segments", "many", "--out", "new"], "E-PARAM-SEGMENTS", "many", "aligned"),
    (["evaluate", "--model", "base", "--stream", "--html", "a.html", *SCORING], "E-PARAM-STREAM", "--html"),
    (["quantize", "--model", "base", "--stream", "--dry-run", "--out", "new"], "E-PARAM-STREAM", "--dry-run"),
    (["quantize", "--model", "base", *CALIBRATION, "--stream", "--order", "shared", "--out", "new"], "E-PARAM-ORDER", "layer"),
    (["quantize", "--model", "base", "--order", "own", "--out", "new"], "E-PARAM-ORDER", "own", "shared"),
    (["quantize", "--model", "base", "--method", "rtn", "--order", "shared", "--out", "new"], "E-PARAM-METHOD", "--order", "rtn"),
    (
        ["quantize", "--model", "base", "--method", "rtn", "--segments", "pow2", "--out", "new"],
        "E-PARAM-METHOD",
        "--segments",
        "rtn",
    ),
    (
        ["quantize", "--model", "base", "--method", "rtn", "--clusters", "8", "--out", "new"],
        "E-PARAM-METHOD",
        "--clusters",
        "rtn",
    ),
    (["quantize", "--model", "base", "--method", "bitnet", "--scheme", "W4A4", "--out", "new"], "E-PARAM-METHOD", "--scheme"),
    (["quantize", "--model", "base", "--rotation", "group=64", "--out", "new"], "E-PARAM-ROTATION", "rotation", "rptq"),
    (["quantize", "--model", "base", "--method", "rotation", "--clusters", "8", "--out", "new"], "E-PARAM-METHOD", "--clusters"),
    (["quantize", "--model", "base", "--plus", "dynamic=k", "--out", "new"], "E-PARAM-", "'k'", "mlp_in"),
    (["quantize", "--model", "base", "--method", "rtn", "--plus", "on", "--out", "new"], "E-PARAM-PLUS", "the method rtn"),
    (["quantize", "--model", "base", "--distill", "steps=0", "--out", "new"], "E-PARAM-DISTILLATION-STEPS", "0", "1 to 10000"),
    (["quantize", "--model", "base", "--distill", "texts=c4", "--out", "new"], "E-PARAM-DISTILLATION-TEXT", "c4", "calibration"),
    (["quantize", "--model", "base", "--distill", "epochs=2", "--out", "new"], "E-PARAM-DISTILL", "epochs", "steps"),
    (["quantize", "--model", "base", "--method", "bitnet", "--distill", "steps=2", "--out", "new"], "E-PARAM-DISTILL", "bitnet"),
    (["quantize", "--model", "base", *CALIBRATION, "--out", "/proc/new"], "E-DISK", "new"),
    (["quantize", "--model", "base", "--weights", "awq", "--out", "new"], "E-PARAM-WEIGHT-METHOD", "awq"),
    (["quantize", "--model", "base", "--clusters", "R9=3", "--out", "new"], "E-PARAM-CLUSTERS", "R9=3"),
    (["quantize", "--model", "base", "--clusters", "0", "--out", "new"], "E-PARAM-CLUSTER", "0"),
    (["quantize", "--model", "base", "--seed", "1.5", "--out", "new"], "E-PARAM-SEED", "1.5"),
    (["quantize", "--model", "made", *CALIBRATION, "--out", "new"], "E-MODEL-QUANTIZED"),
    (["quantize", "--model", "base", *CALIBRATION, "--out", "foreign"], "E-PARAM-OUT", "foreign", "notes.txt"),
    (["quantize", "--model", "base", *CALIBRATION, "--out", "opt"], "E-PARAM-OUT", "opt"),
    (["quantize", "--model", "base", *CALIBRATION, "--out", "text.txt"], "E-PARAM-OUT", "text.txt"),
    (["quantize", "--model", "base", *CALIBRATION, "--out", "text.txt/x"], "E-"),
    (["quantize", "--model", "base", *CALIBRATION, "--out", "x" * 300], "E-DISK", "too long"),
    (["quantize", "--model", "base", *CALIBRATION, "--out", ""], "E-PARAM-OUT"),
    (["quantize", "--recipe", "none.json", "--out", "new"], "E-PARAM-RECIPE", "none.json"),
    (["quantize", "--recipe", "text.txt", "--out", "new"], "E-PARAM-RECIPE", "text.txt"),
    (["quantize", "--recipe", "binary.txt", "--out", "new"], "E-PARAM-RECIPE"),
    (["quantize", "--recipe", "odd.json", "--out", "new"], "E-PARAM-", "colour"),
    (["evaluate", "--model", "base", "--text", "none.txt"], "E-TEXT-NOTFOUND"),
    (["evaluate", "--model", "base", "--text", "short.txt"], "E-TEXT-SHORT"),
    (["evaluate", "--model", "base", *SCORING, "--tokens", "0"], "E-PARAM-TOKENS", "0"),
    (["evaluate", "--model", "base", *SCORING, "--tokens", "-5"], "E-PARAM-TOKENS", "-5"),
    (["evaluate", "--model", "base", *SCORING, "--tokens", "nan"], "E-PARAM-TOKENS", "nan"),
    (["evaluate", "--model", "base", *SCORING, "--window", "1"], "E-PARAM-WINDOW", "8 to 8192"),
    (["evaluate", "--model", "base", *SCORING, "--device", "tpu"], "E-PARAM-DEVICE", "tpu", "cuda"),
    (["evaluate", "--model", "base", *SCORING, "--backend", "cuda"], "E-PARAM-BACKEND", "cuda", "auto"),
    (["evaluate", "--model", "base", *SCORING, "--reference", "nowhere"], "E-MODEL-NOTFOUND", "nowhere"),
    (["evaluate", "--model", "broken", *SCORING], "E-CKPT-BAD"),
    (["evaluate", "--model", "base", *SCORING, "--json", "nowhere/x.json"], "E-PARAM-JSON", "nowhere/x.json"),
    (["evaluate", "--model", "base", *SCORING, "--json", "foreign"], "E-PARAM-JSON", "folder"),
    (["evaluate", "--model", "base", *SCORING, "--json", "text.txt/x.json"], "E-PARAM-JSON"),
    (["evaluate", "--model", "base", *SCORING, "--json", ""], "E-PARAM-JSON"),
    (["evaluate", "--model", "a\x00b", *SCORING], "E-MODEL-NAME"),
    (["evaluate", "--model", "https://example.org/x", *SCORING], "E-MODEL-NAME"),
    (["evaluate", "--model", "hf_" + "a" * 30, *SCORING], "E-MODEL-NAME", "token"),
    (["generate", "--model", "base"], "E-PARAM-USAGE", "--prompt"),
    (["generate", "--model", "base", "--prompt", " "], "E-PARAM-PROMPT"),
    (["generate", "--model", "base", "--prompt", "x\udcff"], "E-PARAM-PROMPT"),
    (["generate", "--model", "base", "--prompt", "x" * 2000], "E-PARAM-PROMPT", "2000"),
    (["generate", "--model", "base", "--prompt", "x", "--max-new-tokens", "0"], "E-PARAM-NEW-TOKENS", "0"),
    (["generate", "--model", "base", "--prompt", "x", "--max-new-tokens", "1e9"], "E-PARAM-NEW-TOKENS", "1e9"),
    (["generate", "--model", "base", "--prompt", "x", "--temperature", "hot"], "E-PARAM-TEMPERATURE", "hot"),
    (["generate", "--model", "base", "--prompt", "x", "--temperature", "nan"], "E-PARAM-TEMPERATURE", "nan"),
    (["generate", "--model", "base", "--prompt", "x", "--temperature", "-1"], "E-PARAM-TEMPERATURE", "-1"),
    (["generate", "--model", "base", "--prompt", "x", "--seed", "99999999999"], "E-PARAM-SEED"),
    (["compare", "--models", "base"], "E-PARAM-MODELS"),
    (["compare", "--models"], "E-PARAM-USAGE", "--models"),
    (["compare", "--models", "base", "--baseline", "nf5"], "E-PARAM-BASELINE", "nf5", "bnb-nf4"),
    (["compare", "--models", "made", "--baseline", "gguf-q4_0", *SCORING], "E-MODEL-QUANTIZED", "gguf-q4_0"),
    (["evaluate", "--model", "base::nf5", *SCORING], "E-PARAM-BASELINE", "nf5", "bnb-nf4"),
    (["compare", "--models", "base", "nowhere", *SCORING], "E-MODEL-NOTFOUND", "nowhere"),
    (["compare", "--models", "base", "opt", *SCORING, "--prompt", ""], "E-PARAM-PROMPT"),
    (["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1"], "E-PARAM-USAGE", "--seq"),
    (["memory", "--model", "opt-14b", "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-PARAM-MODEL", "opt-14b", "opt-13b"),
    (["memory", "--model", "~\ud800", "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-PARAM-MODEL"),
    (["memory", "--model", "hf_" + "a" * 30, "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-MODEL-NAME", "token"),
    (["memory", "--model", "owner/name", "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-MODEL-OFFLINE"),
    (["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1,x", "--seq", "1"], "E-PARAM-BATCH", "x"),
    (["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1", "--gpu", "H9"], "E-PARAM-GPU", "H9"),
    (["memory", "--model", "layers=2,hidden=65,heads=4", "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-PARAM-MODEL"),
    (["memory", "--model", "opt-13b", "--scheme", "W9", "--batch", "1", "--seq", "1"], "E-PARAM-SCHEME", "W9"),
    (["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "0", "--seq", "1"], "E-PARAM-BATCH", "0"),
    (["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1.5"], "E-PARAM-SEQUENCE", "1.5"),
    (["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "10000001"], "E-PARAM-SEQUENCE"),
]


@pytest.fixture(scope="module", autouse=True)
def traps(place):
    """Files and folders that the bad calls name."""
    (place / "empty.txt").write_text(" \n")
    (place / "short.txt").write_text("Too short.")
    (place / "binary.txt").write_bytes(b"\x00\xff\xfe\x80" * 50)
    (place / "odd.json").write_text('{"model": "base", "colour": 1}')
    (place / "foreign").mkdir()
    (place / "foreign" / "notes.txt").write_text("mine")
    (place / "broken").mkdir()
    for path in (place / "made").iterdir():
        if path.name != "quantscope.safetensors":
            (place / "broken" / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [(case[0], case[1], case[2:]) for case in BAD],
    ids=[re.sub(r"[^\w.=-]+", "_", " ".join(case[0]))[:70] for case in BAD],
)
def test_bad_input_is_one_line_and_code_two(call, place, argv, code, words):
    before = sorted(p.name for p in place.iterdir())
    refused(call(*argv), code, *words)
    assert sorted(p.name for p in place.iterdir()) == before
    assert (place / "foreign" / "notes.txt").read_text() == "mine"


VALUES = st.one_of(
    st.text(max_size=30), st.sampled_from(["opt-13b", "W4A4", "1", "-1", "1e9", "~", "~x", ".", "/", "--", "=", ",", "٣"])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES, min_size=4, max_size=4), st.lists(VALUES, max_size=2))
def test_no_value_breaks_the_contract(call, values, more):
    argv = [word for pair in zip(("--model", "--scheme", "--batch", "--seq"), values, strict=True) for word in pair]
    result = call("memory", *argv, *more)
    if result[0] != 0:
        refused(result)
    if not {"-h", "--help"} & set(more):
        assert call(*values)[0] in (0, 2)


HOSTILE_RECIPES = [
    "[]",
    "3",
    "null",
    '{"model": 5}',
    '{"model": "base", "revision": 5}',
    '{"model": "base", "seed": true}',
    '{"model": "base", "seed": NaN}',
    '{"model": "base", "calibration": {"text": 5}}',
    '{"model": "base", "calibration": 7}',
    '{"model": "base", "clusters": {"R1": "x"}}',
    '{"model": "base", "clusters": []}',
    '{"model": "base", "bits": {"k": [4]}}',
    '{"model": "base", "scheme": {}}',
    '{"model": "base", "method": null}',
    '{"recipe": {"scheme": "W4A4"}}',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE_RECIPES, ids=[text[:50] for text in HOSTILE_RECIPES])
def test_a_bad_recipe_is_refused(call, text):
    Path("bad.json").write_text(text)
    refused(call("quantize", "--recipe", "bad.json", "--out", "new"), "E-PARAM-")
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (("--mode", "a4.9"), "E-PARAM-MODE", "a4.9"),
        (("--keep", "2"), "E-PARAM-KEEP", "2"),
        (("--keep", "half"), "E-PARAM-KEEP", "half"),
        (("--kv-bits", "1"), "E-PARAM-BITS", "kv_bits"),
        (("--method", "rptq", "--mode", "a4.8"), "E-PARAM-BITNET", "rptq"),
    ],
    ids=str,
)
def test_bitnet_options_that_do_not_fit(call, argv, code, word):
    method = () if "--method" in argv else ("--method", "bitnet")
    refused(call("quantize", "--model", "base", *method, *argv, "--out", "new"), code, word)
    assert not Path("new").exists()


def test_sparsity_needs_ternary_weights(call):
    refused(call("sparsity", "--model", "base", "--text", "text.txt", "--tokens", 32), "E-MODEL-ARCH", "ternary")
    refused(call("sparsity", "--model", "base", "--tokens", "1"), "E-PARAM-TOKENS", "1")

"""The command line: every verb, good and bad input of every kind, and what an interruption leaves behind."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import cli, cli_output
from core.errors import InputError
from core.evaluation.memory import find_shape
from core.models.tiny import save_tiny

ROOT = Path(__file__).parents[2]
SENTENCES = "The committee met in the old library and read the letters aloud, one after another. "
EVALUATION_KEYS = {
    "perplexity",
    "perplexity_stderr",
    "nll",
    "tokens",
    "window",
    "kld_mean",
    "same_top_token",
    "weight_bytes",
    "kv_bytes_per_token",
    "tokens_per_second",
}
SITES = ["attn_in", "q", "k", "v", "o_in", "mlp_in", "down_in"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two float models, a text, and a quantised model made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    patch = pytest.MonkeyPatch()
    patch.setenv("QUANTSCOPE_CACHE", str(folder / "cache"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.chdir(folder)
    save_tiny(folder / "base", "llama")
    save_tiny(folder / "opt", "opt", seed=1)
    (folder / "text.txt").write_text(SENTENCES * 80)
    assert (
        cli.main(
            [
                "quantize",
                "--model",
                "base",
                "--method",
                "rptq",
                "--scheme",
                "W4A4",
                "--clusters",
                "R1=8,R2=2,R3=2,R4=8,R5=8",
                *CALIBRATION,
                "--out",
                "made",
                "--json",
                "made.json",
            ]
        )
        == 0
    )
    yield folder
    patch.undo()


CALIBRATION = ["--calibration", "text.txt", "--calibration-tokens", "512", "--window", "128"]
SCORING = ["--text", "text.txt", "--window", "128", "--tokens", "512"]


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run a verb in that folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(place)
    capsys.readouterr()

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def document(call, *argv) -> dict:
    """The JSON object of a verb that must succeed; stdout holds nothing else."""
    code, out, err = call(*argv, "--json", "-")
    assert code == 0 and (argv[0] == "generate" or err == "")
    return json.loads(out)


def refused(result, code: str = "E-", *words: str) -> str:
    """Check the contract of a refusal: exit code 2, nothing on stdout, one line on stderr without a traceback."""
    status, out, err = result
    assert status == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n"), result
    assert err.startswith(f"error {code}") and "Traceback" not in err and "E-BUG" not in err, err
    assert len(err) <= 300 and all(word in err for word in words), err
    return err


# every verb, good input


def test_models_lists_the_catalogue(call):
    code, out, err = call("models", "--json", "models.json")
    assert code == 0 and err == "" and "smollm2-135m" in out
    entries = json.loads(Path("models.json").read_text())["models"]
    assert "smollm2-135m" in [e["name"] for e in entries] and all(e["size_bytes"] > 0 and e["licence"] for e in entries)


def test_inspect_gives_every_channel_of_every_site(call):
    made = document(call, "inspect", "--model", "base", *CALIBRATION)
    assert list(made["sites"]) == [f"layers.{layer}.{site}" for layer in range(2) for site in SITES]
    assert made["tokens"] == 512 and made["window"] == 128
    for site in made["sites"].values():
        assert len(site["min"]) == len(site["max"]) > 0
        assert all(low <= high for low, high in zip(site["min"], site["max"], strict=True))
    code, out, _ = call("inspect", "--model", "base", *CALIBRATION)
    assert code == 0 and "down_in" in out and "× median" in out


def test_quantize_says_what_it_made(place):
    made = json.loads((place / "made.json").read_text())
    assert made["recipe"]["scheme"] == "W4A4" and made["recipe"]["clusters"]["R2"] == 2 and made["out"] == "made"
    assert made["weight_bytes"] < made["float_bytes"] and len(made["layers"]) == 2 and len(made["key"]) == 16
    assert {p.name for p in (place / "made").iterdir()} >= {"quantscope.json", "model.safetensors", "manifest.json"}


def test_evaluate_has_the_keys_of_the_contract(call):
    alone = document(call, "evaluate", "--model", "base", *SCORING)
    assert set(alone) >= EVALUATION_KEYS and alone["kld_mean"] is None and alone["same_top_token"] is None
    assert alone["tokens"] == 512 and alone["window"] == 128 and alone["perplexity"] > 1
    same = document(call, "evaluate", "--model", "base", "--reference", "base", *SCORING)
    assert same["kld_mean"] == pytest.approx(0, abs=1e-6) and same["same_top_token"] == 1
    assert same["perplexity"] == alone["perplexity"]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_quantised_folder_is_a_model(call, backend):
    made = document(call, "evaluate", "--model", "made", "--reference", "base", "--backend", backend, *SCORING)
    base = document(call, "evaluate", "--model", "base", *SCORING)
    assert 0 < made["kld_mean"] < 5 and 0 < made["same_top_token"] < 1
    assert made["weight_bytes"] < base["weight_bytes"] and made["kv_bytes_per_token"] < base["kv_bytes_per_token"]
    assert "W4A4" in made["label"]


def test_generate_streams_exactly_its_text(call):
    made = document(call, "generate", "--model", "made", "--prompt", "The old library", "--max-new-tokens", 8)
    code, out, err = call("generate", "--model", "made", "--prompt", "The old library", "--max-new-tokens", 8)
    assert code == 0 and out == made["text"] + "\n" and err.count("\n") == 1 and "tokens/s" in err
    assert made["new_tokens"] <= 8 and made["prompt_tokens"] == len("The old library")
    first, second = (
        document(call, "generate", "--model", "base", "--prompt", "a", "--temperature", "1.5", "--seed", seed)["text"]
        for seed in (1, 1)
    )
    assert first == second


def test_compare_measures_against_the_first(call):
    made = document(call, "compare", "--models", "base", "made", *SCORING, "--prompt", "The", "--max-new-tokens", 4)
    assert made["reference"] == "base" and [m["model"] for m in made["models"]] == ["base", "made"]
    assert made["models"][0]["kld_mean"] is None and made["models"][1]["kld_mean"] > 0
    assert [c["model"] for c in made["continuations"]] == ["base", "made"]
    code, out, err = call("compare", "--models", "base", "made", *SCORING)
    assert code == 0 and err == "" and out.splitlines()[0].split()[:2] == ["model", "perplexity"] and "±" in out


def test_memory_projects_named_shapes_and_prints_both_units(call):
    made = document(call, "memory", "--model", "opt-66b", "--scheme", "W4A4", "--batch", 64, "--seq", 8192)
    assert made["kv_cache"] == 64 * 8192 * 64 * 9216  # 64 layers, 2 × 4 bits a channel
    assert made["total"] == made["weights"] + made["kv_cache"] + made["activations"]
    code, out, err = call("memory", "--model", "opt-66b", "--scheme", "W4A4", "--batch", 64, "--seq", 8192)
    assert code == 0 and err == "" and "309.24" in out and "288.00" in out and "GiB" in out
    assert document(call, "memory", "--model", "layers=2,hidden=64,heads=4", "--scheme", "W16A16", "--batch", 1, "--seq", 1)


@pytest.mark.parametrize("name", ["base", "opt"])
def test_memory_reads_the_shape_of_a_folder(call, name):
    """The formula counts the very parameters of a model that is here."""
    made = document(call, "memory", "--model", name, "--scheme", "W16A16", "--batch", 1, "--seq", 10)
    stored = document(call, "evaluate", "--model", name, *SCORING)["weight_bytes"]
    assert made["weights"] == stored // 2  # 16 bits of 32


def test_memory_is_the_same_for_a_model_and_its_quantised_folder(call):
    options = ["--scheme", "W4A4", "--batch", 2, "--seq", 10]
    one, other = (document(call, "memory", "--model", name, *options) for name in ("base", "made"))
    assert one["total"] == other["total"]
    with pytest.raises(InputError):
        find_shape("base")


# recipes


def test_a_recipe_file_makes_the_same_model(call, place):
    made = json.loads((place / "made.json").read_text())
    Path("recipe.json").write_text(json.dumps(made["recipe"]))
    for source in ("recipe.json", "made.json"):
        again = document(call, "quantize", "--recipe", source, "--out", "again")
        assert again["key"] == made["key"]
    one, two = ((place / name / "model.safetensors").read_bytes() for name in ("made", "again"))
    assert one == two
    other = document(
        call, "quantize", "--recipe", "recipe.json", "--method", "rtn", "--weights", "rtn", "--seed", 3, "--out", "again"
    )
    assert other["recipe"]["method"] == "rtn" and other["recipe"]["seed"] == 3
    assert other["recipe"]["calibration"] == made["recipe"]["calibration"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bits", "k=3,v=3"], {"weights": 4, "q": 4, "k": 3, "v": 3, "attn_in": 8}),
        (["--scheme", "custom", "--bits", "weights=3"], {"weights": 3, "k": 16, "down_in": 16}),
        (["--scheme", "W4A8", "--bits", "down_in=4"], {"down_in": 4, "k": 8}),
        (["--variant", "strict", "--bits", "k=8"], {"attn_in": 4, "k": 8}),
    ],
)
def test_own_bits_change_a_scheme(options, expected):
    args = cli.parse(["quantize", "--model", "m", "--out", "o", *options])
    from app.cli_verbs import recipe_of

    recipe = recipe_of(args)
    assert recipe.scheme == "custom" and {name: getattr(recipe.bits, name) for name in expected} == expected


# bad input

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
    (["inspect", "--model", "base", "--calibration", "text.txt", "--window", "2048"], "E-PARAM-", "1024"),
    (["inspect", "--model", "base", *CALIBRATION, "--seed", "-3"], "E-PARAM-SEED", "-3"),
    (["quantize", "--model", "base"], "E-PARAM-USAGE", "--out"),
    (["quantize", "--out", "new"], "E-PARAM-MODEL", "--model"),
    (["quantize", "--model", "base", "--method", "magic", "--out", "new"], "E-PARAM-METHOD", "magic", "rptq"),
    (["quantize", "--model", "base", "--scheme", "W5A5", "--out", "new"], "E-PARAM-SCHEME", "W5A5", "W4A4"),
    (["quantize", "--model", "base", "--scheme", "custom", "--out", "new"], "E-PARAM-BITS"),
    (["quantize", "--model", "base", "--bits", "k=9", "--out", "new"], "E-PARAM-BITS", "9"),
    (["quantize", "--model", "base", "--bits", "z=4", "--out", "new"], "E-PARAM-BITS", "z=4"),
    (["quantize", "--model", "base", "--bits", "", "--out", "new"], "E-PARAM-BITS"),
    (["quantize", "--model", "base", "--variant", "nice", "--out", "new"], "E-PARAM-VARIANT", "nice"),
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
    (["compare", "--models", "base", "nowhere", *SCORING], "E-MODEL-NOTFOUND", "nowhere"),
    (["compare", "--models", "base", "opt", *SCORING, "--prompt", ""], "E-PARAM-PROMPT"),
    (["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1"], "E-PARAM-USAGE", "--seq"),
    (["memory", "--model", "opt-14b", "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-PARAM-MODEL", "opt-14b", "opt-13b"),
    (["memory", "--model", "~\ud800", "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-PARAM-MODEL"),
    (["memory", "--model", "hf_" + "a" * 30, "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-MODEL-NAME", "token"),
    (["memory", "--model", "owner/name", "--scheme", "W4A4", "--batch", "1", "--seq", "1"], "E-PARAM-MODEL"),
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
        if path.name != "model.safetensors":
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


# BitNet


def test_quantize_by_bitnet_and_count_its_zeros(call):
    options = ("--calibration", "text.txt", "--calibration-tokens", 64, "--window", 32)
    made = document(
        call, "quantize", "--model", "base", "--method", "bitnet", *options, "--kv-bits", 3, "--keep", "0.25", "--out", "ternary"
    )
    assert made["recipe"]["bitnet"] == {"mode": "a4.8", "keep": 0.25, "kv_bits": 3, "bos_bits": 4, "q_bits": 16}
    assert "KV 3 bits, first token 4" in made["label"] and "expect noise" in made["label"]
    code, out, err = call("sparsity", "--model", "ternary", "--text", "text.txt", "--tokens", 32)
    assert code == 0 and "expect noise" in out and "overall" in out and "75.0 %" in out
    counted = document(call, "sparsity", "--model", "ternary", "--text", "text.txt", "--tokens", 32)
    assert counted["total"]["out"] >= 0.75 and 0 < counted["active_parameters"] < counted["parameters"]
    Path("bitnet.json").write_text(json.dumps(made["recipe"]))
    again = document(call, "quantize", "--recipe", "bitnet.json", "--mode", "w1.58a8", "--out", "again")
    assert again["recipe"]["bitnet"] == made["recipe"]["bitnet"] | {"mode": "w1.58a8"}
    other = document(call, "quantize", "--recipe", "bitnet.json", "--method", "rtn", "--weights", "rtn", "--out", "other")
    assert "bitnet" not in other["recipe"]


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


# ends of other kinds


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (KeyboardInterrupt, 130),
        (cli.Terminated, 143),
        (MemoryError, 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2),
        (OSError(28, "No space left on device"), 2),
        (ZeroDivisionError("secret"), 1),
    ],
)
def test_an_interrupted_save_leaves_nothing(call, place, monkeypatch, fault, status):
    module = importlib.import_module("core.models.quantized")

    def torn(tensors, path):
        Path(path).write_bytes(b"half")
        raise fault

    monkeypatch.setattr(module, "save_file", torn)
    before = sorted(p.name for p in place.iterdir())
    code, out, err = call("quantize", "--model", "base", *CALIBRATION, "--out", "new", "--json", "new.json")
    assert code == status and out == "" and err.count("\n") == 1 and "Traceback" not in err and "secret" not in err
    assert sorted(p.name for p in place.iterdir()) == before


def test_an_interrupted_replacement_keeps_the_old_model(call, place, monkeypatch):
    module = importlib.import_module("core.models.quantized")
    old = (place / "made" / "model.safetensors").read_bytes()

    def torn(tensors, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", torn)
    assert call("quantize", "--model", "base", *CALIBRATION, "--out", "made")[0] == 130
    assert (place / "made" / "model.safetensors").read_bytes() == old


def test_a_fault_of_ours_is_named_by_an_id(call, monkeypatch):
    monkeypatch.setattr("core.evaluation.memory.estimate", lambda *a, **k: 1 / 0)
    argv = ["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1"]
    one, two = call(*argv), call(*argv)
    assert one == two and one[0] == 1 and one[1] == "" and one[2].count("\n") == 1
    assert re.search(r"^error E-BUG: .*ZeroDivisionError.* [0-9a-f]{8} ", one[2])
    code, _, err = call(*argv, "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1] == one[2].strip()


def test_json_is_whole_or_absent(call, monkeypatch):
    argv = ["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1", "--json", "kept.json"]
    assert call(*argv)[0] == 0
    old = Path("kept.json").read_text()
    monkeypatch.setattr(cli_output.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    before = sorted(os.listdir())
    refused(call(*argv), "E-DISK")
    assert Path("kept.json").read_text() == old and sorted(os.listdir()) == before


def test_json_may_go_to_a_device(call):
    assert call("models", "--json", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file()


def test_help_is_on_stdout(call):
    for argv in (["--help"], ["quantize", "--help"]):
        code, out, err = call(*argv)
        assert code == 0 and err == "" and out.startswith("usage: python -m app.cli")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setenv("TERM", "xterm")
    now = 0.0
    stream = Stream()
    bar = cli_output.Progress(stream, clock=lambda: now)
    for step in range(41):
        now = float(step)
        bar("Layer 1 of 2: observing\x1b[2J", step / 40)
        bar("Layer 1 of 2: weights", None)
    bar.close()
    text = stream.getvalue()
    assert "\x1b[2J" not in text and "left" in text
    if terminal:
        assert text.count("\n") == 0 and text.endswith("\r\x1b[K") and "100%" in text
    else:
        assert 2 <= text.count("\n") <= 4 and "\r" not in text


def test_tables_align_and_defuse_control_characters():
    text = cli_output.table(["name", "size"], [["a\x1b[31m", "1"], ["bb", "1,000"]])
    lines = text.splitlines()
    assert "\x1b" not in text and lines[3].startswith("bb") and len(lines[3]) == len(lines[2]) == len(lines[1])


# as a process of its own


def spawn(*argv: str, **options) -> subprocess.Popen:
    """The command line as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_a_reader_that_leaves_is_no_error():
    process = spawn("memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == cli.CLOSED_PIPE and error == b""


def test_refusal_of_a_process_and_any_locale():
    done = spawn("memory", "--model", "ßé", "--scheme", "W4A4", "--batch", "1", "--seq", "1")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 2 and out == b"" and err.count(b"\n") == 1
    ascii_only = subprocess.run(
        [sys.executable, "-m", "app.cli", "memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1"],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
        check=False,
    )
    assert ascii_only.returncode == 0 and ascii_only.stderr == b""


def test_light_verbs_load_no_heavy_library():
    code = (
        "import sys; from app import cli; cli.main(['memory', '--model', 'opt-13b', '--scheme', 'W4A4', '--batch', '1', "
        "'--seq', '1']); sys.exit(bool({'torch', 'transformers', 'gradio', 'plotly'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False).returncode == 0

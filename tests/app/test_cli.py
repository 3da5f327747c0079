"""The command line: every verb with good input, recipes, and the options of BitNet."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from pathlib import Path

import pytest

from app.cli import __main__ as cli
from app.cli.recipe import command_of, recipe_of
from core.errors import InputError
from core.evaluation.shapes import find_shape
from core.recipe import QuantRecipe
from tests.app.cli_tools import CALIBRATION, SCORING, document

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


def test_inspect_shows_another_basis_and_the_largest_tokens(call):
    plain = document(call, "inspect", "--model", "base", *CALIBRATION)
    made = document(call, "inspect", "--model", "base", "--basis", "rotated", *CALIBRATION)
    assert (plain["basis"], made["basis"]) == ("original", "rotated") and not plain["tokens_at"]
    assert made["sites"].keys() == plain["sites"].keys() == made["tokens_at"].keys()
    assert made["sites"]["layers.0.down_in"]["max"] != plain["sites"]["layers.0.down_in"]["max"]
    assert made["tokens_at"]["layers.1.k"]["largest"][0]["token_text"]
    code, out, _ = call("inspect", "--model", "base", "--basis", "scaled", *CALIBRATION)
    assert code == 0 and "Largest tokens of the whole model" in out and "scaled" in out
    code, _, error = call("inspect", "--model", "base", "--basis", "turned", *CALIBRATION)
    assert code == 2 and "basis is 'turned'" in error and "rotated" in error


def test_quantize_says_what_it_made(place):
    made = json.loads((place / "made.json").read_text())
    assert made["recipe"]["scheme"] == "W4A4" and made["recipe"]["clusters"]["R2"] == 2 and made["out"] == "made"
    assert made["weight_bytes"] < made["float_bytes"] and len(made["layers"]) == 2 and len(made["key"]) == 16
    assert {p.name for p in (place / "made").iterdir()} >= {"quantscope.json", "quantscope.safetensors", "manifest.json"}


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


def test_a_streamed_run_says_what_it_needs_and_writes_a_model(call):
    code, out, err = call("quantize", "--model", "opt", "--method", "rtn", "--weights", "rtn", *CALIBRATION, "--stream",
                          "--out", "streamed", "--json", "streamed.json")  # fmt: skip
    assert code == 0 and err.startswith("Needs about ") and err.count("\n") == 1 and "Saved as streamed" in out
    made, scored = json.loads(Path("streamed.json").read_text()), document(call, "evaluate", "--model", "streamed", *SCORING)
    assert made["out"] == "streamed" and scored["weight_bytes"] == made["weight_bytes"] and not Path("streamed.stream").exists()
    again = document(call, "evaluate", "--model", "streamed", "--stream", *SCORING)
    assert {name for name in scored if again[name] != scored[name]} <= {"seconds", "tokens_per_second", "working_bytes"}


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


def test_compare_measures_baselines_of_the_first(call, place):
    asked = ["--baseline", "gguf-q4_0", "--baseline", "gguf-q8_0", "--baseline", "gguf-q4_0", *SCORING, "--html", "base.html"]
    made = document(call, "compare", "--models", "base", *asked, "--prompt", "The", "--max-new-tokens", 4)
    base, *found = made["models"]
    assert [m["model"] for m in found] == ["base::gguf-q4_0", "base::gguf-q8_0"] and len(made["continuations"]) == 3
    assert [m["windows_id"] for m in found] == [base["windows_id"]] * 2 and base["effective_weight_bits"] == 32
    assert [m["effective_weight_bits"] for m in found] == [4.5, 8.5] and found[0]["kld_mean"] > found[1]["kld_mean"] > 0
    version = importlib.metadata.version("gguf")
    assert found[0]["label"] == f"base · llama.cpp's Q4_0, gguf {version}"
    assert f"Q4_0, gguf {version}" in (place / "base.html").read_text(encoding="utf-8")


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


def test_a_dry_run_only_says_what_the_run_would_take(call):
    argv = ["quantize", "--model", "base", *CALIBRATION, "--scheme", "W4A8", "--out", "dry"]
    told = document(call, *argv, "--dry-run")
    assert not Path("dry").exists() and set(told["stages"]) == {"observe", "cluster and plan", "weights", "propagate"}
    code, out, err = call(*argv, "--dry-run")
    assert code == 0 and err == "" and out.startswith("time") and "at the peak" in out and "layer" in out
    made = document(call, *argv)
    assert made["estimate"]["model_bytes"] == told["model_bytes"] == pytest.approx(made["weight_bytes"], rel=0.05)
    code, out, err = call(*argv[:-1], "dry2")
    assert code == 0 and out.index("at the peak") < out.index("recipe") and Path("dry2").is_dir()


# recipes


def test_a_recipe_file_makes_the_same_model(call, place):
    made = json.loads((place / "made.json").read_text())
    Path("recipe.json").write_text(json.dumps(made["recipe"]))
    for source in ("recipe.json", "made.json"):
        again = document(call, "quantize", "--recipe", source, "--out", "again")
        assert again["key"] == made["key"]
    one, two = ((place / name / "quantscope.safetensors").read_bytes() for name in ("made", "again"))
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
    recipe = recipe_of(args)
    assert recipe.scheme == "custom" and {name: getattr(recipe.bits, name) for name in expected} == expected


def test_single_layers_are_set_and_kept_in_the_recipe(call, place):
    options = ("--model", "base", "--scheme", "W4A4KV", "--weights", "rtn", *CALIBRATION)
    own = ("--set", "layers.0.k=3,layers.0-1.weights=8", "--set", "layers.1.weights.down=2")
    made = document(call, "quantize", *options, *own, "--out", "own")
    assert made["recipe"]["overrides"]["layers.1.weights.down"] == 2 and "layers.0.k=3" in made["label"]
    bits = [{name: found["bits"] for name, found in layer["weights"].items()} for layer in made["layers"]]
    assert bits == [dict.fromkeys(bits[0], 8), dict.fromkeys(bits[0], 8) | {"down": 2}]
    (place / "own.json").write_text(json.dumps(made["recipe"]))
    again = document(call, "quantize", "--recipe", "own.json", "--set", "layers.0.k=4", "--out", "again")
    assert "layers.0.k" not in again["recipe"]["overrides"] and again["recipe"]["overrides"]["layers.0.weights.o"] == 8
    plain = document(call, "quantize", "--recipe", "own.json", "--method", "bitnet", "--out", "again")
    assert "overrides" not in plain["recipe"]
    recipe = QuantRecipe.from_dict(made["recipe"])
    assert recipe_of(cli.parse(shlex.split(command_of(recipe))[3:])) == recipe


def test_few_accumulators_and_one_order_are_options_of_rptq(call, place):
    options = ("--model", "base", "--scheme", "W4A8", "--weights", "rtn", *CALIBRATION, "--segments", "aligned")
    made = document(call, "quantize", *options, "--order", "shared", "--out", "few")
    assert made["recipe"]["segments"] == "aligned" and "few aligned runs" in made["label"]
    assert made["recipe"]["order"] == "shared" and "one order for all layers" in made["label"]
    recipe = QuantRecipe.from_dict(made["recipe"])
    assert recipe_of(cli.parse(shlex.split(command_of(recipe))[3:])) == recipe
    (place / "few.json").write_text(json.dumps(made["recipe"]))
    other = document(call, "quantize", "--recipe", "few.json", "--method", "rtn", "--out", "other")
    assert not {"segments", "order"} & other["recipe"].keys()


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


# rotation


def test_quantize_by_rotation_with_single_switches(call):
    options = ("--calibration", "text.txt", "--calibration-tokens", 64, "--window", 32)
    own = ("--method", "rotation", "--variant", "strict", "--rotation", "group=16,key_mean=off")
    made = document(call, "quantize", "--model", "base", *own, *options, "--out", "rotated")
    assert made["recipe"]["rotation"]["group"] == 16 and made["recipe"]["rotation"]["key_mean"] is False
    assert "ROTATION" in made["label"] and "groups of 16, without key mean" in made["label"]
    Path("rotation.json").write_text(json.dumps(made["recipe"]))
    again = document(call, "quantize", "--recipe", "rotation.json", "--rotation", "kv=token", "--out", "again")
    assert again["recipe"]["rotation"] == made["recipe"]["rotation"] | {"kv": "token"}
    text = ("--text", "text.txt", "--tokens", 64, "--window", 32)
    scored = document(call, "evaluate", "--model", "rotated", "--reference", "base", *text)
    assert scored["kld_mean"] > 0 and scored["weight_parts"]["packed weights"] > 0
    code, out, _ = call("generate", "--model", "rotated", "--prompt", "Once", "--max-new-tokens", 4)
    assert code == 0 and out
    other = document(call, "quantize", "--recipe", "rotation.json", "--method", "rptq", "--out", "other")
    assert "rotation" not in other["recipe"]


def test_quantize_by_rptq_with_added_parts(call):
    options = ("--calibration", "text.txt", "--calibration-tokens", 64, "--window", 32)
    made = document(call, "quantize", "--model", "base", "--plus", "on", *options, "--out", "plus")
    assert made["label"].startswith("RPTQ+ ") and made["recipe"]["plus"]["rotate"] == "down_in"
    Path("plus.json").write_text(json.dumps(made["recipe"]))
    again = document(call, "quantize", "--recipe", "plus.json", "--plus", "dynamic=none,scale=off", "--out", "plus-again")
    assert again["recipe"]["plus"] == made["recipe"]["plus"] | {"dynamic": "none", "scale": False}
    plain = document(call, "quantize", "--recipe", "plus.json", "--plus", "off", "--out", "plus-off")
    assert "plus" not in plain["recipe"]

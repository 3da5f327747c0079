"""The verb `export`: a folder that other programs load, or one sentence on why it does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from app.cli import __main__ as cli
from core.models.io.load import load_model
from tests.app.cli_tools import CALIBRATION, SCORING, document, refused
from tests.core.tools import relative, tokens


@pytest.fixture(scope="module", autouse=True)
def rounded(place):
    """A run that fits other formats, and its numbers."""
    recipe = ["--method", "rtn", "--scheme", "custom", "--bits", "weights=3", "--weights", "rtn"]
    assert cli.main(["quantize", "--model", "base", *recipe, *CALIBRATION, "--out", "w3", "--json", "w3.json"]) == 0
    assert cli.main(["evaluate", "--model", "w3", *SCORING, "--json", "numbers.json"]) == 0


def test_quantize_says_where_its_run_loads(place):
    loads = json.loads((place / "w3.json").read_text())["loads"]
    assert list(loads) == ["vLLM", "llama.cpp", "transformers"] and all(answer.startswith("yes, as") for answer in loads.values())
    made = json.loads((place / "made.json").read_text())["loads"]
    assert made["vLLM"].startswith("no, because layers.0") and made["transformers"].startswith("yes, as transformers; weights")


@pytest.mark.parametrize("form", ["compressed-tensors", "transformers"])
def test_an_exported_folder_is_the_model(call, place, form):
    pytest.importorskip("compressed_tensors")
    made = document(call, "export", "--model", "w3", "--format", form, "--out", f"out-{form}", "--numbers", "numbers.json")
    assert made["format"] == form and made["nbytes"] > 10_000 and "README.md" in made["files"]
    card, numbers = (place / f"out-{form}/README.md").read_text(), json.loads((place / "numbers.json").read_text())
    assert f"perplexity: {numbers['perplexity']:.4g}" in card and "RTN plain" in card
    for folder in (place / "w3", place / f"out-{form}"):
        assert not any(str(place) in path.read_text() for path in folder.glob("*config.json")), "a path of this machine"
    ids = tokens(1, 24)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(place / f"out-{form}")(ids).logits
        assert relative(theirs, load_model(str(place / "w3")).model(ids).logits) <= 1e-5


def test_what_is_pushed_is_the_exported_folder(call, place, monkeypatch):
    pushed = []
    monkeypatch.setattr("core.models.export.push.check_destination", lambda repo: pushed.append(repo))
    monkeypatch.setattr(
        "core.models.export.push.push_folder", lambda folder, repo, *, private: pushed.append((folder, private)) or "https://x/1"
    )
    made = document(call, "export", "--model", "w3", "--format", "gguf", "--out", "out-push", "--push", "me/new")
    assert (
        made["pushed"] == "https://x/1" and pushed == ["me/new", ("out-push", True)] and (place / "out-push/model.gguf").is_file()
    )


def test_a_gguf_file_is_a_model_again(call, place):
    code, out, err = call("export", "--model", "w3", "--format", "gguf", "--out", "out-gguf")
    assert code == 0 and err == "" and "llama.cpp     yes, as gguf" in out and "differs" in out
    ours, theirs = (document(call, "evaluate", "--model", name, *SCORING)["perplexity"] for name in ("w3", "out-gguf/model.gguf"))
    assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--model", "made", "--format", "compressed-tensors", "--out", "x"], "E-PARAM-FORMAT", ("layers.0", "cannot hold")),
        (["--model", "made", "--format", "gguf", "--out", "x"], "E-PARAM-FORMAT", ("gguf",)),
        (["--model", "w3", "--format", "bitnet", "--out", "x"], "E-PARAM-FORMAT", ("not ternary",)),
        (["--model", "base", "--format", "gguf", "--out", "x"], "E-PARAM-FORMAT", ("no weight is quantised",)),
        (["--model", "w3", "--format", "awq", "--out", "x"], "E-PARAM-FORMAT", ("awq", "compressed-tensors")),
        (["--model", "w3", "--format", "gguf", "--out", "w3"], "E-PARAM-OUT", ("not empty",)),
        (["--model", "w3", "--format", "gguf", "--out", "text.txt"], "E-PARAM-OUT", ("is a file",)),
        (["--model", "w3", "--format", "gguf", "--out", "x", "--numbers", "text.txt"], "E-PARAM-NUMBERS", ("text.txt",)),
        (["--model", "w3", "--format", "gguf", "--out", "x", "--numbers", "w3.json"], "E-PARAM-NUMBERS", ("w3.json",)),
        (["--model", "w3", "--format", "gguf", "--out", "x", "--push", "name"], "E-PARAM-PUSH", ("owner/name",)),
        (["--model", "w3", "--format", "gguf", "--out", "x", "--public"], "E-PARAM-PUSH", ("--push",)),
        (["--model", "absent", "--format", "gguf", "--out", "x"], "E-MODEL", ("absent",)),
        (["--model", "w3", "--out", "x"], "E-PARAM-USAGE", ("--format",)),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(call, place, argv, code, words):
    refused(call("export", *argv), code, *words)
    assert not (place / "x").exists()

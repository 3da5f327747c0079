"""The verb `train`: a run, its continuation, its export as a model that other verbs take, and refusals in one line."""

from __future__ import annotations

import json
import random

import pytest

from app.cli import __main__ as cli
from core.storage import file_lock
from tests.app.cli_tools import refused

WORDS = ["river", "ran", "past", "seven", "quiet", "houses", "while", "children", "counted", "boats", "in", "rain"]
CONFIG = {
    "name": "tiny",
    "architecture": "llama",
    "hidden": 32,
    "layers": 1,
    "heads": 2,
    "ffn": 48,
    "vocab": 300,
    "seq": 32,
    "batch": 2,
    "tokens": 640,
    "warmup": 2,
    "texts": [["text.txt", 1]],
    "precision": "fp32",
    "compile": "no",
}

SCORING = ["--text", "text.txt", "--window", "32", "--tokens", "320"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, two configurations, and the run of one of them."""
    folder = tmp_path_factory.mktemp("cli-train")
    patch = pytest.MonkeyPatch()
    patch.setenv("QUANTSCOPE_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    rng = random.Random(0)
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choice(WORDS) for _ in range(12)) + "." for _ in range(400)))
    (folder / "c.json").write_text(json.dumps(CONFIG))
    (folder / "b.json").write_text(json.dumps(CONFIG | {"name": "bit", "architecture": "bitnet", "mode": "w1.58a8"}))
    assert cli.main(["train", "--config", "c.json", "--out", "run", "--json", "run.json"]) == 0
    yield folder
    patch.undo()


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run a verb in that folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(place)
    capsys.readouterr()

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_run_reports_itself(place):
    report = json.loads((place / "run.json").read_text())
    assert report["step"] == 10 and report["tokens"] == 640 and report["name"] == "tiny" and 4 < report["loss"] < 6
    assert {p.name for p in (place / "run").iterdir()} == {"run.json", "log.jsonl", "tokenizer.json", "checkpoint", "lock"}


def test_tokens_and_texts_can_be_given(call, place):
    (place / "other.txt").write_text((place / "text.txt").read_text().replace("river", "street"))
    code, out, _ = call("train", "--config", "c.json", "--out", "short", "--tokens", "256", "--text", "other.txt", "text.txt")
    document = json.loads((place / "short/run.json").read_text())
    assert code == 0 and "4 steps, 256 tokens" in out and [s["name"] for s in document["corpus"]] == ["other.txt", "text.txt"]


def test_a_finished_run_can_be_resumed(call, place):
    code, out, _ = call("train", "--config", "c.json", "--out", "run", "--resume")
    assert code == 0 and "10 steps" in out
    code, out, _ = call("train", "--config", "c.json", "--out", "run", "--resume", "--json", "-")
    again, first = json.loads(out), json.loads((place / "run.json").read_text())
    assert code == 0 and (again["loss"], again["held_out_loss"]) == (first["loss"], first["held_out_loss"])


def test_a_folder_in_use_is_one_line(call, place):
    with file_lock(place / "run/lock"):
        code, out, err = call("train", "--config", "c.json", "--out", "run", "--resume")
    assert code != 0 and out == "" and err.count("\n") == 1 and err.startswith("error E-TIME") and "'run'" in err


def test_an_exported_run_is_a_model(call):
    code, out, _ = call("train", "--export", "run", "--out", "model")
    assert code == 0 and "perplexity" in out
    code, out, _ = call("evaluate", "--model", "model", *SCORING, "--json", "-")
    assert code == 0 and 20 < json.loads(out)["perplexity"] < 400


def test_an_exported_bitnet_is_a_model(call, place):
    assert call("train", "--config", "b.json", "--out", "bit")[0] == 0
    code, out, _ = call("train", "--export", "bit", "--out", "bitmodel", "--json", "-")
    card = json.loads(out)
    assert code == 0 and card["mode"] == "w1.58a8" and (place / "bitmodel/README.md").is_file()
    code, out, _ = call("evaluate", "--model", "bitmodel", *SCORING, "--json", "-")
    assert code == 0 and 20 < json.loads(out)["perplexity"] < 400


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (["--out", "x"], "E-PARAM-CONFIG", "--config"),
        (["--config", "absent.json", "--out", "x"], "E-PARAM-CONFIG", "absent.json"),
        (["--config", "text.txt", "--out", "x"], "E-PARAM-CONFIG", "not valid"),
        (["--config", "c.json", "--out", "run"], "E-PARAM-OUT", "--resume"),
        (["--config", "c.json", "--out", "x", "--tokens", "many"], "E-PARAM-TOKENS", "whole number"),
        (["--config", "c.json", "--out", "x", "--tokens", "64"], "E-PARAM-TOKENS", "warm-up"),
        (["--config", "c.json", "--out", "x", "--text", "absent.txt"], "E-TEXT-NOTFOUND", "absent.txt"),
        (["--config", "c.json", "--out", "run", "--resume", "--tokens", "1280"], "E-PARAM-CONFIG", "tokens"),
        (["--export", "absent", "--out", "x"], "E-CKPT", "no training run"),
        (["--export", "run", "--out", "text.txt"], "E-PARAM-OUT", "is a file"),
        (["--export", "run", "--config", "c.json", "--out", "x"], "E-PARAM-EXPORT", "--config"),
        (["--config", "c.json"], "E-PARAM-USAGE", "--out"),
    ],
    ids=str,
)
def test_refusals_are_one_line(call, argv, code, word):
    status, out, err = call("train", *argv)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith(f"error {code}") and word in err, err


def test_a_run_is_no_model_and_says_what_to_do(call):
    refused(call("generate", "--model", "run", "--prompt", "x"), "E-MODEL-BAD", "training run", "--export")

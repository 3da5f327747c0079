"""The command line quantises and distils: recipe, report, repetition, and Ctrl-C."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from app.cli import __main__ as cli
from app.cli.output import Progress
from app.cli.recipe import command_of, recipe_of
from core.models.io.preflight.folder import SAVED_WEIGHTS
from core.recipe import QuantRecipe
from tests.app.cli_tools import document

OPTIONS = ("--calibration", "text.txt", "--calibration-tokens", 64, "--window", 32, "--method", "rotation")


def test_quantize_distils_and_says_so(call, monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path))
    made = document(call, "quantize", "--model", "base", *OPTIONS, "--distill", "steps=2,tokens=64,lr=0.02", "--out", "distilled")
    assert made["recipe"]["distill"] == {"steps": 2, "tokens": 64, "lr": 0.02, "texts": "calibration"}
    assert made["label"].endswith("distilled 2 × 64 tokens") and made["distilled"]["steps"] == 2
    assert made["distilled"]["other"] == "sotu" and len(made["distilled"]["losses"]) == 2
    assert json.loads(Path("distilled/quantscope.json").read_text())["report"]["distilled"] == made["distilled"]
    assert not list(tmp_path.glob("distill/*")), "the state is gone once the run has ended"
    text = ("--text", "text.txt", "--tokens", 64, "--window", 32)
    assert document(call, "evaluate", "--model", "distilled", "--reference", "base", *text)["kld_mean"] > 0

    Path("distilled.json").write_text(json.dumps(made["recipe"]))
    code, out, _ = call("quantize", "--recipe", "distilled.json", "--distill", "steps=1", "--out", "again")
    assert code == 0 and "Distilled: 1 steps of 64 tokens" in out and "sotu" in out and "held out" in out
    plain = document(call, "quantize", "--recipe", "distilled.json", "--distill", "off", "--out", "plain")
    assert "distill" not in plain["recipe"] and plain["distilled"] is None
    recipe = QuantRecipe.from_dict(made["recipe"])
    words = shlex.split(command_of(recipe))
    assert recipe_of(cli.parse(words[3:])) == recipe


def test_ctrl_c_keeps_the_best_so_far(call, monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTSCOPE_CACHE", str(tmp_path))

    def stop(self, stage, fraction=None):
        if stage.startswith("Distilling: step 6 "):
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", stop)
    made = document(call, "quantize", "--model", "base", *OPTIONS, "--distill", "steps=8,tokens=32", "--out", "stopped")
    assert made["recipe"]["distill"]["steps"] == 4 and made["distilled"]["stopped"]
    assert (Path("stopped") / SAVED_WEIGHTS).is_file()
    assert len(list(tmp_path.glob("distill/*"))) == 1, "the same command continues from here"

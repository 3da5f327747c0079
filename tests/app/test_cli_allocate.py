"""The verb `allocate`: bits for a budget, written as a recipe that `quantize` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.recipe import QuantRecipe
from tests.app.cli_tools import CALIBRATION, document, refused

SHORT = ["--model", "base", *CALIBRATION, "--text", "text.txt", "--tokens", "128", "--context", "256"]


def test_a_budget_is_spent_and_its_recipe_makes_the_model(call, place):
    made = document(call, "allocate", *SHORT, "--budget-of", "W4A4KV", "--weights", "rtn", "--out", "spent.json")
    assert made["nbytes"] <= made["budget"] and made["predicted"] <= made["rival"]["predicted"] * (1 + 1e-9)
    assert made["measured"]["kld"] > 0 and made["rival_measured"]["kld"] > 0 and made["context"] == 256
    assert {name.split(".")[2] for name in made["bits"]} == {"qkv", "o", "up", "down", "k", "v"}
    assert made["smallest_g"]["predicted"] <= 1.05 * made["smallest_g"]["per_channel"]
    recipe = QuantRecipe.from_json(Path("spent.json").read_text())
    assert recipe.scheme == "W4A4KV" and recipe.overrides.to_dict() == made["overrides"] == made["recipe"]["overrides"]
    model = document(call, "quantize", "--recipe", "spent.json", "--out", "spent")
    assert model["key"] == recipe.hash
    bits = [{name: found["bits"] for name, found in layer["weights"].items()} for layer in model["layers"]]
    assert bits == [{name: made["bits"][f"layers.{i}.{name}"] for name in own} for i, own in enumerate(bits)]


def test_a_bound_is_kept_with_fewer_bytes(call):
    wide = document(call, "allocate", *SHORT, "--scheme", "W4A4KV", "--weights", "rtn")
    bound = 2 * wide["predicted"]
    found = document(call, "allocate", *SHORT, "--scheme", "W4A4KV", "--weights", "rtn", "--kld", bound, "--within", "50")
    assert found["predicted"] <= bound and found["nbytes"] < wide["nbytes"] and found["budget"] is None
    assert found["smallest_g"]["g"] <= wide["smallest_g"]["g"]


def test_people_read_a_table_and_a_comparison(call):
    code, out, _ = call("allocate", *SHORT, "--method", "rtn", "--bytes", 10**7)
    assert code == 0 and "smallest g" not in out and "everywhere (" in out and "measured on the probe" in out
    table = out[out.index("Bits") :].splitlines()
    assert table[1].split() == ["layer", "qkv", "o", "up", "down", "k", "v"]
    assert [line.split()[1:] for line in table[3:]] == [["8"] * 6] * len(table[3:]), "ten megabytes are enough for 8 bits"


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--budget-of", "W4A4", "--kld", "0.1"], "E-PARAM-BUDGET", ("one of",)),
        (["--bytes", "1000"], "E-PARAM-BUDGET", ("allow more",)),
        (["--bytes", "many"], "E-PARAM-BYTES", ("many",)),
        (["--kld", "-1"], "E-PARAM-BOUND", ("-1",)),
        (["--kld", "1e-12"], "E-PARAM-BUDGET", ("allow more",)),
        (["--budget-of", "W9"], "E-PARAM-SCHEME", ("W9",)),
        (["--context", "0"], "E-PARAM-CONTEXT", ("0",)),
        (["--tokens", "2"], "E-PARAM-PROBE-TOKENS", ("2",)),
        (["--within", "-1"], "E-PARAM-WITHIN", ("-0.01",)),
        (["--method", "bitnet"], "E-PARAM-SCHEME", ("bits can be chosen",)),
        (["--scheme", "custom", "--bits", "q=4"], "E-PARAM-SCHEME", ("bits can be chosen",)),
        (["--out", "no/where.json"], "E-PARAM-OUT", ("no/where.json",)),
    ],
)
def test_bad_input_is_one_line(call, argv, code, words):
    refused(call("allocate", *SHORT, *argv), code, *words)
    assert not Path("no").exists()

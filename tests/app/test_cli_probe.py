"""The verbs `curve` and `calibrations`: figures that agree with each other, tables for people, one line for bad input."""

from __future__ import annotations

import pytest

from tests.app.cli_tools import CALIBRATION, document, refused

PROBE = ["--text", "text.txt", "--tokens", "128"]
SHORT = ["--model", "base", *CALIBRATION, *PROBE]


def test_a_curve_of_one_layer_is_a_part_of_that_of_all(call, place):
    one, every = (document(call, "curve", *SHORT, "--site", site, "--bits", 3) for site in ("layers.1.down_in", "down_in"))
    assert one["layers"] == [1] and every["layers"] == [0, 1] and one["bits"] == every["bits"] == 3 and one["g"][:3] == [1, 2, 4]
    for name in ("kmeans", "equal"):
        assert all(0 < part < whole for part, whole in zip(one[name], every[name], strict=True))
        assert len(one["squared_error"][name]) == len(one["g"])
    assert one["per_tensor"] == pytest.approx(one["kmeans"][0]) and one["per_channel"] < one["per_tensor"]


def test_people_read_a_table_and_where_the_knee_is(call):
    code, out, _ = call("curve", *SHORT, "--site", "layers.0.k")
    assert code == 0 and "Squared error: " in out and "Predicted divergence: " in out and "at 4 bits" in out
    table = out[out.index("g  ") :].splitlines()
    assert table[2].split()[:2] == ["one", "grid"] and any(line.startswith("per channel") for line in table)


def test_two_calibrations_are_compared(call):
    recipe = ["--clusters", "R1=8,R2=2,R3=2,R4=8,R5=8", "--weights", "rtn"]
    found = document(call, "calibrations", *SHORT, *recipe, "--against", "text.txt", "--against-tokens", "256")
    assert found["tokens"] == [512, 256] and found["judged"] == 128 and len(found["sites"]) == 14
    assert all(measured["kld"] > 0 for measured in found["measured"]) and found["recipe"]["clusters"]["R5"] == 8
    same = document(call, "calibrations", *SHORT, *recipe, "--against", "text.txt")
    assert same["measured"][0]["kld"] == same["measured"][1]["kld"] == found["measured"][0]["kld"]
    assert all(site["rand"] == 1 and site["moved"] == site["wider"] == 0 for site in same["sites"].values())
    code, out, _ = call("calibrations", *SHORT, *recipe, "--against", "text.txt")
    assert code == 0 and "wider in 0 % of channels" in out and "adjusted Rand index" in out and "B: 512 tokens of text.txt" in out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["curve", "--site", "layers.0.qkv"], "E-PARAM-SITE", ("qkv", "down_in")),
        (["curve", "--site", "blocks.0.k"], "E-PARAM-SITE", ("blocks.0.k",)),
        (["curve", "--site", "layers.9.k"], "E-PARAM-SITE", ("layers.9.k",)),
        (["curve", "--site", "layers.x.k"], "E-PARAM-LAYER", ("x",)),
        (["curve", "--site", "k", "--bits", "16"], "E-PARAM-SITE", ("2 to 8 bits",)),
        (["curve", "--site", "k", "--bits", "9"], "E-PARAM", ("9",)),
        (["calibrations", "--against", "none.txt"], "E-TEXT-NOTFOUND", ("none.txt",)),
        (["calibrations", "--against", "text.txt", "--against-tokens", "few"], "E-PARAM-TOKENS", ("few",)),
        (["calibrations", "--against", "text.txt", "--method", "bitnet"], "E-PARAM-METHOD", ("bitnet",)),
        (["calibrations", "--against", "text.txt", "--variant", "matched"], "E-PARAM-VARIANT", ("rtn",)),
    ],
)
def test_bad_input_is_one_line(call, argv, code, words):
    refused(call(*argv, *SHORT), code, *words)

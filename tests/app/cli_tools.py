"""What the command line's tests share: its inputs, and the contracts of a success and of a refusal."""

from __future__ import annotations

import json

SENTENCES = "The committee met in the old library and read the letters aloud, one after another. "
CALIBRATION = ["--calibration", "text.txt", "--calibration-tokens", "512", "--window", "128"]
SCORING = ["--text", "text.txt", "--window", "128", "--tokens", "512"]


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
